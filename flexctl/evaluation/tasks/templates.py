"""How a task file is put to a model and scored: its fields, and for some its name, say which template it gets.

A template becomes a task configuration of lm-evaluation-harness. The model's own code is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexctl.errors import UsageError
from flexctl.evaluation.tasks.answers import edit_similarity, first_words, last_number, same_words
from flexctl.evaluation.tasks.files import TaskFile

__all__ = ["REFERENCE_METRIC", "task_config"]

Item = Mapping[str, Any]
REFERENCE_METRIC = "bits_per_byte"
"""Of the reference answer after the prompt: what a model that is too small to answer can still be compared by."""

_CONTINUED = ("hellaswag", "basic_skills")
_BLANK = "winogrande"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Generation:
    """How to ask for text, where to stop, and how to score it.

    Attributes:
        ask: Item -> prompt.
        reference: Field with the text that a perfect model would write.
        delimiter: Between prompt and reference.
        until: Texts that end an answer.
        max_tokens: Longest answer.
        metric: Name of the score.
        score: (answer, item) -> score, 0 to 1.
    """

    ask: Callable[[Item], str]
    reference: str = "answer"
    delimiter: str = " "
    until: tuple[str, ...] = ("\n",)
    max_tokens: int = 32
    metric: str = "exact_match"
    score: Callable[[str, Item], float]


def task_config(task: TaskFile) -> dict[str, Any]:
    """Return the harness's configuration of a task file, without its data.

    Raises:
        UsageError: The task's name asks for a blank and an item has none.
    """
    shared = {
        "task": task.name,
        "test_split": "test",
        "fewshot_split": "examples" if task.examples else "test",
        "num_fewshot": 0,
    }
    return shared | (_choice_config(task) if task.has_choices else _generation_config(_generation_of(task)))


def _choice_config(task: TaskFile) -> dict[str, Any]:
    metrics = ["acc", "acc_norm"]
    config: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    if task.name.startswith(_BLANK):
        _refuse_without_blank(task)
        metrics = ["acc"]
        config |= {"doc_to_text": _answer_index, "doc_to_choice": _filled_in, "doc_to_target": _after_blank}
    else:
        config["doc_to_text"] = _as_it_is if task.name.startswith(_CONTINUED) else _question
    return config | {"metric_list": [_metric(name) for name in metrics]}


def _metric(name: str) -> dict[str, Any]:
    lower = name == REFERENCE_METRIC
    return {"metric": name, "aggregation": name if lower else "mean", "higher_is_better": not lower}


def _context(item: Item) -> str:
    return f"{item['context']}\n" if "context" in item else ""


def _question(item: Item) -> str:
    return f"{_context(item)}Question: {item['question']}\nAnswer:"


def _as_it_is(item: Item) -> str:
    return f"{_context(item)}{item['question']}"


def _refuse_without_blank(task: TaskFile) -> None:
    for number, item in enumerate(task.items, start=1):
        if item["question"].count("_") != 1:
            raise UsageError(f'{task.path}: "question" of item {number} has no single _ for the blank')


def _answer_index(item: Item) -> int:
    return int(item["answer"])


def _filled_in(item: Item) -> list[str]:
    before = _context(item) + item["question"].partition("_")[0]
    return [before + choice for choice in item["choices"]]


def _after_blank(item: Item) -> str:
    return str(item["question"].partition("_")[2].strip())


def _generation_of(task: TaskFile) -> _Generation:
    """Return the template of the first telling field that the items have."""
    return next((_GENERATIONS[field] for field in _GENERATIONS if field in task.items.features), _CONTINUATION)


def _generation_config(template: _Generation) -> dict[str, Any]:
    def score(item: Item, results: Sequence[Any]) -> dict[str, Any]:
        answer, (log_likelihood, _) = results
        size = len(item[template.reference].encode())
        return {template.metric: template.score(answer, item), REFERENCE_METRIC: (log_likelihood, size)}

    return {
        "output_type": "generate_until",
        "doc_to_text": template.ask,
        "doc_to_target": template.reference,
        "target_delimiter": template.delimiter,
        "generation_kwargs": {
            "until": list(template.until),
            "max_gen_toks": template.max_tokens,
            "do_sample": False,
        },
        "process_results": score,
        "metric_list": [_metric(template.metric), _metric(REFERENCE_METRIC)],
    }


def _prompt(item: Item) -> str:
    return str(item["prompt"])


def _code(item: Item) -> str:
    """Return code to go on with; its last line end is the model's to write, together with what follows it."""
    return _prompt(item).rstrip("\n")


def _asked(item: Item) -> str:
    prompt = item["prompt"].rstrip()
    return prompt if prompt.endswith("Answer:") else f"Question: {prompt}\nAnswer:"


def _described(item: Item) -> str:
    tests = "\n".join(item["test_list"])
    return f'"""\n{item["prompt"]}\n\n{tests}\n"""'


def _is_accepted(found: str, item: Item) -> float:
    return float(any(same_words(found, wanted) for wanted in item.get("answers", [item["answer"]])))


def _goes_on_with(found: str, item: Item) -> float:
    return float(same_words(first_words(found, len(item["answer"].split())), item["answer"]))


def _is_number(found: str, item: Item) -> float:
    wanted = last_number(item["answer"])
    return float(same_words(found, item["answer"]) if wanted is None else last_number(found) == wanted)


def _resembles(found: str, item: Item) -> float:
    return edit_similarity(found, item["answer"])


_CONTINUATION = _Generation(ask=_prompt, score=_goes_on_with)
_GENERATIONS = {
    "entry_point": _Generation(
        ask=_code,
        delimiter="\n",
        until=("\ndef ", "\nclass ", "\nif ", "\nprint", "\nassert", "\n#", "\n@"),
        max_tokens=256,
        metric="edit_similarity",
        score=_resembles,
    ),
    "test_list": _Generation(
        ask=_described,
        delimiter="\n",
        until=('\n"""', "\nassert", "\nprint", "\nif ", "\n#"),
        max_tokens=256,
        metric="edit_similarity",
        score=_resembles,
    ),
    "solution": _Generation(
        ask=_asked, reference="solution", until=("\n\n", "\nQuestion:"), max_tokens=256, score=_is_number
    ),
    "answers": _Generation(ask=_asked, score=_is_accepted),
}
