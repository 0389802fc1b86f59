"""Hashing in small pieces, the cache of what was hashed, the card."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexctl.bundle import seals
from flexctl.bundle.card import merged_card
from flexctl.bundle.hashing import BUFFER_BYTES, check_tensors, hash_file, hash_spans, in_parallel
from flexctl.bundle.manifest import MergedManifest, TensorInfo
from flexctl.bundle.tensors import Span
from flexctl.bundle.validation import read_manifest
from flexctl.errors import BundleError

FIXTURES = Path(__file__).parent.parent / "fixtures/schema-1"


@pytest.mark.parametrize("size", [0, 4, BUFFER_BYTES - 4, BUFFER_BYTES, BUFFER_BYTES + 4, 3 * BUFFER_BYTES])
def test_tensors_are_hashed_piece_by_piece(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x"
    data = np.random.default_rng(size).normal(size=size // 4 + 1).astype("<f4").tobytes()[:size]
    path.write_bytes(b"head" + data + b"tail")
    span = Span(path, "F32", (size // 4,), 4, 4 + size)
    told: list[int] = []
    [(name, info, finite)] = hash_spans(path, {"a": span}, told.append)
    assert (name, finite, told) == ("a", True, [size])
    assert info == TensorInfo("F32", (size // 4,), hashlib.sha256(data).hexdigest())
    assert list(check_tensors(path, {"a": span}, {"a": info})) == []
    assert hash_file(path) == hashlib.sha256(b"head" + data + b"tail").hexdigest()
    assert hash_file(path, 4) == hashlib.sha256(b"head").hexdigest()


def test_a_nan_in_any_piece_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x"
    values = np.zeros(BUFFER_BYTES, np.float32)
    for position in (0, BUFFER_BYTES // 4 - 1, BUFFER_BYTES // 4, BUFFER_BYTES - 1):
        bad = values.copy()
        bad[position] = np.nan
        path.write_bytes(bad.tobytes())
        span = Span(path, "F32", (BUFFER_BYTES,), 0, 4 * BUFFER_BYTES)
        [(_, info, finite)] = hash_spans(path, {"a": span})
        assert not finite
        assert list(check_tensors(path, {"a": span}, {"a": info})) == [f"{path}: tensor a: holds NaN or infinity"]


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(10))
    with pytest.raises(BundleError, match=r"x: is truncated"):
        list(hash_spans(tmp_path / "x", {"a": Span(tmp_path / "x", "U8", (20,), 0, 20)}))
    for missing in (lambda path: hash_file(path), lambda path: list(hash_spans(path, {}))):
        with pytest.raises(BundleError, match=r"none: (is missing|cannot be read)"):
            missing(tmp_path / "none")


def test_one_failure_stops_what_has_not_begun() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            raise BundleError("first")
        gate.wait(0.2)
        return item

    with pytest.raises(BundleError, match="first"):
        in_parallel(work, range(1000))
    assert len(begun) < 1000
    assert in_parallel(str, range(5)) == ["0", "1", "2", "3", "4"]


@pytest.fixture
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_empty_cache")
def test_a_seal_is_broken_by_any_change(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12")
    infos = {"a": TensorInfo("U8", (2,), "0" * 64)}
    assert seals.known() == frozenset()
    first = seals.seal(path, infos)
    seals.remember([first])
    assert seals.seal(path, infos) in seals.known()
    assert seals.seal(path, {"a": TensorInfo("U8", (2,), "1" * 64)}) not in seals.known()
    stat = path.stat()
    path.write_bytes(b"21")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert seals.seal(path, infos) not in seals.known()


@pytest.mark.usefixtures("_empty_cache")
def test_a_cache_that_is_broken_or_large_or_not_writable_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seals.remember(["a" * 64])
    file = tmp_path / "cache/flexctl/hashed-files"
    file.write_bytes(b"\xff")
    assert seals.known() == frozenset()
    with file.open("wb") as output:
        output.truncate(seals.MAX_CACHE_BYTES + 1)
    seals.remember(["b" * 64])
    assert seals.known() == {"b" * 64}
    (tmp_path / "flat").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "flat"))
    seals.remember(["c" * 64])
    assert seals.known() == frozenset()


def merged_fixture(**changes: Any) -> MergedManifest:
    manifest = read_manifest((FIXTURES / "merged.json").read_bytes(), "merged.json")
    assert isinstance(manifest, MergedManifest)
    return dataclasses.replace(manifest, **changes)


def test_the_card_is_a_function_of_the_manifest_but_its_digest() -> None:
    card = merged_card(merged_fixture())
    assert card == merged_card(merged_fixture(digest="sha256:0", files={}, tensors={}))
    assert card != merged_card(merged_fixture(num_experts_per_tok_requested=7))
    assert card == (FIXTURES / "merged-card.md").read_text(encoding="utf-8")


def test_an_owner_s_words_do_nothing_to_the_card() -> None:
    public, *experts = merged_fixture().experts
    hostile = dataclasses.replace(
        experts[0], license="x | y\n---\nlicense: mit\n<script>", purposes=("a`b", "[c](d)", "*e*")
    )
    card = merged_card(merged_fixture(experts=(public, hostile)))
    assert card.count("\n---\n") == 1
    assert "\nlicense: mit" not in card
    assert "<script>" not in card
    [row] = [line for line in card.splitlines() if line.startswith("| 1 |")]
    assert row.replace("\\|", "").count("|") == 8
