"""Tasks through the harness: figures, records, YAML files; offline, silent, and no code of theirs is run."""

from __future__ import annotations

import json
import logging
import math
import socket
import statistics
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from flexctl.errors import UsageError
from flexctl.runtime import SILENT

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

CHOICES = [
    {
        "id": f"q-{i}",
        "question": f"who walked to {place}?",
        "choices": ["the miller", "a sailor", "42"],
        "answer": i % 3,
    }
    for i, place in enumerate(("the harbour", "a quiet village", "the long road", "an empty house"))
]
PROMPTS = [
    {"id": f"p-{i}", "prompt": f"{person} walked to", "answer": "the harbour"}
    for i, person in enumerate(("the miller", "a sailor", "the old king"))
]
QUIZ: dict[str, Any] = {
    "task": "quiz",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "quiz.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    ],
    "metadata": {"version": 1.0},
}


@pytest.fixture(scope="module")
def lm(tokenizer: Any) -> Any:
    from flexctl.evaluation.tasks.model import HarnessModel

    weights = tiny.make_weights(tiny.dense_config(), ("public", "code"))
    return HarnessModel(tiny.build(weights), tokenizer, batch_tokens=1000, reporter=SILENT)


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def write_yaml(path: Path, **fields: Any) -> Path:
    write(path.parent / "quiz.jsonl", CHOICES)
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def read(*paths: Path, shots: int | None = None) -> list[Any]:
    from flexctl.evaluation.tasks.harness import read_tasks

    return read_tasks(paths, shots)


def run(path: Path, lm: Any, limit: int | None = None, shots: int | None = None) -> Any:
    from flexctl.evaluation.tasks.harness import run_task

    (task,) = read(path, shots=shots)
    return run_task(task, lm, limit)


def prompts(task: Any) -> list[str]:
    """What the model was asked, an item each."""
    return [instance.args[0] for instance in task.harness.instances if instance.idx == 0]


def test_choices_are_scored_by_their_log_likelihood(tmp_path: Path, lm: Any) -> None:
    from flexctl.evaluation.tasks.harness import run_task

    (task,) = read(write(tmp_path / "quiz.jsonl", CHOICES))
    found = run_task(task, lm, None)
    assert found.items == len(found.records) == 4
    assert prompts(task) == [f"Question: {item['question']}\nAnswer:" for item in CHOICES]
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for record, item in zip(found.records, CHOICES, strict=True):
        assert (record["task"], record["item"]) == ("quiz", item["id"])
        totals = record["log_likelihoods"]
        per_character = [total / len(choice) for total, choice in zip(totals, item["choices"], strict=True)]
        for name, values in (("acc", totals), ("acc_norm", per_character)):
            hits[name].append(float(values.index(max(values)) == item["answer"]))
            assert record[name] == hits[name][-1]
    for name, values in hits.items():
        assert found.metrics[name] == pytest.approx(statistics.mean(values))
        assert found.stderr[name] == pytest.approx(statistics.stdev(values) / 2)
    assert found.chance == pytest.approx(1 / 3)


def test_generated_answers_and_their_reference_are_scored(tmp_path: Path, lm: Any) -> None:
    found = run(write(tmp_path / "end.jsonl", PROMPTS), lm)
    assert set(found.metrics) == {"exact_match", "bits_per_byte"}
    assert set(found.stderr) == {"exact_match"}
    assert found.chance is None
    bits = -sum(record["log_likelihoods"][0] for record in found.records) / math.log(2)
    assert found.metrics["bits_per_byte"] == pytest.approx(bits / (3 * len("the harbour")))
    assert all(isinstance(record["generated"], str) for record in found.records)
    assert "walked" not in json.dumps(found.records)


def test_chance_follows_each_item_s_own_choices(tmp_path: Path, lm: Any) -> None:
    two = [{**item, "choices": item["choices"][:2], "answer": 0} for item in CHOICES]
    assert run(write(tmp_path / "mixed.jsonl", [*CHOICES[:2], *two[2:]]), lm).chance == pytest.approx(5 / 12)
    blanks = [{**item, "question": f"the miller saw _ at {item['id']}."} for item in two]
    assert run(write(tmp_path / "winogrande.jsonl", blanks), lm).chance == 0.5


