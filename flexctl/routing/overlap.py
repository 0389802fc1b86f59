"""Which experts will take each other's text, expected from their router rows alone; runs no model.

Shapes: L num_hidden_layers, H hidden_size, R rank of the covariance, N closed experts, D draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LayerSpace", "Overlap", "Routing", "expected_routing", "overlaps", "taken_of_public"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Routing = dict[str, dict[str, float]]
"""Text of whom -> expert -> share of the router's probability, mean over tokens and layers; as evaluate measures it."""

OWN_SPREAD = 2.0
"""How much more router logits vary on an owner's own text than S says, in standard deviations: 1.4 to 2.9 on nineteen
owners' texts (docs/results.md, section 10)."""

NOTEWORTHY = 0.1
"""Share of an expert's text, expected to go to another, from which it is worth saying."""

_DRAWS = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """One expert that is expected to take another's text.

    Attributes:
        text: Whose text it is.
        taker: Who takes it.
        share: Expected share of the router's probability on that text, mean over tokens and layers.
    """

    text: str
    taker: str
    share: float


def overlaps(routing: Routing) -> list[Overlap]:
    """Return who is expected to take at least NOTEWORTHY of another closed expert's text, largest first.

    Args:
        routing: As from ``expected_routing``.
    """
    found = [
        Overlap(text=text, taker=taker, share=share)
        for text, by_taker in routing.items()
        for taker, share in by_taker.items()
        if "public" not in (text, taker) and text != taker and share >= NOTEWORTHY
    ]
    return sorted(found, key=lambda overlap: (-overlap.share, overlap.text, overlap.taker))


class LayerSpace(NamedTuple):
    """One layer of an anchor's router space: m, (H,), and S = F'F + diag(D) of public router inputs."""

    mean: Array
    factor: Array
    diagonal: Array


def expected_routing(names: Sequence[str], rows: Array, space: Iterable[LayerSpace]) -> Routing:
    """Return the router's expected probabilities on each expert's text, ``public`` first.

    A row r gives away where its owner's mean is: m_i - m is S (r - b u) if the owner's inputs vary as public ones do,
    with b = r . m. So logits on that text have means r_j . m_i, and they vary together as rows do under S: by R S R' on
    public text, by OWN_SPREAD times as much in standard deviations on an owner's. The softmax is averaged over draws
    of a fixed seed, and over layers.

    Args:
        names: The closed experts.
        rows: Their router rows, (N, L, H), float64.
        space: The anchor's, layer by layer, float64.

    Source: docs/how-it-works.md, section 4.
    """
    draws = np.random.default_rng(0).standard_normal((_DRAWS, len(names)))
    everyone = ["public", *names]
    total = np.zeros((len(everyone), len(everyone)))
    for layer, public in enumerate(space):
        total += _layer_shares(rows[:, layer], public, draws)
    shares = total / rows.shape[1]
    return {
        text: dict(zip(everyone, map(float, line), strict=True)) for text, line in zip(everyone, shares, strict=True)
    }


def taken_of_public(rows: Array, space: Iterable[LayerSpace]) -> Array:
    """Return the share of the router's probability on public text that each expert takes beside the public one alone.

    Args:
        rows: Router rows, (N, L, H), float64.
        space: The anchor's, layer by layer, float64.

    Returns:
        (N,), mean over draws and layers.
    """
    draws = np.random.default_rng(0).standard_normal(_DRAWS)
    total = np.zeros(len(rows))
    for layer, (mean, factor, diagonal) in enumerate(space):
        row = rows[:, layer]
        spread = np.sqrt(np.square(row @ factor.T).sum(axis=1) + np.square(row) @ diagonal)
        logits = (row @ mean)[:, None] + spread[:, None] * draws
        total += (0.5 + 0.5 * np.tanh(logits / 2)).mean(axis=1)
    shares: Array = total / rows.shape[1]
    return shares


def _layer_shares(rows: Array, space: LayerSpace, draws: Array) -> Array:
    """Return the expected probabilities in one layer, (N + 1, N + 1): a line a text, a column an expert."""
    mean, factor, diagonal = space
    bias = rows @ mean
    through = rows @ factor.T
    varies = through @ through.T + (rows * diagonal) @ rows.T
    constant = 1 / _inverse_square(space)
    logits = bias + varies - constant * np.outer(bias, bias)
    values, vectors = np.linalg.eigh(varies)
    noise = draws @ (vectors * np.sqrt(values.clip(min=0))).T
    own = [_mean_softmax(line + OWN_SPREAD * noise) for line in logits]
    return np.stack([_mean_softmax(bias + noise), *own])


def _inverse_square(space: LayerSpace) -> float:
    """Return m . S^-1 m by Woodbury's identity; its inverse is u'Su."""
    mean, factor, diagonal = space
    scaled = factor / diagonal
    inside = np.eye(len(factor)) + scaled @ factor.T
    return float(mean @ (mean / diagonal) - (scaled @ mean) @ np.linalg.solve(inside, scaled @ mean))


def _mean_softmax(logits: Array) -> Array:
    """Return the mean of softmax over logits (D, N) with a zero for the public expert before them, (N + 1,)."""
    everyone = np.concatenate([np.zeros((len(logits), 1)), logits], axis=1)
    powers = np.exp(everyone - everyone.max(axis=1, keepdims=True))
    shares: Array = (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares
