"""Models made from the weights of others: soups, TIES, DARE, and the mixture that BTX starts from.

Each tensor is made when a model is built from it and is gone again before the next, so memory holds one model.
Everywhere the first model is the anchor, which counts as one of those to merge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexctl.bundle import PUBLIC, RawTensor, Weights
from flexctl.model.tensors import RawBytes, to_bytes, to_torch

__all__ = ["Blend", "dare", "soup", "ties"]

TIES_DENSITY = 0.2
DARE_DROP = 0.9

Combine = Callable[[str, Iterator[Tensor]], Tensor]
"""Given a tensor's name and each model's tensor of that name in float32, the anchor's first, returns one."""


class _Made(Mapping[str, RawTensor]):
    """Tensors that are made when they are asked for."""

    def __init__(self, parts: Sequence[Mapping[str, RawBytes]], combine: Combine) -> None:
        self._parts, self._combine = parts, combine

    def __getitem__(self, name: str) -> RawTensor:
        tensors = (to_torch(part[name]).float() for part in self._parts)
        return RawTensor(*to_bytes(self._combine(name, tensors)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0])

    def __len__(self) -> int:
        return len(self._parts[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """A WeightSource whose tensors are made on the way into a model."""

    dense_config: Mapping[str, Any]
    shared: Mapping[str, RawTensor]
    experts: Mapping[str, Mapping[str, RawTensor]]
    router: Sequence[RawTensor]
    num_experts_per_tok: int


def soup(models: Sequence[Weights]) -> Blend:
    """Return the mean of the models' weights."""
    return _blend(models, _mean(len(models)))


def ties(models: Sequence[Weights], density: float = TIES_DENSITY) -> Blend:
    """Return the anchor plus the models' differences to it, merged by TIES.

    In each tensor a difference keeps the ``density`` of its entries with the largest magnitude; each entry takes the
    sign of the sum over models, and the mean of the entries that have it.

    Source: Yadav et al., "TIES-Merging" (arXiv 2306.01708), section 3, with lambda = 1 and trimming tensor by tensor.
    """

    def combine(_name: str, tensors: Iterator[Tensor]) -> Tensor:
        base = next(tensors)
        sums = {sign: torch.zeros_like(base) for sign in (1, -1)}
        counts = {sign: torch.zeros_like(base) for sign in (1, -1)}
        for tensor in tensors:
            kept = _largest(tensor - base, density)
            for sign in (1, -1):
                agrees = kept.sign() == sign
                sums[sign] += kept * agrees
                counts[sign] += agrees
        up = sums[1] + sums[-1] >= 0
        total, count = torch.where(up, sums[1], sums[-1]), torch.where(up, counts[1], counts[-1])
        return base + total / count.clamp(min=1)

    return _blend(models, combine)


def dare(models: Sequence[Weights], drop: float = DARE_DROP, seed: int = 0) -> Blend:
    """Return the anchor plus the mean of the models' differences to it, of which DARE dropped most entries.

    Each entry of a difference is dropped with probability ``drop`` and divided by 1 - ``drop`` otherwise.

    Source: Yu et al., "Language Models are Super Mario" (arXiv 2311.03099), section 3.2; the mean over models is that
    of a soup.
    """

    def combine(name: str, tensors: Iterator[Tensor]) -> Tensor:
        base = next(tensors)
        generator = torch.Generator().manual_seed(_seed(name, seed))
        total = torch.zeros_like(base)
        for tensor in tensors:
            kept = torch.rand(base.shape, generator=generator) >= drop
            total += (tensor - base) * kept / (1 - drop)
        return base + total / len(models)

    return _blend(models, combine)


def _feed_forward(model: Weights) -> Mapping[str, RawTensor]:
    return model.experts[PUBLIC]


def _blend(models: Sequence[Weights], combine: Combine) -> Blend:
    return Blend(
        dense_config=models[0].dense_config,
        shared=_Made([model.shared for model in models], combine),
        experts={PUBLIC: _Made([_feed_forward(model) for model in models], combine)},
        router=models[0].router,
        num_experts_per_tok=1,
    )


def _mean(count: int) -> Combine:
    def combine(_name: str, tensors: Iterator[Tensor]) -> Tensor:
        return sum(tensors, start=torch.zeros(())) / count

    return combine


def _largest(change: Tensor, density: float) -> Tensor:
    """Return ``change`` with all but the ``density`` of its entries of largest magnitude set to zero."""
    count = max(1, round(density * change.numel()))
    chosen = change.flatten().abs().topk(count, sorted=False).indices
    kept = torch.zeros(change.numel())
    kept[chosen] = change.flatten()[chosen]
    return kept.reshape(change.shape)


def _seed(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "big")
