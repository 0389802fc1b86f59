"""Test text cut into the scorer's windows, and what may be known before one of them is scored.

Shapes: M models, W windows.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from torch import nn

from flexctl.errors import UsageError
from flexctl.evaluation.scoring import Score, score_documents
from flexctl.text.tokens import Framed

__all__ = ["Windows", "choose", "cut", "softmax_weights"]

Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Documents as windows, in reading order. Numbers about them are kept; their tokens are read anew for every pass.

    Attributes:
        name: What the text is called.
        documents: Reads the documents, framed.
        document: Number of the document that each window is from, (W,), int64, rising.
        targets: How many of its tokens are scored, (W,), float64.
        num_bytes: UTF-8 bytes of each document, (documents,), float64.
        seq_len: Most targets a window.
        digest: sha256 of all documents' tokens and sizes in order, as ``sha256:<hex>``.
    """

    name: str
    documents: Callable[[], Iterable[Framed]]
    document: Numbers
    targets: Floats
    num_bytes: Floats
    seq_len: int
    digest: str

    def __len__(self) -> int:
        return len(self.targets)

    def pieces(self) -> Iterator[Framed]:
        """Yield each window as a document of its own, inputs and targets: the scorer then makes one window of it.

        Raises:
            UsageError: The text is no longer what it was.
        """
        pieces = (piece for document in self.documents() for piece in _pieces(document, self.seq_len))
        for targets, piece in zip_longest(self.targets, pieces):
            if piece is None or len(piece.tokens) - 1 != targets:
                raise UsageError(
                    f"the text of {self.name} changed while it was read", hint="run it again", field="data"
                )
            yield piece

    def losses(
        self, model: nn.Module, pieces: Iterable[Framed], batch_tokens: int, advance: Callable[[int], None]
    ) -> Floats:
        """Return the sum of negative log-likelihoods of each piece's targets in nats, (pieces,), float64.

        Args:
            model: As from ``model.building.build_model``.
            pieces: Some or all of ``pieces()``.
            batch_tokens: Positions that go through the model at once.
            advance: Told how many of them were scored.
        """
        score = score_documents(
            model,
            pieces,
            seq_len=self.seq_len,
            batch_tokens=batch_tokens,
            scored=lambda windows, _: advance(windows),
        )
        return score.per_document[:, 0]

    def score(self, losses: Floats) -> Score:
        """Return the documents' score when the windows have these losses, (W,), nats."""
        count = len(self.num_bytes)
        nll, targets = (np.bincount(self.document, weights, count) for weights in (losses, self.targets))
        return Score(per_document=np.stack([nll, targets, self.num_bytes], axis=1))

    def itself(self, losses: Floats) -> Floats:
        """Return each window's own losses (M, W) in nats a token: what only an oracle knows before scoring it."""
        return losses / self.targets

    def before(self, losses: Floats) -> Floats:
        """Return the losses (M, W) of the document's earlier windows in nats a token; NaN where there are none."""
        return self._earlier(losses) / np.where(self.first, np.nan, self._earlier(self.targets))

    @property
    def first(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which windows begin their document, (W,)."""
        return np.diff(self.document, prepend=-1) > 0

    def _earlier(self, amounts: Floats) -> Floats:
        """Return the sum of ``amounts`` (..., W) over the earlier windows of the same document."""
        until = np.cumsum(amounts, axis=-1) - amounts
        begin = np.searchsorted(self.document, self.document)
        return until - until[..., begin]


def cut(
    name: str, documents: Callable[[], Iterable[Framed]], *, seq_len: int, advance: Callable[[int], None]
) -> Windows:
    """Return framed documents cut as docs/how-it-works.md, section 7, says.

    Args:
        name: What the text is called.
        documents: Reads the documents, the same ones every time.
        seq_len: Most targets a window.
        advance: Told the UTF-8 bytes that were read.
    """
    numbers, targets, sizes = array("q"), array("d"), array("d")
    hasher = hashlib.sha256()
    for number, document in enumerate(documents()):
        sizes.append(document.num_bytes)
        hasher.update(np.array([len(document.tokens), document.num_bytes], dtype="<i8").tobytes())
        hasher.update(document.tokens.astype("<i8").tobytes())
        for piece in _pieces(document, seq_len):
            numbers.append(number)
            targets.append(len(piece.tokens) - 1)
        advance(document.num_bytes)
    return Windows(
        name=name,
        documents=documents,
        document=np.array(numbers, dtype=np.int64),
        targets=np.array(targets, dtype=np.float64),
        num_bytes=np.array(sizes, dtype=np.float64),
        seq_len=seq_len,
        digest=f"sha256:{hasher.hexdigest()}",
    )


def _pieces(document: Framed, seq_len: int) -> Iterator[Framed]:
    for start in range(0, len(document.tokens) - 1, seq_len):
        yield Framed(tokens=document.tokens[start : start + seq_len + 1], num_bytes=0)


def softmax_weights(evidence: Floats, temperature: float, top_k: int | None = None) -> Floats:
    """Return w_i = softmax_i(-evidence_i / temperature), cut to the ``top_k`` largest, renormalised, (M, W), float64.

    Args:
        evidence: Nats a token by each model, (M, W); where it is NaN, nothing is known and all models weigh the same.
        temperature: Nats a token.
        top_k: Models kept where something is known; None keeps all.

    Source: docs/baselines.md; FlexOlmo's weighted soup and BTM.
    """
    unknown = np.isnan(evidence).any(axis=0)
    scaled = -np.where(unknown, 0.0, evidence) / temperature
    weights = np.exp(scaled - scaled.max(axis=0))
    if top_k is not None:
        rank = np.argsort(np.argsort(-weights, axis=0, kind="stable"), axis=0)
        weights = np.where((rank < top_k) | unknown, weights, 0.0)
    kept: Floats = weights / weights.sum(axis=0)
    return kept


def choose(evidence: Floats) -> Numbers:
    """Return the model with the least evidence (M, W) against it for each window, (W,); the first where it is NaN."""
    unknown = np.isnan(evidence).any(axis=0)
    return np.where(unknown, 0, np.argmin(np.where(unknown, 0.0, evidence), axis=0))
