"""evaluate --report: the page shows what evaluate found, what the bundle says, and the texts' beginnings."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from reports import page_of

import flexctl.evaluation.report.charts as charts
from flexctl.cli.app import main
from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.errors import UsageError
from flexctl.evaluation.report.words import bits, percent, signed
from flexctl.text.documents import read_documents

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

PAGE = Path("report.html")


def report(bundle: Path, texts: Any, **settings: Any) -> EvaluateResult:
    data = (f"public={texts.public_test}", f"code={texts.code_test}", f"sums={texts.sums_test}")
    defaults = {"data": data, "seq_len": 64, "threads": 1, "report": PAGE}
    return evaluate(EvaluateConfig(bundle=bundle, **{**defaults, **settings}))


def test_page_shows_what_was_found(merged: Path, anchor: Path, texts: Any) -> None:
    result = report(merged, texts)
    alone = report(anchor, texts, report=None)
    assert result.report == PAGE
    page = page_of(PAGE)
    assert page.heading == "tiny-olmo2 with code, sums"
    scores = page.table("Scores, domain by domain")
    for name, score in result.perplexity.items():
        assert score.bits_per_byte_low is not None
        assert score.bits_per_byte_high is not None
        before = alone.perplexity[name].bits_per_byte
        found, interval, public, change, *_ = scores[name]
        assert found == bits(score.bits_per_byte)
        assert interval == f"{bits(score.bits_per_byte_low)} to {bits(score.bits_per_byte_high)}"
        assert float(public) == pytest.approx(before, abs=0.0006)
        assert change.startswith(percent((score.bits_per_byte - before) / before))
    left_out = page.table("Scores without each expert, as a table")
    assert list(left_out) == list(result.ablation) == ["code", "sums"]
    for name, row in result.ablation.items():
        assert [cell[:5] for cell in left_out[name]] == [bits(value) for value in row.values()]
    swept = page.table("Scores by active experts, as a table")
    assert {int(k): [float(cell[:5]) for cell in row] for k, row in swept.items()} == {
        k: [round(value, 3) for value in row.values()] for k, row in result.top_k.items()
    }
    assert "Merging code and sums lowers the mean over their own texts" in page.text
    assert page.charts == 2 + 3 + 3
    for cell in [cell for row in left_out.values() for cell in row]:
        change, low, high = map(float, re.findall(r"[-+]?\d\.\d{3}", cell.replace("\u2212", "-"))[1:4])
        assert low <= change <= high


def test_excerpts_are_the_texts_beginnings(merged: Path, texts: Any) -> None:
    report(merged, texts)
    for excerpt, folder in zip(page_of(PAGE).excerpts, (texts.public_test, texts.code_test), strict=False):
        beginning = "\n\n".join(read_documents([folder]))
        assert len(excerpt) > 100
        assert beginning.startswith(excerpt)


def test_several_short_documents_make_an_excerpt(tmp_path: Path, merged: Path, texts: Any) -> None:
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} + {i} = {2 * i}"}) + "\n" for i in range(9))
    )
    report(merged, texts, data=(f"sums={tmp_path / 'lines.jsonl'}",))
    (excerpt,) = page_of(PAGE).excerpts
    assert excerpt == "\n\n".join(f"{i} + {i} = {2 * i}" for i in range(9))


def test_same_inputs_give_the_same_page(
    merged: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report(merged, texts)
    first = PAGE.read_bytes()
    report(merged, texts, overwrite=True)
    assert PAGE.read_bytes() == first
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    report(merged, texts, overwrite=True)
    assert PAGE.read_bytes() == first
    assert str(tmp_path).encode() not in first
    assert str(merged).encode() not in first


def test_anchor_and_expert_have_pages(anchor: Path, experts: dict[str, Path], texts: Any) -> None:
    report(anchor, texts)
    page = page_of(PAGE)
    assert page.heading == "tiny-olmo2 alone"
    assert "tiny-olmo2 alone scores" in page.text
    report(experts["code"], texts, anchor=anchor, overwrite=True)
    page = page_of(PAGE)
    assert page.heading == "tiny-olmo2 with code"
    assert "Adding code lowers code text" in page.text
    assert list(page.table("Scores without each expert, as a table")) == ["code"]


def test_lineage_is_the_bundle_s(tmp_path: Path, anchor: Path, experts: dict[str, Path], texts: Any) -> None:
    whole = tmp_path / "whole"
    merge(MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=whole))
    remove(RemoveConfig(names=("sums",), source=whole, output=tmp_path / "rest", tombstone=True))
    result = report(tmp_path / "rest", texts, without=("code",))
    page = page_of(PAGE)
    assert result.digest in page.text
    assert "left out of this evaluation" in page.text
    assert "There is no closed expert to leave out." in page.text
    removed = json.loads((tmp_path / "rest/flexctl.json").read_text())["removed"]
    assert [stone["name"] for stone in removed] == ["sums"]
    assert removed[0]["digest"] in page.text


def test_baselines_are_on_the_page_with_intervals(tmp_path: Path, merged: Path, anchor: Path, texts: Any) -> None:
    for name in ("code", "sums"):
        shutil.copytree(anchor, tmp_path / "dense" / name)
    result = report(merged, texts, baselines=tmp_path / "dense")
    rows = page_of(PAGE).table("Scores of simpler ways, as a table")
    assert list(rows) == list(result.baselines)
    assert [cell[:5] for cell in rows["soup"]] == [bits(value) for value in result.baselines["soup"].values()]
    assert all(" to " in cell for cell in rows["soup"])


def test_another_model_and_tasks_are_on_the_page(merged: Path, anchor: Path, texts: Any) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    items = [{"question": f"{i} + {i}", "choices": [f"= {2 * i}", "= none"], "answer": 0} for i in range(4)]
    Path("sums_quiz.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    result = report(merged, texts, compare=anchor, tasks=(Path("sums_quiz.jsonl"),))
    assert result.compare is not None
    page = page_of(PAGE)
    for name, row in page.table("This model beside the other").items():
        found = result.compare.domains[name]
        assert found.difference_low is not None
        assert found.difference_high is not None
        assert row[:3] == [
            bits(result.perplexity[name].bits_per_byte),
            bits(found.bits_per_byte),
            signed(found.difference),
        ]
        assert row[3].startswith(f"{signed(found.difference_low)} to {signed(found.difference_high)}")
        assert row[4:] == [str(found.documents_better), str(found.documents_worse)]
    moved = next(rows for caption, rows in page.tables.items() if "single documents" in caption)
    assert moved.keys() == {row.domain for row in result.compare.moved}
    assert "anchor tiny-olmo2 alone, 1 of 1 expert active for a token" in page.text
    assert result.compare.digest in page.text
    assert f"Beside another model (anchor, {result.compare.digest[7:19]})" in page.text
    task = result.tasks["sums_quiz"]
    row = page.table("Scores, task by task")["sums_quiz acc"]
    assert (row[0], row[2:]) == (bits(task.metrics["acc"]), [bits(task.stderr["acc"]), "0.500", "4", "0"])
    assert task.digest in page.text
    assert page.charts == 2 + 3 + 3 + 2
    assert str(anchor) not in PAGE.read_text(encoding="utf-8")
    excerpts = " ".join(" ".join(page.excerpts).split())
    elsewhere = [row.words for row in result.compare.moved if row.words not in excerpts]
    assert elsewhere
    assert not any(words in page.text for words in elsewhere)


def test_the_page_is_drawn_again_from_results_json(tmp_path: Path, merged: Path, anchor: Path, texts: Any) -> None:
    shutil.copytree(merged, tmp_path / "own")
    first = report(tmp_path / "own", texts, compare=anchor)
    assert first.results is not None
    again = evaluate(EvaluateConfig(results_from=first.results, report=Path("again.html")))
    assert (again.perplexity, again.ablation_change) == (first.perplexity, first.ablation_change)
    pages = [
        re.split('<section aria-labelledby="(?:excerpts|measured)">', path.read_text())
        for path in (PAGE, again.report or PAGE)
    ]
    assert [pages[0][0], pages[0][2]] == [pages[1][0], pages[1][2]]
    assert pages[0][1] != pages[1][1]
    assert "drawn from results" in pages[1][1]


def test_results_need_nothing_to_score(texts: Any) -> None:
    for settings in ({"data": (str(texts.code_test),)}, {"bundle": Path("merged")}, {"ablate": True}):
        with pytest.raises(UsageError, match=f"{next(iter(settings))}: "):
            evaluate(EvaluateConfig(results_from=Path("results.json"), **settings))


def test_an_existing_file_stays_unless_told_otherwise(merged: Path, texts: Any) -> None:
    PAGE.write_text("mine")
    with pytest.raises(UsageError, match=r"report: report\.html exists"):
        report(merged, texts)
    assert PAGE.read_text() == "mine"
    report(merged, texts, overwrite=True)
    assert PAGE.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert [item.name for item in Path().iterdir()] == ["report.html"]


def test_without_matplotlib_it_is_refused_before_the_work(texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="report: needs matplotlib"):
        report(Path("nowhere"), texts)


def test_on_the_command_line(merged: Path, texts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    line = [
        "evaluate",
        str(merged),
        "--data",
        f"code={texts.code_test}",
        "--report",
        "new/report.html",
        "--threads",
        "1",
    ]
    assert main([*line, "-q"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "report: new/report.html"
    assert main([*line, "--overwrite", "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == "new/report.html"
    assert main([*line, "-q"]) == 2
    results = json.loads((merged / "results.json").read_text())
    assert "report" not in results
