"""An owner's documents one by one, and some of them side by side, each in a row of its own.

Shapes: B rows, S targets of the longest document.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexctl.bundle.hashing import hash_file
from flexctl.bundle.store import new_file
from flexctl.errors import FlexctlError, UsageError
from flexctl.text.tokens import Framed

__all__ = ["Documents", "Padded", "padded"]

Tokens = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Padded:
    """Documents in rows of one length.

    Attributes:
        inputs: Token ids, (B, S), int64, 0 behind a document's end.
        targets: The ids that follow, likewise.
        weights: 1 over the number of a row's targets on them, else 0, (B, S), float32: so that a document's loss is
            the mean over its targets, and that of an empty row is 0.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device) -> Padded:
        """Return the same on a device."""
        return Padded(inputs=self.inputs.to(device), targets=self.targets.to(device), weights=self.weights.to(device))


def padded(documents: Sequence[Tokens], rows: int) -> Padded:
    """Return documents side by side in ``rows`` rows, as many of them empty as there are fewer documents.

    Args:
        documents: Token ids, (n + 1,) each, at least two of each.
        rows: B.
    """
    longest = max((len(document) - 1 for document in documents), default=1)
    inputs, targets = np.zeros((2, rows, longest), dtype=np.int64)
    weights = np.zeros((rows, longest), dtype=np.float32)
    for row, document in enumerate(documents):
        count = len(document) - 1
        inputs[row, :count], targets[row, :count] = document[:-1], document[1:]
        weights[row, :count] = 1 / count
    return Padded(inputs=torch.from_numpy(inputs), targets=torch.from_numpy(targets), weights=torch.from_numpy(weights))


class Documents:
    """Framed documents in a file, any of them at hand.

    Args:
        file: Where their tokens lie, one document after the other, int32.
        starts: Where each begins and the last ends, (documents + 1,), int64.
        digest: Of both.
    """

    def __init__(self, file: Path, starts: Tokens, digest: str) -> None:
        self._file, self._starts, self.digest = file, starts, digest
        self._ids = np.memmap(file, dtype="<i4", mode="r")

    @classmethod
    def write(cls, file: Path, documents: Iterable[Framed]) -> Documents:
        """Write documents to ``file``, which is replaced, and return them.

        Raises:
            UsageError: There are none.
        """
        starts = array("q", [0])
        with new_file(file, overwrite=True) as temporary, temporary.open("xb") as stream:
            for document in documents:
                stream.write(document.tokens.astype("<i4").tobytes())
                starts.append(starts[-1] + len(document.tokens))
        if len(starts) == 1:
            raise UsageError("no document is left to train on", field="data")
        places = np.asarray(starts, dtype=np.int64)
        return cls(file, places, _digest(file, places))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def shortest_first(self, indices: Tokens | None = None) -> Tokens:
        """Return indices, or all, in the order of their documents' lengths: side by side they have little padding."""
        indices = np.arange(len(self)) if indices is None else indices
        sizes = self._starts[indices + 1] - self._starts[indices]
        found: Tokens = indices[np.argsort(sizes, kind="stable")]
        return found

    def refuse_change(self) -> None:
        """Refuse to go on where the file was written over.

        Raises:
            FlexctlError: It was.
        """
        if _digest(self._file, self._starts) != self.digest:
            raise FlexctlError(
                f"{self._file}: was changed while a run used it; nothing was written",
                hint="start again, and let nothing else write there",
            )

    def window(self, index: int, seq_len: int, place: int = 0) -> Tokens:
        """Return at most ``seq_len`` + 1 neighbouring tokens of a document, int64.

        Args:
            index: Which document.
            seq_len: Targets at most.
            place: Any number of at least 0, which says where the window of a longer document lies; 0 is its beginning.
        """
        start, stop = int(self._starts[index]), int(self._starts[index + 1])
        start += place % max(1, stop - start - seq_len)
        return np.asarray(self._ids[start : min(stop, start + seq_len + 1)], dtype=np.int64)


def _digest(file: Path, starts: Tokens) -> str:
    return hashlib.sha256(hash_file(file).encode() + starts.tobytes()).hexdigest()
