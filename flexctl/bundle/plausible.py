"""How large an expert's matrices are beside the public expert's: a look at some of their bytes, before they are taken.

A trained expert stays near the public expert that it began as. One that is many times as large, or all but zero, was
not trained, or not to be of use. 16 KiB of a matrix are looked at, so that merging keeps its speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from flexctl.bundle.composition import LowRank, Part
from flexctl.bundle.hashing import StoredTensor
from flexctl.bundle.tensors import ITEM_SIZES, Span, to_float32

__all__ = ["MOST_TIMES", "implausible_sizes", "sizes_of"]

MOST_TIMES = 5.0
"""How many times as large as the public expert's, or as small, a matrix may be, root mean square. 84 trained experts
were between 1.00 and 1.31 (docs/security.md, section 6)."""

_BLOCKS, _BLOCK_BYTES = 4, 4096


def sizes_of(part: Part) -> dict[str, float]:
    """Return the root mean square of each matrix of an expert, of what is looked at.

    Args:
        part: The expert; of a low-rank one it is the difference to the public expert.
    """
    return {name: _size(source) for name, source in part.feed_forward.items()}


def implausible_sizes(part: Part, public: Mapping[str, float]) -> Iterator[str]:
    """Yield what is out of proportion in an expert, a phrase a matrix.

    Args:
        part: The expert; of a low-rank one the difference to the public expert may be as small as it likes.
        public: ``sizes_of`` the public expert.
    """
    for name, size in sizes_of(part).items():
        times = size / public[name] if public[name] else math.nan
        least = 0.0 if isinstance(part.feed_forward[name], LowRank) else 1 / MOST_TIMES
        # What is not finite is refused where every byte is looked at.
        if math.isfinite(times) and not least <= times <= MOST_TIMES:
            yield f"{name} is {times:.3g} times as large as the public expert's"


def _size(source: StoredTensor | LowRank) -> float:
    if isinstance(source, StoredTensor):
        return _sampled_size(source.span)
    a, b = (
        to_float32(part.span.dtype, part.span.load()).reshape(part.span.shape).astype(np.float64)
        for part in (source.a, source.b)
    )
    # The squared Frobenius norm of BA is the sum of (B'B) * (AA').
    square = float(((b.T @ b) * (a @ a.T)).sum())
    return math.sqrt(max(square, 0.0) / (a.shape[1] * b.shape[0]))


def _sampled_size(span: Span) -> float:
    total = count = 0.0
    for values in _blocks(span):
        total += float(np.square(values, dtype=np.float64).sum())
        count += len(values)
    return math.sqrt(total / count) if count else 0.0


def _blocks(span: Span) -> Iterator[np.ndarray]:
    """Yield blocks of a tensor, the first and the last among them, evenly spread; all of a small one."""
    length, item = span.stop - span.start, ITEM_SIZES[span.dtype]
    whole = length <= _BLOCKS * _BLOCK_BYTES
    step = 1 if whole else (length - _BLOCK_BYTES) // (_BLOCKS - 1) // item * item
    starts = [0] if whole else [*range(0, step * (_BLOCKS - 1), step), length - _BLOCK_BYTES]
    with span.path.open("rb", buffering=0) as file:
        for start in starts:
            file.seek(span.start + start)
            yield to_float32(span.dtype, file.read(length if whole else _BLOCK_BYTES))
