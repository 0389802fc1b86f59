"""evaluate --tasks: the harness over any bundle; leaving out equals removing; what is kept, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from flexctl.bundle import open_merged
from flexctl.cli.app import main
from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


def numbers(count: int) -> list[dict[str, Any]]:
    """Questions on the continuation of the tiny models' own texts, each with its id."""
    texts = tiny.make_texts("sums", count, seed=3)
    choices = [text.splitlines()[0] for text in texts]
    return [
        {"id": f"n-{i}", "question": text[:40], "choices": [choices[i], choices[i - 1], "nobody"], "answer": 0}
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "tasks"
    path.mkdir()
    write(path / "numbers.jsonl", numbers(8))
    write(path / "ends.jsonl", [{"id": "e", "prompt": "def value_index(self,", "answer": "value, index=None"}])
    return path


def write(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def run(bundle: Path, folder: Path, **settings: Any) -> EvaluateResult:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    return evaluate(EvaluateConfig(bundle=bundle, tasks=(folder,), threads=1, **settings))


def test_tasks_beside_domains(tmp_path: Path, anchor: Path, experts: dict[str, Path], folder: Path, texts: Any) -> None:
    own = tmp_path / "merged"
    merge(MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=own))
    result = run(own, folder, data=(f"code={texts.code_test}",), samples=tmp_path / "a.jsonl")
    assert list(result.tasks) == ["ends", "numbers"]
    assert (result.tasks["numbers"].items, result.tasks["numbers"].shots) == (8, 0)
    assert set(result.tasks["numbers"].metrics) == {"acc", "acc_norm"}
    assert set(result.tasks["ends"].metrics) == {"exact_match", "bits_per_byte"}
    assert list(result.perplexity) == ["code"]
    kept = json.loads((own / "results.json").read_text())
    assert kept["tasks"]["numbers"]["metrics"] == result.tasks["numbers"].metrics
    assert kept["tasks"]["numbers"]["digest"] == result.tasks["numbers"].digest
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    found = {record["item"]: record for record in records if record.get("task") == "numbers"}
    assert list(found) == [f"n-{i}" for i in range(8)]
    assert sum(record["acc"] for record in found.values()) / 8 == result.tasks["numbers"].metrics["acc"]
    assert [record["domain"] for record in records if "domain" in record] == ["code"] * 8
    assert isinstance(records[8]["generated"], str)
    assert "nobody" not in (tmp_path / "a.jsonl").read_text()


@pytest.mark.parametrize("top_k", [1, 2])
def test_leaving_out_equals_removing(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], folder: Path, top_k: int
) -> None:
    whole = tmp_path / "merged"
    merge(MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=whole, top_k=top_k))
    left_out = run(whole, folder, without=("code",), samples=tmp_path / "left.jsonl")
    remove(RemoveConfig(names=("code",), source=whole, output=tmp_path / "removed"))
    removed = run(tmp_path / "removed", folder, samples=tmp_path / "removed.jsonl")
    run(whole, folder, samples=tmp_path / "whole.jsonl")
    names = ("left", "removed", "whole")
    totals = [
        [
            total
            for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()
            for total in json.loads(line)["log_likelihoods"]
        ]
        for name in names
    ]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    assert totals[0] != pytest.approx(totals[2], abs=1e-2)
    assert left_out.tasks["numbers"] == removed.tasks["numbers"]


def test_tasks_alone(anchor: Path, folder: Path) -> None:
    result = run(anchor, folder / "numbers.jsonl", limit=3, shots=2)
    assert (result.perplexity, result.routing, result.post_norm_ratio) == ({}, {}, None)
    assert (result.tasks["numbers"].items, result.tasks["numbers"].shots) == (3, 2)


def test_command_line_shows_a_row_a_task(merged: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    flags = ["evaluate", str(merged), "--tasks", str(folder), "--limit", "2", "--threads", "1"]
    capfd.readouterr()
    assert main([*flags, "--json"]) == 0
    said = capfd.readouterr()
    found = json.loads(said.out)
    assert said.err == ""
    assert found["digest"] == open_merged(merged).digest
    assert found["tasks"]["numbers"]["items"] == 2
    assert main(flags) == 0
    lines = capfd.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("numbers"))
    assert re.fullmatch(r"numbers +2 +0 +- +- +\d\.\d{3} \+- \d\.\d{3} +\d\.\d{3} \+- \d\.\d{3}", row)


def test_yaml_of_the_docs_is_a_task(tmp_path: Path, anchor: Path) -> None:
    (tmp_path / "own").mkdir()
    (text,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "own" / "quiz.yaml").write_text(text)
    write(tmp_path / "own" / "quiz.jsonl", numbers(3))
    write(tmp_path / "own" / "shown.jsonl", numbers(6)[3:])
    result = run(anchor, tmp_path / "own")
    assert result.tasks[yaml.safe_load(text)["task"]].items == 3
    assert result.tasks["my_quiz"].shots == 2


def test_items_of_the_docs_are_items(tmp_path: Path) -> None:
    from flexctl.evaluation.tasks.files import read_task_file

    (lines,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for number, line in enumerate(lines.splitlines()):
        (tmp_path / f"{number}.jsonl").write_text(line)
        assert len(read_task_file(tmp_path / f"{number}.jsonl").items) == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"limit": 0}, "limit: 0 is not above 0"),
    ({"shots": -1}, "shots: -1 is below 0"),
    ({"shots": 8}, "shots: 8 is more than the 1 items"),
    ({"tasks": (Path("nowhere"),)}, "tasks: nowhere does not exist"),
    ({"ablate": True}, "ablate: there is no text to score"),
    ({"compare": Path("other")}, "compare: there is no text to score"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_wrong_settings_are_refused_before_the_bundle_is_opened(
    folder: Path, settings: dict[str, Any], says: str
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    with pytest.raises(UsageError) as caught:
        evaluate(EvaluateConfig(**{"bundle": Path("no-bundle"), "tasks": (folder,), **settings}))
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_without_the_harness_the_extra_is_named(
    folder: Path, anchor: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flexctl.evaluation.tasks.find_spec", lambda _: None)
    capfd.readouterr()
    assert main(["evaluate", str(anchor), "--tasks", str(folder)]) == 2
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "error: --tasks: lm-evaluation-harness is not installed",
        "hint: pip install 'flexctl[eval]'",
    ]
