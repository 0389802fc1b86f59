"""The one scorer: negative log-likelihood, bits per byte and routing of any model on any documents.

Shapes: B windows, S positions, N num_experts, L num_hidden_layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flexctl.model.losses import score_tokens
from flexctl.model.routed import observing, routed_layers

__all__ = ["Score", "score_documents"]

Tokens = np.ndarray[Any, np.dtype[np.int64]]
_SORTED_TOGETHER = 256


class FramedDocument(Protocol):
    """A document as t_0 .. t_n with its size in UTF-8 bytes."""

    @property
    def tokens(self) -> Tokens:
        """(n + 1,), int64."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""


@dataclass(slots=True)
class Score:
    """Totals over documents.

    Attributes:
        nll_total: Sum of negative log-likelihoods over targets, nats.
        tokens: Targets.
        num_bytes: UTF-8 bytes of the documents.
        documents: How many.
        shares: Kept probability, renormalised, summed over targets: (L, N), float64.
        output_square: Mean square of the block's output, summed over targets: (L,), float64.
    """

    nll_total: float = 0.0
    tokens: int = 0
    num_bytes: int = 0
    documents: int = 0
    shares: Tensor | None = None
    output_square: Tensor | None = None

    @property
    def nll(self) -> float:
        """Mean over targets, nats a token."""
        return self.nll_total / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total nll / ln 2 / bytes."""
        return self.nll_total / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def routing(self) -> list[float]:
        """Return each expert's share of the kept probability, mean over targets and layers."""
        assert self.shares is not None
        return [float(share) for share in self.shares.mean(dim=0) / max(1, self.tokens)]


def score_documents(model: nn.Module, documents: Iterable[FramedDocument], *, seq_len: int, batch_tokens: int) -> Score:
    """Return the score of ``model`` on framed documents by the rule of docs/how-it-works.md, section 7.

    Windows of ``seq_len`` do not overlap; window j feeds t[jS : jS+S] and is scored on t[jS+1 : jS+S+1]. Windows of
    like length go through the model together, ``batch_tokens`` at a time; memory holds one batch.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        documents: Framed documents.
        seq_len: S.
        batch_tokens: Positions that go through the model at once.
    """
    score = Score()
    stream = _windows(documents, seq_len, score)
    while together := list(islice(stream, _SORTED_TOGETHER)):
        together.sort(key=lambda window: len(window) - 1)
        for batch in _batches(together, batch_tokens):
            _add_batch(model, batch, score)
    return score


def _windows(documents: Iterable[FramedDocument], seq_len: int, score: Score) -> Iterator[Tokens]:
    for document in documents:
        score.documents += 1
        score.num_bytes += document.num_bytes
        for start in range(0, len(document.tokens) - 1, seq_len):
            yield document.tokens[start : start + seq_len + 1]


def _batches(windows: Sequence[Tokens], batch_tokens: int) -> Iterator[list[Tokens]]:
    batch: list[Tokens] = []
    for window in windows:
        if batch and (len(batch) + 1) * (len(window) - 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(window)
    yield batch


def _add_batch(model: nn.Module, batch: Sequence[Tokens], score: Score) -> None:
    device = next(model.parameters()).device
    longest = max(map(len, batch))
    ids = np.zeros((len(batch), longest), dtype=np.int64)
    real = np.zeros((len(batch), longest - 1), dtype=bool)
    for row, window in enumerate(batch):
        ids[row, : len(window)] = window
        real[row, : len(window) - 1] = True
    tokens, valid = torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)
    with observing(model, _RoutingTotals(model, score, valid.flatten())):
        losses = score_tokens(model, tokens[:, :-1], tokens[:, 1:])
    score.nll_total += float(losses[valid].double().sum())
    score.tokens += int(valid.sum())


class _RoutingTotals:
    """Adds the routing of one batch's real positions to a score."""

    def __init__(self, model: nn.Module, score: Score, valid: Tensor) -> None:
        blocks = routed_layers(model)
        if score.shares is None or score.output_square is None:
            score.shares = torch.zeros(len(blocks), len(blocks[0].experts), dtype=torch.float64)
            score.output_square = torch.zeros(len(blocks), dtype=torch.float64)
        self._shares, self._square, self._valid = score.shares, score.output_square, valid

    def __call__(self, layer: int, _inputs: Tensor, kept: Tensor, outputs: Tensor) -> None:
        real = kept[self._valid].double()
        self._shares[layer] += (real / real.sum(dim=1, keepdim=True)).sum(dim=0).cpu()
        self._square[layer] += outputs[self._valid].float().square().mean(dim=1).double().sum().cpu()
