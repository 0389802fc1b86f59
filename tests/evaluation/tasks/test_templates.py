"""Templates: what a model is asked, what counts as right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexctl.errors import UsageError
from flexctl.evaluation.tasks.files import Items, TaskFile
from flexctl.evaluation.tasks.templates import task_config


def config(item: dict[str, Any], name: str = "task") -> dict[str, Any]:
    return task_config(
        TaskFile(name=name, path=Path(f"{name}.jsonl"), digest="", items=Items([item]), examples=Items())
    )


def metrics(found: dict[str, Any]) -> list[str]:
    return [metric["metric"] for metric in found["metric_list"]]


CHOICE = {"question": "Which is wet?", "choices": ["sand", "water"], "answer": 1}


def test_questions_with_choices() -> None:
    found = config(CHOICE)
    assert found["doc_to_text"](CHOICE) == "Question: Which is wet?\nAnswer:"
    assert found["doc_to_text"]({**CHOICE, "context": "It rains."}) == "It rains.\nQuestion: Which is wet?\nAnswer:"
    assert (found["output_type"], found["num_fewshot"]) == ("multiple_choice", 0)
    assert metrics(found) == ["acc", "acc_norm"]


@pytest.mark.parametrize("name", ["hellaswag_activitynet", "basic_skills_pattern"])
def test_texts_to_be_continued(name: str) -> None:
    assert config(CHOICE, name)["doc_to_text"](CHOICE) == "Which is wet?"


def test_blank_is_filled_in_and_the_rest_is_scored() -> None:
    item = {"question": "The _ is wet, as ever.", "choices": ["sand", "water"], "answer": 1}
    found = config(item, "winogrande")
    assert found["doc_to_choice"](item) == ["The sand", "The water"]
    assert found["doc_to_target"](item) == "is wet, as ever."
    assert found["doc_to_text"](item) == 1
    assert metrics(found) == ["acc"]
    with pytest.raises(UsageError, match=r"winogrande\.jsonl: \"question\" of item 1 has no single _"):
        config(CHOICE, "winogrande")


def score(item: dict[str, Any], answer: str) -> Any:
    found = config(item)
    result = found["process_results"](item, [answer, (-2.0, False)])
    assert list(result) == metrics(found)
    reference = item[found["doc_to_target"]]
    assert result["bits_per_byte"] == (-2.0, len(reference.encode()))
    return result[metrics(found)[0]]


SHORT = {"prompt": "who wrote it", "answer": "Emily Bront\u00eb", "answers": ["Emily Bront\u00eb", "Bront\u00eb"]}
WORKED = {"prompt": "Two and two?", "answer": "4", "solution": "2 + 2 = 4\n#### 4"}
PLAIN = {"prompt": "the last word was", "answer": "summer"}
BODY = {"prompt": "def f(x):\n", "answer": "    return x\n", "entry_point": "f", "test": "assert f(1) == 1"}
DESCRIBED = {"prompt": "Return x.", "answer": "def f(x):\n    return x", "test_list": ["assert f(1) == 1"]}


@pytest.mark.parametrize(
    ("item", "prompt"),
    [
        (SHORT, "Question: who wrote it\nAnswer:"),
        ({**SHORT, "prompt": "Passage.\nQuestion: who?\nAnswer:"}, "Passage.\nQuestion: who?\nAnswer:"),
        (WORKED, "Question: Two and two?\nAnswer:"),
        (PLAIN, "the last word was"),
        (BODY, "def f(x):"),
        (DESCRIBED, '"""\nReturn x.\n\nassert f(1) == 1\n"""'),
    ],
)
def test_prompts_for_generated_answers(item: dict[str, Any], prompt: str) -> None:
    assert config(item)["doc_to_text"](item) == prompt


@pytest.mark.parametrize(
    ("item", "answer", "right"),
    [
        (SHORT, " Bront\u00eb.", 1.0),
        (SHORT, " Charlotte Bront\u00eb", 0.0),
        (WORKED, " 1 + 3 makes 4.0", 1.0),
        (WORKED, " 4 or 5", 0.0),
        (WORKED, " four", 0.0),
        (PLAIN, " summer, and then", 1.0),
        (PLAIN, " the summer", 0.0),
        (BODY, "    return x", 1.0),
    ],
)
def test_scores_of_generated_answers(item: dict[str, Any], answer: str, right: float) -> None:
    assert score(item, answer) == right


def test_code_is_compared_as_text_and_never_run(tmp_path: Path) -> None:
    told = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for item in (BODY, DESCRIBED):
        assert metrics(config(item)) == ["edit_similarity", "bits_per_byte"]
        assert 0 < score(item, "    return y") < 1
        assert 0 < score(item, told) < 0.5
    assert not (tmp_path / "ran").exists()
