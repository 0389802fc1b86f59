"""Tensors as bytes: what they are, where they lie, how their numbers are read and rounded without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexctl.bundle.names import shown
from flexctl.errors import BundleError

__all__ = [
    "FLOAT_DTYPES",
    "ITEM_SIZES",
    "Bytes",
    "RawTensor",
    "Span",
    "TensorType",
    "Typed",
    "check_agreement",
    "check_floats",
    "from_float32",
    "is_finite",
    "size_of",
    "to_float32",
]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""Bytes an element, by the dtype's name in safetensors."""

FLOAT_DTYPES = ("F32", "BF16", "F16")
"""What weights may be made of."""

# Signed and unsigned words of an element, and infinity's bits: what is not finite comes from there on, in every
# IEEE-like format, negative numbers likewise with the sign's bit set.
_INFINITIES: dict[str, tuple[Any, Any, int]] = {
    "F16": (np.int16, np.uint16, 0x7C00),
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F32": (np.int32, np.uint32, 0x7F800000),
    "F64": (np.int64, np.uint64, 0x7FF0000000000000),
}


class Typed(Protocol):
    """Anything that knows a tensor's dtype and shape."""

    @property
    def dtype(self) -> str:
        """Name in safetensors, such as ``BF16``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's dtype (name in safetensors) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as bytes.

    Attributes:
        dtype: Name in safetensors: ``F32``, ``BF16``, ``F16``, ``I64``, ...
        shape: Sizes, outermost first.
        data: Little-endian bytes in row-major order, (size_of(self),), uint8; may be a read-only memory map.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Bytes

    def view(self) -> memoryview:
        """Return the bytes for writing and hashing, without a copy."""
        return self.data.data


@dataclass(frozen=True, slots=True)
class Span:
    """Where one tensor's bytes lie: bytes ``start`` to ``stop`` of the file ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> RawTensor:
        """Return the tensor, memory-mapped read-only. Never hash one of these: touched pages count as memory."""
        if self.start == self.stop:
            return RawTensor(self.dtype, self.shape, np.empty(0, np.uint8))
        length = self.stop - self.start
        data = np.memmap(self.path, dtype=np.uint8, mode="r", offset=self.start, shape=(length,))
        return RawTensor(self.dtype, self.shape, data)

    def load(self) -> bytes:
        """Return the tensor's bytes, read into memory.

        Raises:
            BundleError: The file ends too early.
        """
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.stop - self.start)
        if len(data) < self.stop - self.start:
            raise BundleError(f"{self.path}: is truncated: it ends before byte {self.stop}")
        return data

    def rows(self, first: int, last: int) -> Span:
        """Return where slices ``first`` up to ``last`` of the outermost dimension lie."""
        length = (self.stop - self.start) // self.shape[0]
        start = self.start + first * length
        return Span(self.path, self.dtype, (last - first, *self.shape[1:]), start, self.start + last * length)


def size_of(tensor: Typed) -> int:
    """Return how many bytes a tensor of this dtype and shape has."""
    return ITEM_SIZES[tensor.dtype] * math.prod(tensor.shape)


def check_agreement(found: Mapping[str, Typed], expected: Mapping[str, Typed], where: str) -> None:
    """Compare the tensors of files with those that a manifest or an architecture demands.

    Args:
        found: By name.
        expected: By name.
        where: File or directory of ``found``, for the message.

    Raises:
        BundleError: One is missing, one is extra, or one has another dtype or shape.
    """
    for name, tensor in expected.items():
        if name not in found:
            raise BundleError(f"{where}: tensor {name} is missing")
        if found[name].dtype != tensor.dtype:
            raise BundleError(f"{where}: tensor {name}: dtype is {found[name].dtype}; expected {tensor.dtype}")
        if found[name].shape != tensor.shape:
            raise BundleError(f"{where}: tensor {name}: shape is {found[name].shape}; expected {tensor.shape}")
    for name in found:
        if name not in expected:
            raise BundleError(f"{where}: tensor {shown(name)} is extra: nothing says that it belongs there")


def check_floats(spans: Mapping[str, Span]) -> None:
    """Refuse tensors that are not F32, BF16 or F16.

    Args:
        spans: By name.

    Raises:
        BundleError: One is not.
    """
    for name, span in spans.items():
        if span.dtype not in FLOAT_DTYPES:
            raise BundleError(
                f"{span.path}: tensor {name}: dtype is {span.dtype}; expected {', '.join(FLOAT_DTYPES)}",
                hint="dequantise it first",
            )


def is_finite(dtype: str, data: Any) -> bool:
    """Return whether no element is NaN or infinite.

    Args:
        dtype: Name in safetensors; other than F16, BF16, F32, F64 is always finite.
        data: A whole number of elements as a buffer of little-endian bytes.
    """
    if dtype not in _INFINITIES or not len(data):
        return True
    signed, unsigned, infinity = _INFINITIES[dtype]
    sign = 1 << 8 * unsigned().itemsize - 1
    # Two looks for the largest, rather than a mask, which takes memory of the same size.
    return (
        int(np.frombuffer(data, signed).max()) < infinity and int(np.frombuffer(data, unsigned).max()) < sign + infinity
    )


def to_float32(dtype: str, data: Any) -> Floats:
    """Return the numbers behind F32, BF16 or F16 bytes, (elements,), float32, exactly."""
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
    if dtype == "F16":
        return np.frombuffer(data, dtype="<f2").astype(np.float32)
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    raise BundleError(f"dtype is {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")


def from_float32(dtype: str, values: Floats) -> Bytes:
    """Return ``values`` rounded to ``dtype``, nearest, ties to even, as little-endian bytes.

    Args:
        dtype: F32, BF16 or F16.
        values: Any shape, float32, finite. What overflows the dtype becomes infinite, as the caller must check.
    """
    flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
    if dtype == "F32":
        return flat.astype("<f4").view(np.uint8)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return flat.astype("<f2").view(np.uint8)
    if dtype == "BF16":
        bits = flat.view(np.uint32)
        # Half of the dropped part, less one where the kept part is even, carries into it: ties go to even.
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
        return rounded.astype("<u2").view(np.uint8)
    raise BundleError(f"dtype is {dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
