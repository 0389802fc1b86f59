"""Text that is read from a data set on the Hub."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hub.server import READ_TOKEN, TOKEN, Hub
from hub.terminal import Terminal
from pyarrow import parquet

from flexctl import hub as client
from flexctl.errors import FlexctlError, UsageError
from flexctl.hub import DataAddress, parse_data
from flexctl.text.documents import pinned, read_documents, size_bytes, text_files

CARD = b"""---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: en/train-*
  - split: test
    path: en/test.parquet
- config_name: de
  data_files: de/*.csv
---
# Notes
"""
NOTES = "hf://datasets/acme/notes"


def table(*texts: str, **settings: Any) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pa.table({"id": range(len(texts)), "text": texts}), made, **settings)
    return made.getvalue()


@pytest.fixture
def notes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with the data set acme/notes: two subsets, one of them with two splits."""
    from datasets import config

    monkeypatch.setattr(config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    files = {
        "README.md": CARD,
        "en/train-1.parquet": table("three"),
        "en/train-0.parquet": table("one", "two"),
        "en/test.parquet": table("tested"),
        "de/a.csv": b'text,n\n"eins, zwei",2\n',
        "more/c.jsonl": b'{"text": "five"}\n',
        "more/b.txt": b"four\nlines",
        "more/d.json": b'{"text": "six"}\n{"text": null}\n',
        "more/.hidden": b"hidden",
        "more/picture.png": b"\xff",
    }
    hub.make("acme/notes", files)
    return hub


def read(*addresses: str) -> list[str]:
    return list(read_documents([Path(address) for address in addresses]))


def test_addresses() -> None:
    assert parse_data(Path("hf://datasets/acme/notes")) == DataAddress(repository="acme/notes")
    whole = DataAddress(repository="acme/notes", revision="refs/pr/1", subset="en", split="test")
    assert str(whole) == "hf://datasets/acme/notes@refs%2Fpr%2F1:en:test"
    for address in (
        whole,
        DataAddress(repository="acme/notes", split="test"),
        DataAddress(repository="acme/notes", subset="en"),
        DataAddress(repository="acme/notes", revision="v1", path="a/b.c/d.parquet"),
    ):
        assert parse_data(Path(str(address))) == address
    for text in ("hf://acme/notes", "hf://datasets/notes", "hf://datasets/a/b/c:en", "hf://datasets/a/b:c/d"):
        with pytest.raises(UsageError, match="is no data set on the Hub; expected hf://datasets/OWNER/NAME"):
            parse_data(Path(text))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (":en", ["one", "two", "three"]),
        (":en:test", ["tested"]),
        (":de", ["eins, zwei"]),
        ("@main:de", ["eins, zwei"]),
        ("/en", ["tested", "one", "two", "three"]),
        ("/en/train-1.parquet", ["three"]),
        ("/more", ["four\nlines", "five", "six"]),
        ("/more/.hidden", ["hidden"]),
    ],
)
@pytest.mark.usefixtures("notes")
def test_what_an_address_names_is_read(part: str, expected: list[str]) -> None:
    assert read(NOTES + part) == expected


def test_splits_are_found_by_file_names_where_there_is_no_card(notes: Hub) -> None:
    notes.make("acme/plain", {"data/train.jsonl": b'{"text": "trained"}\n', "data/test.jsonl": b'{"text": "tested"}\n'})
    assert read("hf://datasets/acme/plain", "hf://datasets/acme/plain::test") == ["trained", "tested"]


@pytest.mark.usefixtures("notes")
def test_hub_and_machine_mix_in_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    assert read(f"{NOTES}:de", str(tmp_path / "a.txt"), f"{NOTES}:en:test") == ["eins, zwei", "here", "tested"]


def test_only_the_column_is_fetched_and_a_few_requests_at_a_time(notes: Hub) -> None:
    made = io.BytesIO()
    columns = {"image": [os.urandom(1000) for _ in range(20_000)], "text": [f"text {n}" for n in range(20_000)]}
    parquet.write_table(pa.table(columns), made, row_group_size=5000, compression="none")
    notes.make("acme/large", {"a.parquet": made.getvalue()})
    notes.sent_bytes = 0
    documents = read_documents([Path("hf://datasets/acme/large/a.parquet")])
    assert next(documents) == "text 0"
    assert notes.sent_bytes < 10_000_000
    assert sum(1 for _ in documents) == 19_999


def test_size_is_that_of_the_files(notes: Hub) -> None:
    files = notes.repositories["acme/notes"].head()
    assert size_bytes([Path(f"{NOTES}:en")]) == len(files["en/train-0.parquet"]) + len(files["en/train-1.parquet"])


def test_what_is_pinned_stays_as_it_was(notes: Hub) -> None:
    (fixed,) = pinned([Path(f"{NOTES}:en:test")])
    repository = notes.repositories["acme/notes"]
    assert str(fixed).endswith(f"notes@{repository.branches['main']}:en:test")
    repository.commit("main", "changed", {**repository.head(), "en/test.parquet": table("changed")})
    assert read(f"{NOTES}:en:test") == ["changed"]
    assert read(str(fixed)) == ["tested"]
    assert pinned([fixed]) == (fixed,)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        (NOTES, "Config name is missing. Please pick one among the available configs: ['en', 'de']"),
        (f"{NOTES}:fr", "BuilderConfig 'fr' not found. Available: ['en', 'de']"),
        (f"{NOTES}:en:validation", "no split 'validation'; there are train, test"),
        (f"{NOTES}/fr", "no such file or folder"),
        (f"{NOTES}/more/picture.png", "not UTF-8"),
        (f"{NOTES}@v2:en", "no such revision"),
        ("hf://datasets/acme/nothing", "no such repository"),
        ("hf://acme/notes", "is no data set on the Hub"),
    ],
)
@pytest.mark.usefixtures("notes")
def test_what_is_not_there_is_refused(address: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(address)
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_broken_tables_are_named_by_their_address(notes: Hub) -> None:
    notes.make(
        "acme/broken", {"cut.parquet": table("one", "two")[:-10], "b.csv": b"text\na, b\n", "c.csv": b"body\nx\n"}
    )
    for name, says in (("cut.parquet", "cannot be read"), ("b.csv", "line 2: 2 fields"), ("c.csv", "there are 'body'")):
        with pytest.raises(UsageError, match=rf"hf://datasets/acme/broken/{name}.*{says}"):
            read(f"hf://datasets/acme/broken/{name}")


def test_code_is_never_run_and_files_elsewhere_are_not_read(notes: Hub, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    notes.make("acme/script", {"script.py": code, "train.jsonl": b'{"text": "x"}\n'})
    with pytest.raises(UsageError, match=r"scripts are no longer supported, but found script\.py"):
        read("hf://datasets/acme/script")
    outside = b"---\nconfigs:\n- config_name: a\n  data_files: hf://datasets/acme/notes/de/a.csv\n---\n"
    notes.make("acme/outside", {"README.md": outside, "train.csv": b"text\nx\n"})
    with pytest.raises(UsageError, match=r"which is no file of this data set|don.t belong to acme/outside"):
        read("hf://datasets/acme/outside")
    notes.make("acme/pickles", {"train.pkl": b"x", "pictures/train.png": b"x"})
    with pytest.raises(UsageError):
        read("hf://datasets/acme/pickles")
    assert read("hf://datasets/acme/script/train.jsonl") == ["x"]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, "wants a valid token (401)"),
        (403, "may not do this (403): told to fail"),
        (429, "limits requests (429)"),
        (500, "is in trouble (500)"),
    ],
)
@pytest.mark.parametrize("pattern", ["GET /api/datasets", "GET /datasets/.*train-1.parquet"])
def test_every_answer_is_one_line(notes: Hub, pattern: str, status: int, says: str) -> None:
    notes.fail(pattern, status=status, headers={"Retry-After": "7"} if status == 429 else {})
    documents = read_documents([Path(f"{NOTES}:en")])
    with pytest.raises(FlexctlError) as caught:
        list(documents)
    error = caught.value
    assert says in error.message
    assert "\n" not in error.message
    assert "kept" not in str(error.hint)
    assert {401: "hf auth login", 403: "may read acme", 429: "in 7 s", 500: "again later"}[status] in str(error.hint)


def test_reading_goes_on_after_a_broken_connection(notes: Hub) -> None:
    notes.fail("GET /datasets/.*train-1.parquet", cut=100, times=1)
    assert read(f"{NOTES}:en") == ["one", "two", "three"]


def test_private_and_gated_data_sets(notes: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(f"{NOTES}:de") == ["eins, zwei"]
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    repository = notes.repositories["acme/notes"]
    repository.gated = True
    with pytest.raises(FlexctlError, match="its owner grants access one by one"):
        read(f"{NOTES}:de")
    repository.gated, repository.private = False, True
    with pytest.raises(UsageError, match="a private one that is not yours"):
        read(f"{NOTES}:de")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert read(f"{NOTES}:de") == ["eins, zwei"]


def test_offline_is_respected(notes: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    notes.requests.clear()
    with pytest.raises(FlexctlError, match="HF_HUB_OFFLINE is set") as caught:
        read(f"{NOTES}:de")
    assert "unset HF_HUB_OFFLINE" in str(caught.value.hint)
    assert notes.requests == []


@pytest.mark.usefixtures("notes")
def test_nothing_is_kept_and_nobody_else_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from datasets import config, load

    asked: list[str] = []
    monkeypatch.setattr(load, "get_session", lambda: asked.append("counted"))
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert read(f"{NOTES}:en", f"{NOTES}:de") == ["one", "two", "three", "eins, zwei"]
    assert asked == []
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "datasets").exists()
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.read_bytes()]
    assert all(path.read_bytes() == CARD or path.suffix == ".TAG" for path in kept)
    assert capfd.readouterr() == ("", "")


def test_a_table_needs_no_datasets_library_and_files_of_the_machine_no_hub(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(table("one"))
    code = """
import sys
from pathlib import Path
from flexctl.text.documents import read_documents
assert not {"pyarrow", "datasets", "huggingface_hub"} & set(sys.modules)
assert list(read_documents([Path("a.parquet")])) == ["one"]
assert not {"datasets", "pandas", "huggingface_hub"} & set(sys.modules)
"""
    root = Path(client.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(root)})


def test_train_and_evaluate_as_from_files(notes: Hub, anchor: Path, terminal: Terminal) -> None:
    texts = [f"article {number} says that {number * number} is a square" for number in range(60)]
    half = len(texts) // 2
    parts = {"data/train-0.parquet": table(*texts[:half]), "data/train-1.parquet": table(*texts[half:])}
    notes.make("acme/squares", {**parts, "data/test.parquet": table(*texts[:5])})
    for name, content in notes.repositories["acme/squares"].head().items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    settings = ("--anchor", anchor, "--max-steps", "1", "--seq-len", "16", "--batch-tokens", "64")
    there = terminal.json("train-expert", "--data", "hf://datasets/acme/squares", *settings)
    Path("data/test.parquet").rename("test.parquet")
    here = terminal.json("train-expert", "--data", "data", "--name", "squares", "-o", "here.st", *settings)
    assert there["name"] == "squares"
    assert there["digest"] == here["digest"]
    scores = [
        terminal.json("evaluate", anchor, "--data", f"squares={data}")["perplexity"]
        for data in ("hf://datasets/acme/squares::test", "test.parquet")
    ]
    assert scores[0] == scores[1]
    assert scores[0]["squares"]["documents"] == 5
    assert len(text_files([Path("hf://datasets/acme/squares")])) == 2