def test_chance_is_unknown_where_several_choices_are_right(tmp_path: Path, lm: Any) -> None:
    several = QUIZ | {"doc_to_target": "{{[0, answer]}}", "metric_list": QUIZ["metric_list"][:1]}
    assert run(write_yaml(tmp_path / "several.yaml", **several), lm).chance is None


def test_limit_takes_the_first_items_and_a_task_runs_again(tmp_path: Path, lm: Any) -> None:
    from flexctl.evaluation.tasks.harness import run_task

    (task,) = read(write(tmp_path / "quiz.jsonl", CHOICES))
    first, whole = run_task(task, lm, 2), run_task(task, lm, None)
    assert (first.items, whole.items) == (2, 4)
    assert first.records == whole.records[:2]


def test_shots_are_other_items_or_those_of_the_file_beside_it(tmp_path: Path, lm: Any) -> None:
    from flexctl.evaluation.tasks.harness import run_task

    path = write(tmp_path / "quiz.jsonl", CHOICES)
    (task,) = read(path, shots=3)
    run_task(task, lm, None)
    for prompt, item in zip(prompts(task), CHOICES, strict=True):
        *shown, asked = prompt.split("\n\n")
        assert asked == f"Question: {item['question']}\nAnswer:"
        assert len(shown) == len(set(shown)) == 3
        assert not any(item["question"] in example for example in shown)
        assert all(example.rpartition("Answer: ")[2] in item["choices"] for example in shown)
    write(tmp_path / "quiz_dev.jsonl", [{**CHOICES[0], "question": "who came home?"}])
    (task,) = read(path, shots=1)
    run_task(task, lm, None)
    for prompt in prompts(task):
        assert prompt.startswith("Question: who came home?\nAnswer: the miller\n\nQuestion: who walked")
    with pytest.raises(UsageError, match="shots: 2 is more than the 1 items"):
        read(path, shots=2)


def test_yaml_of_the_harness_gives_what_the_template_gives(tmp_path: Path, lm: Any) -> None:
    template = run(write(tmp_path / "quiz.jsonl", CHOICES), lm)
    found = run(write_yaml(tmp_path / "own" / "quiz.yaml", **QUIZ), lm)
    assert found.metrics == template.metrics
    assert [r["log_likelihoods"] for r in found.records] == [r["log_likelihoods"] for r in template.records]


def test_yaml_includes_filters_and_shots(tmp_path: Path, lm: Any) -> None:
    base = {name: value for name, value in QUIZ.items() if name not in ("task", "metric_list")}
    write_yaml(tmp_path / "_base.yaml", **base)
    generated = {
        "include": "_base.yaml",
        "task": "numbers",
        "tag": "sums",
        "output_type": "generate_until",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "num_fewshot": 1,
        "fewshot_split": "test",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "number", "filter": [{"function": "regex", "regex_pattern": "[0-9]"}, {"function": "take_first"}]},
        ],
    }
    path = tmp_path / "numbers.yaml"
    path.write_text(yaml.safe_dump(generated))
    (task,) = read(tmp_path)
    assert (task.name, task.shots) == ("numbers", 1)
    found = run(path, lm, limit=3)
    assert set(found.metrics) == {"exact_match,strict", "exact_match,number"}
    assert (found.items, len(found.records)) == (3, 6)
    before = task.digest
    write(tmp_path / "quiz.jsonl", CHOICES[:3])
    assert read(path)[0].digest != before


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dataset_path": "ai2_arc"}, "dataset_path ai2_arc is not in local files"),
    ({"dataset_path": "./script.py"}, "is not in local files"),
    ({"dataset_kwargs": {}}, "no data_files"),
    ({"dataset_kwargs": {"data_files": "https://example.org/a.jsonl"}}, "no file"),
    ({"dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}, "no file"),
    ({"dataset_kwargs": {"data_files": "quiz.jsonl", "trust_remote_code": True}}, "trust_remote_code is refused"),
    ({"process_docs": "utils.process"}, "process_docs is refused"),
    ({"class": "utils.Task"}, "class is refused"),
    ({"unsafe_code": True}, "unsafe_code is refused"),
    ({"use_prompt": "promptsource:all"}, "use_prompt is refused"),
    ({"fewshot_config": {"process_docs": "utils.process"}}, "fewshot_config: process_docs is refused"),
    ({"metric_list": [{"metric": "code_eval"}]}, "code_eval is none of the harness's own metrics"),
    ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "acc is none of the harness's own metrics"),
    ({"metric_list": [{"metric": "acc", "aggregation": "best"}]}, "aggregation best of acc is unknown"),
    ({"metric_list": ["acc"]}, "the harness cannot use it"),
    ({"generation_kwargs": {"do_sample": True}}, "sampling is asked for"),
    ({"doc_to_text": "{{nothing}}"}, "'nothing' is undefined"),
    ({"doc_to_text": "{{''.__class__.__mro__}}"}, "unsafe"),
    ({"doc_to_text": "{% for"}, "the harness cannot use it"),
    ({"test_split": "validation"}, "the harness cannot use it"),
    ({"output_type": "telepathy"}, "telepathy"),
    ({"include": "quiz.yaml"}, "includes itself"),
    ({"include": "nowhere.yaml"}, "cannot be read"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_yaml_that_needs_code_or_the_network_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    path = write_yaml(tmp_path / "quiz.yaml", **QUIZ | changes)
    with pytest.raises(UsageError) as caught:
        read(path)
    assert str(path.parent) in caught.value.message
    assert says in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("tag", ["!function utils.text", "!!python/object/apply:os.system ['touch ran']"])
def test_tags_that_run_code_are_refused(tmp_path: Path, tag: str) -> None:
    path = write_yaml(tmp_path / "quiz.yaml", **QUIZ)
    path.write_text(path.read_text() + f"process_docs: {tag}\n")
    (tmp_path / "utils.py").write_text("from pathlib import Path\nPath('ran').touch()\ntext = None\n")
    with pytest.raises(UsageError, match=r"quiz\.yaml, line \d+: could not determine a constructor"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_later_items_that_do_not_fit_are_one_line_too(tmp_path: Path, lm: Any) -> None:
    path = write_yaml(tmp_path / "quiz.yaml", **QUIZ | {"doc_to_text": "{{choices[2 - answer * 3].upper()}}"})
    with pytest.raises(UsageError, match=r"quiz\.yaml: the harness cannot use it"):
        run(path, lm)


def test_groups_and_includes_are_no_tasks(tmp_path: Path) -> None:
    path = tmp_path / "group.yaml"
    path.write_text("group: all\ntask: [quiz]\n")
    with pytest.raises(UsageError, match="no task in"):
        read(path)
    write_yaml(tmp_path / "quiz.yaml", **QUIZ)
    assert [task.name for task in read(tmp_path)] == ["quiz"]


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "quiz.jsonl", CHOICES) for folder in ("a", "b")]
    with pytest.raises(UsageError, match=r"quiz is in .*a/quiz\.jsonl and in .*b/quiz\.jsonl"):
        read(*paths)


def test_nothing_is_said_written_or_fetched(
    tmp_path: Path, lm: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    write(tmp_path / "end.jsonl", PROMPTS)
    own = write_yaml(tmp_path / "quiz.yaml", **QUIZ)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    for path in (tmp_path / "end.jsonl", own):
        run(path, lm)
    assert capfd.readouterr() == ("", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_harness_is_left_as_it_was(tmp_path: Path, lm: Any) -> None:
    import datasets
    import lm_eval.api.task
    import lm_eval.utils

    def state() -> list[Any]:
        levels = [logging.getLogger(name).level for name in ("lm_eval", "datasets")]
        offline, bars = datasets.config.HF_HUB_OFFLINE, datasets.are_progress_bars_disabled()
        return [lm_eval.utils.env, lm_eval.api.task.tqdm, offline, bars, *levels]

    before = state()
    run(write(tmp_path / "quiz.jsonl", CHOICES), lm)
    assert state() == before
    with pytest.raises(UsageError):
        read(write_yaml(tmp_path / "quiz.yaml", **QUIZ | {"doc_to_text": "{{nothing}}"}))
    assert state() == before
