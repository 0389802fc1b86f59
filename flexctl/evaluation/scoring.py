"""The one scorer: negative log-likelihood, bits per byte and routing of any model on any documents.

Shapes: B windows, S positions, N num_experts, L num_hidden_layers.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flexctl import cache
from flexctl.errors import FlexctlError
from flexctl.heap import reusing_memory
from flexctl.model.batching import of_like_length
from flexctl.model.losses import score_tokens
from flexctl.model.routed import observing, routed_layers, same_in_bfloat16
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter

__all__ = ["SCORE_FIELDS", "Score", "held_out_losses", "recall_score", "remember_score", "score_documents"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Tokens = np.ndarray[Any, np.dtype[np.int64]]
_FIGURES = ("nll_total", "tokens", "bytes")
_SORTED_TOGETHER = 256
_BATCH_TOKENS = 2048
"""Positions of held-out text at once: short documents in larger batches are half padding."""


class FramedDocument(Protocol):
    """A document as t_0 .. t_n with its size in UTF-8 bytes."""

    @property
    def tokens(self) -> Tokens:
        """(n + 1,), int64."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one pass over documents found.

    Attributes:
        per_document: (documents, 3), float64, in reading order: sum of negative log-likelihoods over targets in nats,
            targets, UTF-8 bytes.
        document_shares: Kept probability, renormalised, summed over targets, mean over layers: (documents, N), float64.
        shares: The same summed over targets and documents, layer by layer: (L, N), float64.
        output_square: Mean square of the block's output, summed over targets: (L,), float64.
        same_choice: Targets for which a bfloat16 router would keep the same experts, (L,), float64; NaN where it keeps
            all that there are.
    """

    per_document: Array = field(default_factory=lambda: np.zeros((0, len(_FIGURES))))
    document_shares: Array = field(default_factory=lambda: np.zeros((0, 0)))
    shares: Array = field(default_factory=lambda: np.zeros((0, 0)))
    output_square: Array = field(default_factory=lambda: np.zeros(0))
    same_choice: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def nll_total(self) -> float:
        """Sum of negative log-likelihoods over targets, nats."""
        return float(self.per_document[:, 0].sum())

    @property
    def tokens(self) -> int:
        """Targets."""
        return int(self.per_document[:, 1].sum())

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents."""
        return int(self.per_document[:, 2].sum())

    @property
    def documents(self) -> int:
        """How many."""
        return len(self.per_document)

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

    @property
    def router_agreement(self) -> float | None:
        """How often a bfloat16 router keeps the same experts, mean over targets and layers; None if all are kept."""
        share = float(self.same_choice.mean()) / max(1, self.tokens) if len(self.same_choice) else math.nan
        return None if math.isnan(share) else share

    def routing(self) -> list[float]:
        """Return each expert's share of the kept probability, mean over targets and layers."""
        return [float(share) for share in self.shares.mean(axis=0) / max(1, self.tokens)]

    def routing_layers(self) -> list[list[float]]:
        """Return each expert's share of the kept probability in each layer, mean over targets, (N, L)."""
        shares: list[list[float]] = (self.shares / max(1, self.tokens)).T.tolist()
        return shares


@reusing_memory()
def score_documents(
    model: nn.Module,
    documents: Iterable[FramedDocument],
    *,
    seq_len: int,
    batch_tokens: int,
    scored: Callable[[int, float], None] | None = None,
    world: World = ALONE,
) -> Score:
    """Return the score of ``model`` on framed documents by the rule of docs/how-it-works.md, section 7.

    Windows of ``seq_len`` do not overlap; window j feeds t[jS : jS+S] and is scored on t[jS+1 : jS+S+1]. Windows of
    like length go through the model together, ``batch_tokens`` at a time; memory holds one batch, and some numbers a
    document.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        documents: Framed documents.
        seq_len: S.
        batch_tokens: Positions that go through the model at once.
        scored: Told after each batch how many windows went through, and their part of the documents' UTF-8 bytes.
        world: The processes that share the work; each takes its part of every batch, and all get the whole score.
    """
    totals = _Totals(model)
    stream = _windows(documents, seq_len, totals)
    while together := list(islice(stream, _SORTED_TOGETHER)):
        for numbers in of_like_length([len(window.tokens) - 1 for window in together], batch_tokens):
            batch = [together[number] for number in numbers]
            _add_batch(model, batch, totals, world)
            if scored:
                scored(len(batch), sum(window.num_bytes for window in batch))
    return totals.score()


