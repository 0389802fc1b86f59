"""The head of a safetensors file: reading one that may be hostile, and writing ours.

A file is 8 bytes (n, unsigned, little-endian), n bytes of JSON, and the tensors' bytes. Our own files end the JSON
with spaces so that the tensors begin at a multiple of 4,096, and keep the tensors in the order of the JSON.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import parse_json
from flexctl.bundle.names import shown
from flexctl.bundle.tensors import ITEM_SIZES, Span, Typed, size_of
from flexctl.errors import BundleError
from flexctl.pointers import refuse_pointer

__all__ = ["MAX_HEADER_BYTES", "PAGE_BYTES", "Header", "header_bytes", "read_header"]

MAX_HEADER_BYTES = 25_000_000
"""What the Hub's readers take; stock safetensors takes four times that."""

PAGE_BYTES = 4096
MAX_DIMENSIONS = 8
MAX_DIMENSION = 2**48


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the head of one file says.

    Attributes:
        path: The file.
        tensors: Name -> where it lies, in the order of the bytes.
        metadata: The free texts of ``__metadata__``.
        head: Bytes of the file before the tensors: length, JSON, padding.
    """

    path: Path
    tensors: Mapping[str, Span]
    metadata: Mapping[str, str]
    head: bytes


def header_bytes(tensors: Mapping[str, Typed], metadata: Mapping[str, str], data_start: int = 0) -> bytes:
    """Return everything that comes before the tensors' bytes.

    Args:
        tensors: Name -> dtype and shape, in the order in which the bytes follow.
        metadata: Texts for ``__metadata__``; written in the order given.
        data_start: Where the tensors shall begin. Without one, at the first multiple of 4,096 that fits.

    Returns:
        8 bytes of length, JSON without spaces, and spaces up to where the tensors begin.

    Raises:
        BundleError: It has more than 25 MB, or does not fit before ``data_start``.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + size_of(tensor)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    needed = 8 + len(text)
    start = data_start or -(-needed // PAGE_BYTES) * PAGE_BYTES
    if start - 8 > MAX_HEADER_BYTES or needed > start:
        raise BundleError(f"a header of {len(text)} bytes does not fit into {min(start - 8, MAX_HEADER_BYTES)}")
    return struct.pack("<Q", start - 8) + text.ljust(start - 8, b" ")


def read_header(path: Path) -> Header:
    """Return the head of a safetensors file of any valid layout, with every claim in it checked.

    Raises:
        BundleError: The file is missing or truncated, the header is larger than 25 MB or than the file, is not
            JSON or has a name twice, an entry is malformed, or the tensors overlap, leave holes, or do not end
            with the file. The message names file and tensor.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            refuse_pointer(file.read(64), str(path))
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + length > size:
                is_other = length > MAX_HEADER_BYTES
                raise BundleError(
                    f"{path}: is truncated: {size} bytes, header asks for {8 + length}",
                    hint="it is no safetensors file, as bundles are" if is_other else "fetch it again",
                )
            if length > MAX_HEADER_BYTES:
                raise BundleError(f"{path}: header has {length} bytes; expected at most {MAX_HEADER_BYTES}")
            text = file.read(length)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    if not (text.startswith(b"{") and text.rstrip(b" ").endswith(b"}")):
        raise BundleError(f"{path}: header is {shown(text[:40])}; expected a JSON object, padded with spaces alone")
    entries = parse_json(text, f"{path}: header")
    metadata = _metadata(entries.pop("__metadata__", {}), path)
    spans = {name: _span(path, name, entry, 8 + length) for name, entry in entries.items()}
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_gapless(path, ordered, 8 + length, size)
    return Header(path=path, tensors=ordered, metadata=metadata, head=prefix + text)


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise BundleError(f"{path}: __metadata__ is {shown(value)}; expected an object of texts")
    return value


def _span(path: Path, name: str, entry: Any, data_start: int) -> Span:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BundleError(f"{where} is {shown(entry)}; expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise BundleError(f"{where}: dtype is {shown(dtype)}; expected one of {', '.join(ITEM_SIZES)}")
    if not _are_counts(shape, MAX_DIMENSION) or len(shape) > MAX_DIMENSIONS:
        raise BundleError(f"{where}: shape is {shown(shape)}; expected at most {MAX_DIMENSIONS} sizes")
    if not _are_counts(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BundleError(f"{where}: data_offsets is {shown(offsets)}; expected (begin, end)")
    if offsets[1] - offsets[0] != ITEM_SIZES[dtype] * math.prod(shape):
        raise BundleError(f"{where}: data_offsets is {shown(offsets)}, which is not the size of {dtype} {shape}")
    return Span(path, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_counts(value: Any, limit: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= limit for item in value)


def _check_gapless(path: Path, spans: Mapping[str, Span], data_start: int, size: int) -> None:
    end = data_start
    for name, span in spans.items():
        if span.start != end:
            problem = "overlaps the one before" if span.start < end else "leaves a hole before it"
            raise BundleError(f"{path}: tensor {shown(name)} {problem} (data_offsets)")
        end = span.stop
    if end != size:
        problem = "is truncated" if end > size else "has bytes that belong to no tensor"
        raise BundleError(f"{path}: {problem}: {size} bytes, tensors end at {end}", hint="fetch it again")
