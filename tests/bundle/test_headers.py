"""The head of a safetensors file, ours and hostile ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.bundle.codec import parse_json
from flexctl.bundle.headers import MAX_HEADER_BYTES, PAGE_BYTES, header_bytes, read_header
from flexctl.bundle.tensors import ITEM_SIZES, TensorType, size_of
from flexctl.errors import BundleError

TYPES = st.builds(TensorType, st.sampled_from(sorted(ITEM_SIZES)), st.lists(st.integers(0, 5), max_size=3).map(tuple))
NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: name != "__metadata__")


@settings(max_examples=50)
@given(st.dictionaries(NAMES, TYPES, max_size=5), st.dictionaries(st.text(st.characters(codec="utf-8")), st.just("x")))
def test_what_is_written_is_read(tmp_path_factory: Any, tensors: Any, metadata: dict[str, str]) -> None:
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"
    head = header_bytes(tensors, metadata)
    assert len(head) % PAGE_BYTES == 0
    path.write_bytes(head + bytes(sum(map(size_of, tensors.values()))))
    header = read_header(path)
    assert header.head == head
    assert header.metadata == metadata
    assert {name: TensorType(span.dtype, span.shape) for name, span in header.tensors.items()} == tensors


def test_the_library_reads_ours_and_we_read_the_library_s(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(4, dtype=np.int64)}
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    header = read_header(tmp_path / "theirs")
    assert header.metadata == {"format": "pt"}
    assert header.tensors["b"].load() == arrays["b"].tobytes()
    types = {name: TensorType(span.dtype, span.shape) for name, span in header.tensors.items()}
    (tmp_path / "ours").write_bytes(
        header_bytes(types, {"format": "pt"}) + b"".join(header.tensors[name].load() for name in types)
    )
    loaded = load_file(tmp_path / "ours")
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())


def test_a_header_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BundleError, match="does not fit"):
        header_bytes({"x" * 200: TensorType("F32", ())}, {}, data_start=100)
    with pytest.raises(BundleError, match="does not fit"):
        header_bytes({}, {"x": "y" * (MAX_HEADER_BYTES + 1)})


def entry(begin: int = 0, end: int = 8, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [begin, end], **changes}


def raw(text: bytes, data: int = 8, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def file(entries: Any, data: int = 8) -> bytes:
    return raw(json.dumps(entries).encode(), data)


HOSTILE = {
    "empty": (b"", "is truncated"),
    "half a length": (b"\0\0\0", "is truncated"),
    "longer than the file": (raw(b"{}", 0, 10), "is truncated"),
    "longer than memory": (raw(b"{}", 0, 2**63), "is truncated"),
    "not JSON": (raw(b"{nope}"), "not valid JSON"),
    "not an object": (raw(b"[]"), "expected a JSON object"),
    "padded with zeros": (raw(b"{}\0\0", 0), "padded with spaces alone"),
    "padded with tabs": (raw(b"{}\t\t", 0), "padded with spaces alone"),
    "nested deeply": (raw(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "not valid JSON"),
    "a name twice": (raw(b'{"a":1,"a":2}'), "'a' stands twice"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}}, 0), "__metadata__"),
    "metadata a list": (file({"__metadata__": []}, 0), "__metadata__"),
    "entry a number": (file({"a": 1}), "tensor 'a' is 1"),
    "entry with more": (file({"a": entry(more=1)}), "tensor 'a'"),
    "unknown dtype": (file({"a": entry(dtype="F31")}), "dtype is 'F31'"),
    "dtype a list": (file({"a": entry(dtype=[])}), "dtype is"),
    "negative size": (file({"a": entry(shape=[-2])}), "shape is"),
    "boolean size": (file({"a": entry(shape=[True, 2])}), "shape is"),
    "fractional size": (file({"a": entry(shape=[2.0])}), "shape is"),
    "huge size": (file({"a": entry(shape=[2**60])}), "shape is"),
    "many sizes": (file({"a": entry(shape=[1] * 1000)}), "shape is"),
    "offsets backwards": (file({"a": entry(8, 0)}), "data_offsets is"),
    "three offsets": (file({"a": entry(data_offsets=[0, 4, 8])}), "data_offsets is"),
    "negative offset": (file({"a": entry(-8, 0)}), "data_offsets is"),
    "offsets of another size": (file({"a": entry(0, 4)}, 4), "not the size of F32"),
    "beyond the end": (file({"a": entry(0, 8)}, 4), "is truncated"),
    "bytes left over": (file({"a": entry(0, 8)}, 12), "bytes that belong to no tensor"),
    "no tensor but bytes": (file({}, 1), "bytes that belong to no tensor"),
    "overlap": (file({"a": entry(0, 8), "b": entry(4, 12)}, 12), "'b' overlaps"),
    "same bytes twice": (file({"a": entry(0, 8), "b": entry(0, 8)}, 8), "'b' overlaps"),
    "hole": (file({"a": entry(0, 8), "b": entry(12, 20)}, 20), "'b' leaves a hole"),
    "hole at the start": (file({"a": entry(4, 12)}, 12), "'a' leaves a hole"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    path = tmp_path / "hostile.st"
    path.write_bytes(data)
    with pytest.raises(BundleError, match=reason) as caught:
        read_header(path)
    assert caught.value.message.startswith(str(path))
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 400


def test_an_oversized_header_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.st"
    with path.open("wb") as output:
        output.write(struct.pack("<Q", MAX_HEADER_BYTES + 1))
        output.truncate(MAX_HEADER_BYTES * 2)
    with pytest.raises(BundleError, match="header has 25000001 bytes"):
        read_header(path)


def test_pointers_of_git_lfs_are_called_that(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1\n")
    with pytest.raises(BundleError, match=r"model\.safetensors: is a pointer of git-lfs"):
        read_header(path)
    with pytest.raises(BundleError, match=r"config\.json: is a pointer of git-lfs"):
        parse_json(path.read_bytes(), "config.json")


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is missing"):
        read_header(tmp_path / "none.st")
    with pytest.raises(BundleError, match="cannot be read"):
        read_header(tmp_path)


@settings(max_examples=200)
@given(data=st.data())
def test_any_change_of_a_byte_is_refused_or_harmless(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Whatever a reader is given, it answers with a header or with a BundleError, never with anything else."""
    path = tmp_path_factory.mktemp("flipped") / "x.st"
    good = bytearray(file({"__metadata__": {"k": "v"}, "a": entry(0, 8), "b": entry(8, 16)}, 16))
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(good[: data.draw(st.integers(0, len(good)))]))
    try:
        header = read_header(path)
    except BundleError:
        return
    assert sum(span.stop - span.start for span in header.tensors.values()) == 16