def held_out_losses(
    model: nn.Module,
    parts: Mapping[str, Sequence[FramedDocument]],
    *,
    seq_len: int,
    reporter: Reporter,
    world: World = ALONE,
    remembered: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Return the model's loss on each part of held-out text, nats a token.

    Args:
        model: As for ``score_documents``.
        parts: Framed documents by name.
        seq_len: Window length.
        reporter: Hears of progress.
        world: As for ``score_documents``.
        remembered: By part, everything that decides its figure, as JSON has it; such a part is scored once and cached.

    Raises:
        FlexctlError: A loss is not finite.
    """
    known = remembered or {}
    return {
        name: _loss(model, name, documents, seq_len, reporter, world, known.get(name))
        for name, documents in parts.items()
    }


def _loss(
    model: nn.Module,
    name: str,
    documents: Sequence[FramedDocument],
    seq_len: int,
    reporter: Reporter,
    world: World,
    identity: Mapping[str, Any] | None,
) -> float:
    score = None if identity is None else world.by_writer(lambda: recall_score(identity))
    if score is None:
        score = _held_out_score(model, name, documents, seq_len, reporter, world)
        if identity is not None:
            world.by_writer(lambda: remember_score(identity, score))
    loss = score.nll
    if not math.isfinite(loss):
        raise FlexctlError(
            f"the loss on held-out text, {name}, is {loss}",
            hint="if the model was being trained, try a lower learning rate; else its weights are broken",
        )
    return loss


def _held_out_score(
    model: nn.Module,
    name: str,
    documents: Sequence[FramedDocument],
    seq_len: int,
    reporter: Reporter,
    world: World,
) -> Score:
    windows = sum(-(-(len(document.tokens) - 1) // seq_len) for document in documents)
    with reporter.progress(f"scoring held-out text, {name}", windows, "windows") as bar:
        return score_documents(
            model,
            documents,
            seq_len=seq_len,
            batch_tokens=_BATCH_TOKENS,
            scored=lambda windows, _: bar.advance(windows),
            world=world,
        )


class _Window(NamedTuple):
    """One window.

    Attributes:
        document: Number of the document that it is from.
        tokens: Inputs and targets.
        num_bytes: Its targets' part of the document's UTF-8 bytes.
    """

    document: int
    tokens: Tokens
    num_bytes: float


def _windows(documents: Iterable[FramedDocument], seq_len: int, totals: _Totals) -> Iterator[_Window]:
    for number, document in enumerate(documents):
        totals.add_document(document.num_bytes)
        targets = len(document.tokens) - 1
        for start in range(0, targets, seq_len):
            tokens = document.tokens[start : start + seq_len + 1]
            yield _Window(number, tokens, document.num_bytes * (len(tokens) - 1) / targets)


def _add_batch(model: nn.Module, batch: Sequence[_Window], totals: _Totals, world: World) -> None:
    device = next(model.parameters()).device
    longest = max(len(window.tokens) for window in batch)
    part = world.part(len(batch))
    ids = np.zeros((len(part.numbers), longest), dtype=np.int64)
    real = np.zeros((len(part.numbers), longest - 1), dtype=bool)
    for row, number in enumerate(part.numbers):
        tokens = batch[number].tokens
        ids[row, : len(tokens)] = tokens
        real[row, : len(tokens) - 1] = row < part.real
    inputs, valid = torch.from_numpy(ids).to(device), torch.from_numpy(real).to(device)
    routing = _BatchRouting(totals, valid, world)
    with observing(model, routing):
        losses = score_tokens(model, inputs[:, :-1], inputs[:, 1:])
    mine = losses.double().masked_fill(~valid, 0).sum(dim=1)
    targets = [len(window.tokens) - 1 for window in batch]
    nll, shares = world.gather(part, mine).cpu().numpy(), world.gather(part, routing.add()).cpu().numpy()
    totals.add_windows([window.document for window in batch], nll, np.array(targets), shares)


class _Totals:
    """Figures of a pass while it runs: a row a document, and sums for each layer."""

    def __init__(self, model: nn.Module) -> None:
        self.blocks = blocks = routed_layers(model)
        self._num_experts = len(blocks[0].experts) if blocks else 0
        # Grows by a row a document; numpy looks at it without a copy.
        self._rows = array("d")
        self.shares = np.zeros((len(blocks), self._num_experts))
        self.output_square = np.zeros(len(blocks))
        self.same_choice = np.array([0.0 if block.is_cut else math.nan for block in blocks])

    def add_document(self, num_bytes: int) -> None:
        self._rows.extend([0, 0, num_bytes, *[0] * self._num_experts])

    def add_windows(self, documents: Sequence[int], nll: Array, targets: Array, shares: Array) -> None:
        """Add windows to the rows of their documents: nll (B,), targets (B,), shares (B, N)."""
        values = np.column_stack([nll, targets, np.zeros(len(nll)), shares])
        np.add.at(self._table(), np.asarray(documents), values)

    def score(self) -> Score:
        table = self._table().copy()
        return Score(
            per_document=table[:, : len(_FIGURES)],
            document_shares=table[:, len(_FIGURES) :],
            shares=self.shares,
            output_square=self.output_square,
            same_choice=self.same_choice,
        )

    def _table(self) -> Array:
        return np.frombuffer(self._rows).reshape(-1, len(_FIGURES) + self._num_experts)


class _BatchRouting:
    """Observes one batch's real positions; what it finds stays on the device until the batch is through."""

    def __init__(self, totals: _Totals, valid: Tensor, world: World) -> None:
        self._totals, self._valid, self._world = totals, valid, world
        self._shares: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._same: dict[int, Tensor] = {}

    def __call__(self, layer: int, inputs: Tensor, kept: Tensor, outputs: Tensor) -> None:
        real = self._valid.flatten()
        shares = kept.double() / kept.double().sum(dim=1, keepdim=True) * real[:, None]
        self._shares.append(shares.unflatten(0, self._valid.shape).sum(dim=1))
        self._squares.append((outputs.float().square().mean(dim=1).double() * real).sum())
        block = self._totals.blocks[layer]
        if block.is_cut:
            self._same[layer] = (same_in_bfloat16(block, inputs, kept) & real).sum()

    def add(self) -> Tensor:
        """Add the batch to the totals; return shares of this process's windows, summed over positions, (B, N)."""
        if not self._shares:
            return torch.zeros(len(self._valid), 0)
        by_layer, total = torch.stack(self._shares), self._world.sum
        self._totals.shares += total(by_layer.sum(dim=1)).cpu().numpy()
        self._totals.output_square += total(torch.stack(self._squares)).cpu().numpy()
        for layer, same in self._same.items():
            self._totals.same_choice[layer] += int(total(same))
        return by_layer.sum(dim=0) / len(by_layer)


_CACHE_KIND = "scores"
SCORE_FIELDS = tuple(field.name for field in dataclasses.fields(Score))


def recall_score(identity: Mapping[str, Any]) -> Score | None:
    """Return the score that was remembered for ``identity``; None if there is none, or it cannot be read.

    Args:
        identity: Everything that decides the figures, as JSON has it.
    """
    arrays = cache.recall(_CACHE_KIND, identity)
    return Score(**arrays) if arrays is not None and arrays.keys() == set(SCORE_FIELDS) else None


def remember_score(identity: Mapping[str, Any], score: Score) -> None:
    """Keep a score."""
    cache.remember(_CACHE_KIND, identity, {name: getattr(score, name) for name in SCORE_FIELDS})
