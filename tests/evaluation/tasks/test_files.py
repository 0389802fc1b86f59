"""Task files: what is read, and what is refused in one line that names file, line and field."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from flexctl.errors import UsageError
from flexctl.evaluation.tasks.files import file_digest, read_task_file, task_files

CHOICE = {"id": "q-0", "question": "Which is wet?", "choices": ["sand", "water"], "answer": 1}
PROMPT = {"id": "p-0", "prompt": "one two", "answer": "three"}


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def test_items_keep_their_order_and_all_their_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "wet.jsonl", CHOICE, {**CHOICE, "id": 7, "subject": "rain"}, {**CHOICE, "answer": 0})
    task = read_task_file(file)
    assert (task.name, task.path, task.has_choices) == ("wet", file, True)
    assert [item["id"] for item in task.items] == ["q-0", "7", "q-0"]
    assert task.items[1]["subject"] == "rain"
    assert [item["answer"] for item in task.items] == [1, 1, 0]
    assert list(task.items.features) == ["id", "question", "choices", "answer", "subject"]
    assert task.examples == []


def test_items_without_id_have_their_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"prompt": "a\u2028b", "answers": ["x", "y"]}\n', encoding="utf-8")
    (item,) = read_task_file(file).items
    assert (item["id"], item["prompt"], item["answer"]) == ("2", "a\u2028b", "x")


def test_digest_is_the_file_s_own_hash(tmp_path: Path) -> None:
    file = write(tmp_path / "wet.jsonl", CHOICE)
    alone = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_task_file(file).digest == alone
    pool = write(tmp_path / "wet_dev.jsonl", {**CHOICE, "id": "d-0"})
    assert read_task_file(file).digest not in (alone, file_digest([pool]))
    assert read_task_file(file).digest == file_digest([pool, file])


def test_digest_tells_files_of_one_name_apart(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", CHOICE)
    files = [tmp_path / "train" / "a.jsonl", tmp_path / "test" / "a.jsonl"]
    before = file_digest(files)
    write(files[0], PROMPT)
    assert file_digest(files) != before


@pytest.mark.parametrize("ending", ["dev", "fewshot"])
def test_examples_stand_beside_the_task(tmp_path: Path, ending: str) -> None:
    file = write(tmp_path / "wet.jsonl", CHOICE)
    pool = write(tmp_path / f"wet_{ending}.jsonl", {**CHOICE, "id": "d-0"})
    assert [item["id"] for item in read_task_file(file).examples] == ["d-0"]
    assert task_files(tmp_path) == [file]
    assert task_files(pool) == [pool]
    file.unlink()
    assert task_files(tmp_path) == [pool]


def test_folder_with_yaml_files_holds_no_other_tasks(tmp_path: Path) -> None:
    first, second = write(tmp_path / "b.jsonl", CHOICE), write(tmp_path / "a.jsonl", PROMPT)
    assert task_files(tmp_path) == [second, first]
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.yaml").write_text("task: c")
    assert task_files(tmp_path) == [tmp_path / "inner" / "c.yaml"]


WRONG: list[tuple[Any, str]] = [
    ([1], "is no JSON object"),
    ({**CHOICE, "choices": ["one"]}, '"choices" holds 1'),
    ({**CHOICE, "choices": ["one", ""]}, '"choices" is'),
    ({**CHOICE, "choices": "ab"}, '"choices" is'),
    ({**CHOICE, "answer": 2}, '"answer" is 2; expected the index of a choice, 0 to 1'),
    ({**CHOICE, "answer": -1}, '"answer" is -1'),
    ({**CHOICE, "answer": True}, '"answer" is True'),
    ({**CHOICE, "answer": "1"}, "\"answer\" is '1'"),
    ({**CHOICE, "question": " "}, '"question" is'),
    ({**CHOICE, "context": None}, '"context" is None'),
    ({"prompt": "a"}, '"answer" is None'),
    ({"answer": "a"}, '"prompt" is None'),
    ({**PROMPT, "answer": 3}, '"answer" is 3'),
    ({**PROMPT, "answers": []}, '"answers" is []'),
    ({**PROMPT, "test_list": [1]}, '"test_list" is [1]'),
    (PROMPT, '"choices" must be in every line'),
    ({**CHOICE, "context": "rain"}, '"context" must be in every line'),
]


@pytest.mark.parametrize(("item", "says"), WRONG, ids=[says for _, says in WRONG])
def test_wrong_lines_are_refused(tmp_path: Path, item: Any, says: str) -> None:
    file = write(tmp_path / "wet.jsonl", CHOICE, item)
    with pytest.raises(UsageError) as caught:
        read_task_file(file)
    assert f"{file}, line 2: " in caught.value.message
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_what_is_no_task_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "notes.txt").write_text("no task")
    (tmp_path / "folder").mkdir()
    for name, says in (("empty", "no item"), ("binary", "cannot be read"), ("broken", "line 1: not JSON")):
        with pytest.raises(UsageError, match=says):
            read_task_file(tmp_path / f"{name}.jsonl")
    for name, says in (("notes.txt", "no task file"), ("nowhere", "does not exist"), ("folder", "no .jsonl")):
        with pytest.raises(UsageError, match=says):
            task_files(tmp_path / name)


def test_a_byte_order_mark_is_no_part_of_the_first_item(tmp_path: Path) -> None:
    file = write(tmp_path / "wet.jsonl", CHOICE)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert [item["id"] for item in read_task_file(file).items] == ["q-0"]


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"prompt": "a", "answer": "b", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"deep\.jsonl, line 1: not JSON"):
        read_task_file(file)
