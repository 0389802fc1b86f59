"""Task files: questions with choices, or prompts with answers, one JSON object a line (docs/tasks.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.errors import UsageError

__all__ = ["Items", "TaskFile", "file_digest", "read_task_file", "task_files"]

_ENDING = ".jsonl"
_YAML = (".yaml", ".yml")
_POOLS = ("_dev", "_fewshot")
_TEXTS = ("context", "solution", "entry_point", "test")
_LISTS = ("answers", "test_list")
_TELLING = {"choices", *_TEXTS, *_LISTS}


class Items(list[dict[str, Any]]):
    """Items of a task, as the harness reads a data set: a list that knows its columns."""

    @property
    def features(self) -> dict[str, None]:
        """Names of all fields."""
        return {name: None for item in self for name in item}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    """One task.

    Attributes:
        name: The file's name without its ending.
        path: The file.
        digest: Of the file, and of the file of examples where there is one.
        items: Its lines, checked; all have the same fields.
        examples: Solved items for few-shot prompts, from NAME_dev.jsonl or NAME_fewshot.jsonl beside it; without
            such a file they come from ``items``.
    """

    name: str
    path: Path
    digest: str
    items: Items
    examples: Items

    @property
    def has_choices(self) -> bool:
        """Whether items have choices; otherwise they have a prompt and an answer."""
        return "choices" in self.items.features


def task_files(path: Path) -> list[Path]:
    """Return the task files behind a path: itself, or what a folder holds.

    A folder with YAML files is one of lm-evaluation-harness's own tasks, whose .jsonl files are data. Files of
    few-shot examples are left out where their task is there.

    Raises:
        UsageError: There is no such file, or none in the folder.
    """
    if path.is_file():
        if path.suffix not in (_ENDING, *_YAML):
            raise UsageError(
                f"{path} is no task file", hint="give a .jsonl or a .yaml, or a folder of them", field="tasks"
            )
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} does not exist", hint="give a task file or a folder of them", field="tasks")
    inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
    found = [file for file in inside if file.suffix in _YAML] or [file for file in inside if _is_task(file)]
    if not found:
        raise UsageError(f"no .jsonl and no .yaml in {path}", field="tasks")
    return found


def _is_task(file: Path) -> bool:
    of = [file.with_name(file.stem.removesuffix(pool) + _ENDING) for pool in _POOLS if file.stem.endswith(pool)]
    return file.suffix == _ENDING and not any(task.exists() for task in of)


def read_task_file(path: Path) -> TaskFile:
    """Return the task in a .jsonl file.

    Raises:
        UsageError: The file cannot be read, or a line is no item of the kind that the first line is.
    """
    pools = [path.with_name(f"{path.stem}{pool}{_ENDING}") for pool in _POOLS]
    pools = [pool for pool in pools if pool.is_file()][:1]
    return TaskFile(
        name=path.stem,
        path=path,
        digest=file_digest([path, *pools]),
        items=_read(path),
        examples=_read(pools[0]) if pools else Items(),
    )


def file_digest(paths: list[Path]) -> str:
    """Return ``sha256:`` and the hash of one file's bytes; of several, of their hashes by name beside the first."""
    base = paths[0].parent
    hashes = {
        Path(os.path.relpath(path, base)).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
    }
    if len(hashes) == 1:
        return f"sha256:{hashes.popitem()[1]}"
    canonical = json.dumps({"files": hashes}, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"


def _read(path: Path) -> Items:
    items = Items()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        item = _item(where, line)
        differing = (item.keys() ^ items[0].keys()) & _TELLING if items else ()
        for name in sorted(differing):
            raise UsageError(f'{where}: "{name}" must be in every line of a task or in none')
        items.append({**item, "id": str(item.get("id", number))})
    if not items:
        raise UsageError(f"{path}: no item in it")
    return items


def _item(where: str, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{where}: {line[:40]!r} is no JSON object")
    texts = {name: _text(where, record, name) for name in _TEXTS if name in record}
    lists = {name: _texts(where, record, name) for name in _LISTS if name in record}
    if "choices" in record:
        return {**record, **texts, **_choice_fields(where, record)}
    answer = lists["answers"][0] if "answers" in lists and "answer" not in record else _text(where, record, "answer")
    return {**record, **texts, **lists, "prompt": _text(where, record, "prompt"), "answer": answer}


def _choice_fields(where: str, record: Mapping[str, Any]) -> dict[str, Any]:
    choices, answer = _texts(where, record, "choices"), record.get("answer")
    if len(choices) < 2:
        raise UsageError(f'{where}: "choices" holds {len(choices)}; expected two or more')
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UsageError(f'{where}: "answer" is {answer!r}; expected the index of a choice, 0 to {len(choices) - 1}')
    return {"question": _text(where, record, "question"), "choices": choices, "answer": answer}


def _text(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f'{where}: "{name}" is {value!r}; expected text', hint="docs/tasks.md shows the fields")
    return value


def _texts(where: str, record: Mapping[str, Any], name: str) -> list[str]:
    values = record[name]
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise UsageError(f'{where}: "{name}" is {values!r}; expected a list of texts', hint="docs/tasks.md shows one")
    return values
