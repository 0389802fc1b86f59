"""trace-index and trace-find, as an owner uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from flexctl.bundle.index import open_index
from flexctl.cli.text import expert_colour, paint, printable
from flexctl.cli.views import render
from flexctl.engine.trace_find import TraceFindConfig, TraceFindResult, trace_find
from flexctl.engine.trace_index import TraceIndexConfig, TraceIndexResult, trace_index
from flexctl.errors import BundleError, UsageError

LAW = "The court held that the clause is void, as no party had read it before they signed."
NEWS = "Three ships came home yesterday evening, and nobody on the quay had expected them."

pytestmark = pytest.mark.usefixtures("in_empty_folder")


@pytest.fixture
def indexes(in_empty_folder: Path) -> tuple[Path, Path]:
    write_jsonl(Path("law.jsonl"), ["Nothing of this.", f"It says: {LAW}", f"Again: {LAW}"])
    write_jsonl(Path("news.jsonl"), [NEWS])
    for name in ("law", "news"):
        make(data=(Path(f"{name}.jsonl"),))
    assert in_empty_folder == Path.cwd()
    return Path("law.index"), Path("news.index")


def make(**settings: Any) -> TraceIndexResult:
    return trace_index(TraceIndexConfig(**settings))


def find(*indexes: Path, **settings: Any) -> TraceFindResult:
    return trace_find(TraceFindConfig(index=indexes, **settings))


def test_each_index_answers_for_its_owner(indexes: tuple[Path, Path]) -> None:
    found = find(*indexes, text=f"I read that {LAW[:39]}; and {NEWS[10:70]}")
    assert [traced.name for traced in found.indexes] == ["law", "news"]
    law, news = found.indexes
    assert [span.text.strip() for span in law.spans] == [LAW[:39]]
    assert [span.text.strip() for span in news.spans] == [NEWS[10:70].strip()]
    assert law.spans[0].count == 2
    assert [(place.file, place.record) for place in law.spans[0].places] == [("law.jsonl", 2), ("law.jsonl", 3)]
    assert 0.3 < law.covered < 0.5


def test_short_spans_are_left_out(indexes: tuple[Path, Path]) -> None:
    assert find(*indexes, text="The court held that").indexes[0].spans == ()
    assert len(find(*indexes, text="The court held that", least_bytes=10).indexes[0].spans) == 1


def test_a_file(indexes: tuple[Path, Path]) -> None:
    Path("answer.txt").write_text(LAW)
    assert find(indexes[0], file=Path("answer.txt")).indexes[0].covered == 1
    Path("answer.txt").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"answer.txt: not UTF-8 at byte 0"):
        find(indexes[0], file=Path("answer.txt"))
    with pytest.raises(UsageError, match=r"gone.txt cannot be read"):
        find(indexes[0], file=Path("gone.txt"))


def test_a_model_s_answer(indexes: tuple[Path, Path], merged: Path) -> None:
    asked = {"prompt": "def f(", "bundle": merged, "max_new_tokens": 6, "threads": 1}
    answer = find(indexes[0], **asked)
    assert answer.bundle_digest is not None
    write_jsonl(Path("said.jsonl"), [f"before {answer.text} after"])
    make(data=(Path("said.jsonl"),))
    again = find(Path("said.index"), **asked, least_bytes=len(answer.text.encode()))
    assert again.text == answer.text
    assert again.indexes[0].spans[0].text == answer.text
    assert "def f(" not in again.text
    assert render("trace_find", answer, verbose=False, colour=False).startswith(answer.text)
    assert render("trace_find", answer, verbose=False, colour=True).startswith(answer.text)
    painted = render("trace_find", again, verbose=False, colour=True)
    assert painted.startswith("said: ")
    assert paint(printable(again.text), expert_colour(1)) in painted


def test_near_matches_on_request(indexes: tuple[Path, Path]) -> None:
    text = LAW.replace("clause", "klause")
    assert find(indexes[0], text=text).indexes[0].near == ()
    (near,) = find(indexes[0], text=text, near=True).indexes[0].near
    assert near.text == text
    assert 0.95 < near.similarity < 1


def test_the_page(indexes: tuple[Path, Path]) -> None:
    text = f"<b>{LAW.replace('clause', 'klause')}</b> & {NEWS}"
    find(*indexes, text=text, near=True, report=Path("trace.html"))
    page = Path("trace.html").read_text()
    assert Path("trace.html").stat().st_mode & 0o777 == 0o600
    assert "<b>" not in page
    assert "law.jsonl" in page
    assert "1 passage of this text" in page
    assert "similarity" in page
    with pytest.raises(UsageError, match="exists"):
        find(*indexes, text=text, report=Path("trace.html"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give one of"),
        ({"text": "a", "file": Path("b")}, "give one of"),
        ({"text": " "}, "no text to trace"),
        ({"text": "a", "bundle": Path("merged")}, "bundle: a model answers to a `prompt` alone"),
        ({"text": "a", "least_bytes": 0}, "least_bytes: 0 is not above 0"),
    ],
)
def test_settings_that_are_refused(indexes: tuple[Path, Path], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find(indexes[0], **settings)


def test_what_is_no_index_is_refused(indexes: tuple[Path, Path], merged: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        find(Path("gone.index"), text="a")
    with pytest.raises(BundleError, match="is no index"):
        find(merged, text="a")
    assert indexes


def test_building(indexes: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="exists already"):
        make(data=(Path("law.jsonl"),))
    again = make(data=(Path("law.jsonl"),), overwrite=True, shard_bytes=20)
    assert (again.documents, again.shards) == (3, 2)
    assert again.bytes_written == sum(file.stat().st_size for file in indexes[0].iterdir())
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["law.index", "law.jsonl", "news.index", "news.jsonl"]
    named = make(data=(Path("law.jsonl"), Path("news.jsonl")), name="both", output=Path("deep/down"))
    assert open_index(named.path).sources == ("law.jsonl", "news.jsonl")
    dry = make(data=(Path("law.jsonl"),), output=Path("dry"), dry_run=True)
    assert (dry.dry_run, Path("dry").exists()) == (True, False)


def test_what_is_indexed_is_refused_before_the_work(indexes: tuple[Path, Path], merged: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        make(data=(Path("gone"),), dry_run=True)
    with pytest.raises(UsageError, match="no index bundle"):
        make(data=(Path("law.jsonl"),), output=merged, overwrite=True, dry_run=True)
    with pytest.raises(UsageError, match="2147483648 is above"):
        make(data=(Path("law.jsonl"),), shard_bytes=2**31)
    assert indexes


def test_records_are_counted_in_their_own_file(in_empty_folder: Path) -> None:
    (in_empty_folder / "texts").mkdir()
    Path("texts/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("", LAW, "x")))
    Path("texts/b.txt").write_text(NEWS)
    made = make(data=(Path("texts"),))
    law = find(made.path, text=LAW).indexes[0].spans[0].places[0]
    news = find(made.path, text=NEWS).indexes[0].spans[0].places[0]
    assert (law.file, law.record) == ("texts/a.jsonl", 2)
    assert (news.file, news.record, news.start, news.stop) == ("texts/b.txt", 1, 0, len(NEWS))
