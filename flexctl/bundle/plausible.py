"""How large an expert's matrices are beside the public expert's: a look at some of their bytes, before they are taken.

A trained expert stays near the public expert that it began as. One that is ten times as large, or all but zero, was not
trained, or not to be of use. 64 KiB of a matrix are looked at, so that merging keeps its speed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from flexctl.bundle.composition import LowRank, Part
from flexctl.bundle.hashing import StoredTensor
from flexctl.bundle.tensors import ITEM_SIZES, Span, to_float32

__all__ = ["MOST_TIMES", "implausible_sizes"]

MOST_TIMES = 10.0
"""How many times as large as the public expert's, or as small, a matrix may be, root mean square. Trained experts were
within 2 (docs/security.md, section 6)."""

_BLOCKS, _BLOCK_BYTES = 16, 4096


def implausible_sizes(part: Part, public: Part) -> Iterator[str]:
    """Yield what is out of proportion in an expert, a phrase a matrix.

    Args:
        part: The expert; of a low-rank one the difference to the public expert is looked at, which may be small.
        public: The public expert.
    """
    for name, source in part.feed_forward.items():
        base = public.feed_forward[name]
        size = _sampled_size(base.span) if isinstance(base, StoredTensor) else 0.0
        if size == 0:
            continue
        times = _size(source) / size
        least = 0.0 if isinstance(source, LowRank) else 1 / MOST_TIMES
        # What is not finite is refused where every byte is looked at.
        if math.isfinite(times) and not least <= times <= MOST_TIMES:
            yield f"{name} is {times:.3g} times as large as the public expert's"


def _size(source: StoredTensor | LowRank) -> float:
    """Return the root mean square of a matrix, of what was looked at."""
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
    """Yield blocks of a tensor from its first to its last byte, evenly spread; all of a small one."""
    length, item = span.stop - span.start, ITEM_SIZES[span.dtype]
    step = max(_BLOCK_BYTES, (length - _BLOCK_BYTES) // (_BLOCKS - 1) // item * item)
    with span.path.open("rb") as file:
        for start in range(span.start, span.stop, step):
            file.seek(start)
            yield to_float32(span.dtype, file.read(min(_BLOCK_BYTES, span.stop - start)))
