"""results.json: figures that can be read again, without paths and texts; the page is drawn from it alone."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reports import MERGED, draw, example_report

from flexctl.bundle.runnable import open_runnable
from flexctl.errors import UsageError
from flexctl.evaluation.figures import DomainScore, Estimate, Figures
from flexctl.evaluation.lineage import lineage
from flexctl.evaluation.records import read_results, write_results
from flexctl.evaluation.report import render
from flexctl.runtime import SILENT


def told() -> Figures:
    """Return an example whose other model has a path, and documents that begin with words."""
    found = example_report()
    assert found.compare is not None
    moved = [dataclasses.replace(document, words="private words") for document in found.compare.moved]
    return dataclasses.replace(found, compare=dataclasses.replace(found.compare, path=Path("/home/me"), moved=moved))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = write_results(tmp_path, told(), SILENT)
    assert path == tmp_path / "results.json"
    return path


def test_figures_are_read_as_they_were_but_for_path_and_words(file: Path) -> None:
    assert read_results(file) == example_report()
    text = file.read_text()
    assert "private" not in text
    assert "/home/me" not in text


def test_every_interval_stands_in_it(file: Path) -> None:
    found = json.loads(file.read_text())
    for rows in (*found["ablation_change"].values(), *found["top_k_change"].values(), found["public_alone_change"]):
        assert {frozenset(change) for change in rows.values()} == {frozenset(("value", "low", "high"))}
    assert found["ablation_change"]["code"]["code"]["value"] == 4.508 - MERGED["code"]
    assert set(found["baselines_change"]["anchor"]) == set(MERGED)
    assert found["tasks"]["arc_easy"]["intervals"]["acc"]["low"] == 0.46 - 0.096


def test_domains_keep_their_order(file: Path) -> None:
    assert list(read_results(file).perplexity) == list(MERGED)


def test_the_page_is_drawn_from_it_alone(file: Path) -> None:
    page = render(read_results(file))
    assert page == draw(excerpts=())
    assert "drawn from results, which hold no text" in page


def test_what_is_no_number_is_none_again(tmp_path: Path) -> None:
    score = dataclasses.replace(example_report().perplexity["code"], perplexity=math.inf)
    path = write_results(tmp_path, example_report(perplexity={**example_report().perplexity, "code": score}), SILENT)
    assert path is not None
    assert math.isnan(read_results(path).perplexity["code"].perplexity)


def test_what_json_prints_is_read_too(tmp_path: Path) -> None:
    printed = {"schema_version": 1, "command": "evaluate", "path": "merged", **dataclasses.asdict(told())}
    (tmp_path / "printed.json").write_text(json.dumps(printed, default=str))
    assert read_results(tmp_path / "printed.json") == example_report()


def without(name: str) -> Any:
    return lambda found: found.pop(name)


REFUSED: dict[str, tuple[Any, str]] = {
    "earlier version": (without("lineage"), "lineage is missing"),
    "other schema": (lambda found: found.update(schema_version=2), "has no schema_version 1"),
    "text": (
        lambda found: found["perplexity"]["code"].update(nll="x"),
        r"perplexity\.code\.nll is 'x'; expected float",
    ),
    "no object": (lambda found: found.update(ablation=[1]), r"ablation is \[1\]; expected dict"),
    "no number": (lambda found: found.update(top_k={"x": {}}), "a name in top_k is no number"),
    "domain lost": (lambda found: found["public_alone"].pop("news"), "public_alone has no 'news'"),
    "row lost": (lambda found: found["ablation"]["code"].pop("news"), r"ablation\.code has no 'news'"),
    "change lost": (lambda found: found["baselines_change"].pop("anchor"), "baselines_change has no 'anchor'"),
    "expert lost": (lambda found: found["routing"]["code"].pop("math"), r"routing\.code has no 'math'"),
    "member lost": (lambda found: found["lineage"]["members"].pop(), r"lineage\.members has no 'news'"),
    "layer lost": (lambda found: found["routing_layers"]["code"]["math"].pop(), "rows of routing_layers differ"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_together_is_refused_in_one_line(file: Path, fault: str) -> None:
    change, says = REFUSED[fault]
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=says) as caught:
        read_results(file)
    assert caught.value.field == "results_from"
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("data", [b"[]", b"{", b"\xff", b'{"schema_version": 1, "schema_version": 1}'])
def test_what_is_no_results_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        read_results(path)
    with pytest.raises(UsageError, match="is missing"):
        read_results(tmp_path / "nowhere.json")


def test_no_torch_is_needed(file: Path) -> None:
    program = (
        "import sys; from flexctl.cli.app import main\n"
        f"code = main(['evaluate', '--from', {str(file)!r}, '--report', {str(file.parent / 'page.html')!r}])\n"
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (file.parent / "page.html").read_text(encoding="utf-8") == draw(excerpts=())
    assert done.stdout.splitlines()[0].startswith(f"{file}: public, code, math, news")
    assert "-0.006 ?" in done.stdout


def test_another_model_is_told_by_what_is_in_it(merged: Path, anchor: Path) -> None:
    found = lineage(open_runnable(merged, anchor).bundles, ("code",))
    assert (found.kind, found.title) == ("merged", "tiny-olmo2 with code, sums")
    assert [member.left_out for member in found.members] == [False, True, False]
    assert str(merged) not in repr(found)


def test_one_document_has_no_interval() -> None:
    score = DomainScore(
        nll=1.0, perplexity=2.7, bits_per_byte=1.4, bits_per_byte_low=None, bits_per_byte_high=None,
        tokens=9, bytes=30, documents=1,
    )  # fmt: skip
    assert score.estimate == Estimate(value=1.4)
