"""The folder of a run: every stage leaves an artefact there, and one that has left it is skipped."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from budgets import Budget


@dataclass(frozen=True, kw_only=True)
class Work:
    """A run's folder and its settings.

    Attributes:
        root: The folder.
        source: Directory of a dense checkpoint for the anchor; None trains one from scratch.
        encoder: Sentence encoder for encoder rows; None leaves them out.
        seed: Of everything.
    """

    root: Path
    budget: Budget
    source: Path | None = None
    encoder: str | None = None
    seed: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def anchor(self) -> Path:
        return self.root / "anchor"

    @property
    def names(self) -> list[str]:
        """The closed sets."""
        return sorted(path.name for path in (self.root / "data").iterdir() if path.name != "public")

    def train(self, name: str) -> Path:
        return self.root / "data" / name / "train.jsonl"

    def test(self, name: str) -> Path:
        return self.root / "data" / name / "test.jsonl"

    def expert(self, recipe: str, name: str) -> Path:
        return self.root / "experts" / recipe / f"{name}.st"

    def rows(self, kind: str, name: str) -> Path:
        return self.root / "rows" / kind / f"{name}.st"

    @property
    def dense(self) -> Path:
        """Folder of the baselines' ingredients."""
        return self.root / "dense"

    def stage(self, artefact: Path, make: Callable[[], Any]) -> None:
        """Make ``artefact`` unless it is there; ``make`` leaves it whole or not at all."""
        label = artefact.relative_to(self.root)
        if artefact.exists():
            say(f"{label}: there")
            return
        say(f"{label} (after {time.monotonic() - self.started:.0f} s)")
        artefact.parent.mkdir(parents=True, exist_ok=True)
        make()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes ``path`` when the block ends without an error."""
    beside = path.with_name(f"{path.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.rename(path)


def say(line: str) -> None:
    print(line, flush=True)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.rename(path)


def hold_settings(root: Path, settings: dict[str, Any]) -> None:
    """Write a run's settings down, or stop when its folder was begun with others."""
    path = root / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists() and json.loads(path.read_text()) != settings:
        sys.exit(f"{root} was begun with other settings ({path}); give another --output, or delete it")
    write_json(path, settings)


def prepare_data(source: Path, work: Work) -> None:
    """Cut the sets to the budget, documents from the beginning of each file."""
    if not (source / "public" / "train.jsonl").is_file():
        sys.exit(f"{source}/public/train.jsonl is missing: --data holds a folder a set, each with train and test.jsonl")
    there = sorted(path.parent.name for path in source.glob("*/train.jsonl"))
    budget = work.budget

    def make() -> None:
        with whole(work.root / "data") as folder:
            for name in budget.domains or there:
                old, new = source / name, folder / name
                new.mkdir()
                training = budget.public_bytes if name == "public" else budget.train_bytes
                cut_file(old / "train.jsonl", new / "train.jsonl", training)
                cut_file(old / "test.jsonl", new / "test.jsonl", budget.test_bytes, budget.document_bytes)

    work.stage(work.root / "data", make)


def cut_file(source: Path, target: Path, limit: int | None, document_limit: int | None = None) -> None:
    """Copy lines until ``limit`` bytes are reached, two at least, each document cut to ``document_limit`` bytes."""
    with source.open("rb") as lines, target.open("wb") as out:
        for count, whole_line in enumerate(lines):
            line = whole_line if document_limit is None else shortened(whole_line, document_limit)
            if limit is not None and out.tell() + len(line) > limit and count >= 2:
                break
            out.write(line)


def shortened(line: bytes, limit: int) -> bytes:
    text = json.loads(line)["text"].encode()[:limit].decode(errors="ignore")
    return json.dumps({"text": text}).encode() + b"\n"
