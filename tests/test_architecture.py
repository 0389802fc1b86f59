"""docs/architecture.md says what the code says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from test_layers import LAYERS

import flexctl
from flexctl.commands import COMMANDS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def drawn_layers() -> list[set[str]]:
    """Return the parts of each floor of the picture: each box's first word, of the lowest floor all words."""
    (picture,) = re.findall(r"```\n( \+-.*?)```", PAGE, re.DOTALL)
    floors = [floor for floor in re.split(r"^ \+[-+]+\+\n", picture, flags=re.MULTILINE) if floor]
    *upper, lowest = [[box.split() for line in floor.splitlines() for box in line.split("|")] for floor in floors]
    return [*({words[0] for words in boxes if words} for boxes in upper), {word for words in lowest for word in words}]


def test_the_layers_are_those_that_imports_are_held_to() -> None:
    assert drawn_layers() == list(LAYERS)


def test_promised_fields_are_fields() -> None:
    rows = dict(re.findall(r"^\| ([a-z-]+) \| (path [a-z_ ]+) \|$", PAGE, re.MULTILINE))
    results = {row.shown: getattr(flexctl, row.result) for row in COMMANDS}
    assert len(rows) >= 9
    for command, fields in rows.items():
        assert set(fields.split()) <= {field.name for field in dataclasses.fields(results[command])}, command


def test_every_promise_names_its_tests() -> None:
    (promises,) = re.findall(r"^## 3\..*?^## 4\.", PAGE, re.DOTALL | re.MULTILINE)
    numbered = re.findall(r"^(\d)\. (.*?)(?=^\d\. |^\*\*|^$)", promises, re.DOTALL | re.MULTILINE)
    assert [int(number) for number, _ in numbered] == list(range(1, 10))
    assert all("`tests/" in text for _, text in numbered)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests|flexctl|tools|docs)/[a-z_/-]+\.[a-z]+)`", PAGE))))
def test_files_that_it_names_exist(path: str) -> None:
    assert (ROOT / path).exists()
