"""Low-rank experts: the full matrix behind the difference to the public expert that an owner ships."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flexctl.bundle.manifest import Architecture
from flexctl.bundle.tensors import Bytes, Span, from_float32, to_float32
from flexctl.errors import UsageError

__all__ = ["expand_bytes", "most_rank", "refuse_useless_rank"]

BLOCK_BYTES = 1 << 22


def expand_bytes(base: Span, a: Span, b: Span) -> Iterator[Bytes]:
    """Yield the matrix W + sum over r of B[:, r] A[r, :], a block of rows at a time.

    The sum is taken in float32, one rank after the other, each product rounded before it is added, and rounded
    once to the dtype of W: nearest, ties to even. So every reader gets the same bytes (law 3 of docs/format.md).

    Args:
        base: W, the public expert's matrix, (out, in).
        a: A, (rank, in).
        b: B, (out, rank).

    Yields:
        Little-endian bytes in row-major order, as many rows as make about 4 MiB of float32. What overflows the
        dtype is infinite, as the caller must check.
    """
    rows, columns = base.shape
    rank = a.shape[0]
    factor = to_float32(a.dtype, a.load()).reshape(rank, columns)
    step = max(1, BLOCK_BYTES // (4 * columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        block = to_float32(base.dtype, base.rows(first, last).load()).reshape(-1, columns)
        weights = to_float32(b.dtype, b.rows(first, last).load()).reshape(-1, rank)
        with np.errstate(over="ignore", invalid="ignore"):
            for r in range(rank):
                block += weights[:, r, None] * factor[r]
        yield from_float32(base.dtype, block)


def most_rank(architecture: Architecture) -> int:
    """Return the highest rank with which A and B together are smaller than the full matrix."""
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    return (hidden * inner - 1) // (hidden + inner)


def refuse_useless_rank(rank: int | None, architecture: Architecture) -> None:
    """Refuse a rank that makes an expert no smaller than full matrices would.

    Raises:
        UsageError: It is above ``most_rank``.
    """
    most = most_rank(architecture)
    if rank is not None and rank > most:
        shape = f"{architecture.intermediate_size} x {architecture.hidden_size}"
        raise UsageError(
            f"{rank} is no smaller than full matrices of {shape}; the highest that is smaller is {most}",
            hint=f"use {most} or less, or no rank for a full expert",
            field="rank",
        )
