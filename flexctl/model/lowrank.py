"""Experts as low-rank differences to the public one: how they train, and the matrices that they stand for."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from flexctl.families import PROJECTIONS

__all__ = ["LowRankLinear", "decompose", "expand", "low_rank_copy"]


class LowRankLinear(nn.Module):
    """A linear map W x + B (A x): another map's W, which stays, and a difference of low rank, which trains.

    B A is never formed, so for each token the difference costs rank (in + out) products in place of in times out.

    Args:
        base: The map with W, (out, in); shared, not copied.
        rank: Rows of A (rank, in) and columns of B (out, rank), both float32.
        generator: Draws A, uniform between -1/sqrt(in) and 1/sqrt(in). B is zero: the map begins as ``base``.

    Source: Hu et al., "LoRA" (arXiv 2106.09685), without its alpha.
    """

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        drawn = torch.empty(rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator)
        self.base = base
        self.a = nn.Parameter(drawn.to(base.weight.device))
        self.b = nn.Parameter(torch.zeros(rows, rank, device=base.weight.device))
        self._known: tuple[Tensor, Tensor] | None = None
        self._following: RemovableHandle | None = None

    def follow(self, other: nn.Module) -> None:
        """Take W x from ``other``, a map with the same W, where that has just computed it for the same input.

        An expert's first two matrices get what the public one's got right before, so a third of a pair's products go.
        """

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
            self._known = (inputs[0], outputs)

        self._following = other.register_forward_hook(keep)

    def leave(self) -> None:
        """No longer follow."""
        self._known = None
        if self._following is not None:
            self._following.remove()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (T, out) for inputs (T, in)."""
        known, self._known = self._known, None
        is_known = known is not None and _is_one(known[0], inputs)
        outputs: Tensor = known[1] if known is not None and is_known else self.base(inputs)
        self._known = None  # whom it follows may be its own base
        return outputs + F.linear(F.linear(inputs, self.a), self.b)


def _is_one(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are one: FSDP hands on an alias of what it gets."""
    return one is other or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def low_rank_copy(public: nn.Module, rank: int, generator: torch.Generator) -> nn.Module:
    """Return a feed-forward network that shares the public one's matrices and trains a difference of ``rank`` to each.

    Args:
        public: A dense feed-forward module, frozen.
        rank: Of each difference.
        generator: Draws the differences' A, one matrix after the other.
    """
    shared = {id(parameter): parameter for parameter in public.parameters()}
    network = copy.deepcopy(public, shared)
    for name in PROJECTIONS:
        low = LowRankLinear(getattr(public, name), rank, generator)
        low.follow(getattr(public, name))
        setattr(network, name, low)
    return network


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
