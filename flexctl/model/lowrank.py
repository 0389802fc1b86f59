"""Experts as low-rank differences to the public one: how they train, and the matrices that they stand for.

Shapes: T tokens, H hidden_size, I intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.families import PROJECTIONS
from flexctl.model.gated import Product, product_of

__all__ = ["LowRankDifference", "LowRankNetwork", "decompose", "expand"]


class LowRankDifference(nn.Module):
    """The map x -> B (A x), which is added to a matrix that stays. It trains.

    B A is never formed, so for each token the difference costs rank (in + out) products in place of in times out.

    Args:
        beside: The matrix that it is added to, (out, in).
        rank: Rows of A (rank, in) and columns of B (out, rank), both float32.
        generator: Draws A, uniform between -1/sqrt(in) and 1/sqrt(in). B is zero: the map begins as nothing.

    Source: Hu et al., "LoRA" (arXiv 2106.09685), without its alpha.
    """

    def __init__(self, beside: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = beside.shape
        drawn = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        self.a = nn.Parameter(drawn.to(beside.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=beside.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (T, out) for inputs (T, in)."""
        return F.linear(F.linear(inputs, self.a), self.b)


class LowRankNetwork(nn.Module):
    """A feed-forward network that has the public one's matrices and trains a difference of low rank to each.

    Beside the public network it costs little more than the differences, as ``mix`` says.

    Args:
        public: A dense feed-forward module, frozen; it is read, and stays whose it is.
        rank: Of each difference.
        generator: Draws the differences' A, one matrix after the other.

    Attributes:
        inside: Its product, as the public network's.
        watching: Who compares the two networks in ``mix``: what picks tokens of a tensor, and what gets the public
            network's outputs for them, without a gradient, and what the own ones have more, whose gradient goes to the
            own network alone. None is nobody.
    """

    def __init__(self, public: Any, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._public = (public,)  # no module of this one
        self.gate_proj, self.up_proj, self.down_proj = (
            LowRankDifference(getattr(public, name).weight, rank, generator) for name in PROJECTIONS
        )
        self.inside: Product = product_of(public)
        self.watching: tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], None]] | None = None

    @property
    def public(self) -> Any:
        """The network that it differs from."""
        return self._public[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return its own outputs (T, H) for inputs (T, H)."""
        _, own = self._both_inside(inputs)
        outputs: Tensor = self.public.down_proj(own) + self.down_proj(own)
        return outputs

    def mix(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of both networks' outputs, (T, H), by one product with each public matrix.

        With u and v inside the public and the own network, and p + q = 1,
        p W u + q (W + B A) v = W (p u + q v) + q B (A v).

        Args:
            inputs: (T, H).
            weights: p and q, (T, 2).
        """
        theirs, own = self._both_inside(inputs)
        weight = weights[:, 1:].to(own.dtype)
        low = self.down_proj(own)
        outputs: Tensor = self.public.down_proj(torch.lerp(theirs, own, weight)) + weight * low
        if self.watching is not None:
            pick, keep = self.watching
            more = self.public.down_proj(pick(own) - pick(theirs).detach()) + pick(low)
            keep((pick(outputs) - pick(weight) * more).detach(), more)
        return outputs

    def _both_inside(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.public.gate_proj(inputs), self.public.up_proj(inputs)
        return self.inside(gate, up), self.inside(gate + self.gate_proj(inputs), up + self.up_proj(inputs))


def decompose(difference: Tensor) -> tuple[Tensor, Tensor]:
    """Return A (components, in) and B (out, components) with B A = ``difference``, largest components first.

    The first R rows of A and columns of B are the nearest matrix of rank R. A singular value's root goes to either
    side, so that both have entries of one size and rounding takes as little from one as from the other.

    Args:
        difference: (out, in), float32.

    Source: Eckart and Young (1936), by singular value decomposition.
    """
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    root = values.sqrt()
    return root[:, None] * right, left * root


def expand(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return W + sum over r of B[:, r] A[r, :] as every reader computes it (law 3 of docs/format.md).

    Args:
        base: W, (out, in).
        a: A, (rank, in).
        b: B, (out, rank).

    Returns:
        The matrix, (out, in), rounded once to the dtype of W.
    """
    total = base.to(torch.float32, copy=True)
    for row, column in zip(a.float(), b.float().T, strict=True):
        total += column[:, None] * row
    return total.to(base.dtype)
