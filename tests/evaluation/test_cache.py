"""The cache of scored passes: what comes back is what went in, and nothing that is wrong with it is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexctl import cache
from flexctl.evaluation.scoring import SCORE_FIELDS, Score, recall_score, remember_score


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "flexctl/scores"


def make_score(documents: int = 3) -> Score:
    rng = np.random.default_rng(documents)
    return Score(
        per_document=rng.random((documents, 3)),
        document_shares=rng.random((documents, 2)),
        shares=rng.random((4, 2)),
        output_square=rng.random(4),
        same_choice=np.full(4, np.nan),
    )


def same(one: Score | None, other: Score) -> bool:
    return one is not None and all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True) for name in SCORE_FIELDS
    )


def test_what_is_remembered_is_recalled(folder: Path) -> None:
    assert recall_score({"a": 1}) is None
    remember_score({"a": 1}, make_score())
    remember_score({"a": 2}, make_score(5))
    assert same(recall_score({"a": 1}), make_score())
    assert same(recall_score({"a": 2}), make_score(5))
    assert recall_score({"a": 3}) is None
    assert all(file.suffix == ".npz" for file in folder.iterdir())


@pytest.mark.parametrize("damage", [b"", b"PK", b"no archive at all", "half", "flipped"])
def test_a_broken_file_is_no_score(folder: Path, damage: Any) -> None:
    remember_score({"a": 1}, make_score())
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 255
    file.write_bytes({"half": whole[: len(whole) // 2], "flipped": bytes(flipped)}.get(damage, damage))
    assert recall_score({"a": 1}) is None
    remember_score({"a": 1}, make_score())
    assert same(recall_score({"a": 1}), make_score())


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flat").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "flat"))
    remember_score({"a": 1}, make_score())
    assert recall_score({"a": 1}) is None


def test_a_cache_that_has_grown_large_loses_what_is_oldest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        remember_score({"a": i}, make_score())
        newest = max(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns)
        os.utime(newest, ns=(i, i))
    monkeypatch.setattr(cache, "MAX_CACHE_BYTES", 3 * newest.stat().st_size)
    remember_score({"a": 3}, make_score())
    assert [recall_score({"a": i}) is not None for i in range(4)] == [False, True, True, True]
