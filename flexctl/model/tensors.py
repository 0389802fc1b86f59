"""Tensors to and from the bytes that bundles keep."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["DTYPES", "RawBytes", "rows_of", "tensors_digest", "to_bytes", "to_torch"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""Names of the safetensors format -> torch dtypes, for all that flexctl stores."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class RawBytes(Protocol):
    """A tensor as bytes, as the bundle code hands it over."""

    @property
    def dtype(self) -> str:
        """Name in safetensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""

    @property
    def data(self) -> Any:
        """Little-endian bytes, (n,), uint8."""


def to_torch(raw: RawBytes) -> Tensor:
    """Return the tensor behind ``raw``, copied out of its buffer, on the CPU."""
    flat = torch.from_numpy(np.array(raw.data, dtype=np.uint8, copy=True))
    return flat.view(DTYPES[raw.dtype]).reshape(raw.shape)


def rows_of(raw: RawBytes, first: int, last: int) -> Tensor:
    """Return rows ``first`` up to ``last`` of the tensor behind ``raw``; no other byte of its buffer is read."""
    row_bytes = len(raw.data) // raw.shape[0]
    flat = torch.from_numpy(np.array(raw.data[first * row_bytes : last * row_bytes], dtype=np.uint8, copy=True))
    return flat.view(DTYPES[raw.dtype]).reshape(last - first, *raw.shape[1:])


def to_bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], np.ndarray[Any, Any]]:
    """Return (safetensors dtype name, shape, little-endian bytes (n,) uint8) of ``tensor``."""
    return _NAMES[tensor.dtype], tuple(tensor.shape), _flat(tensor)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of names and bytes, of any dtypes, whatever their order: bare hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(_flat(tensors[name]).data)
    return digest.hexdigest()


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
