"""Covariances of router inputs, a factor and a diagonal a layer, solved and whitened without ever being formed.

S = F'F + diag(D) has rank R beside its diagonal, so Woodbury's identity inverts it through a matrix of R rows:

  S^-1 = D^-1 - D^-1 F' C^-1 F D^-1        C = I + F D^-1 F'

That takes 2 R^2 H operations a layer once, and 4 R H a direction, where factorising S takes H^3 / 3 and 2 H^2. A root
of S is as cheap: with G = F D^-1/2 and Q the root of I + G G',

  S = A A'    A = D^1/2 (I + G' (I + Q)^-1 G)    A^-1 = (I - G' (Q (I + Q))^-1 G) D^-1/2

Shapes: L num_hidden_layers, H hidden_size, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Covariances"]


@dataclass(frozen=True, kw_only=True)
class Covariances:
    """S = F'F + diag(D) of every layer; computes in float64, where F and D are.

    D must not be small beside F'F: in a router space it is a tenth of the mean variance at least.

    Attributes:
        factor: F, (L, R, H).
        diagonal: D, (L, H), positive.
    """

    factor: Tensor
    diagonal: Tensor

    def dense(self, layer: int) -> Tensor:
        """Return S of one layer, (H, H), float64; the caller's own."""
        factor = self.factor[layer].double()
        return torch.diag(self.diagonal[layer].double()).addmm_(factor.T, factor)

    def solve(self, directions: Tensor) -> Tensor:
        """Return S^-1 d for directions of every layer, (..., L, H) -> (..., L, H), float64."""
        return torch.stack([self._solve(layer, part) for layer, part in enumerate(directions.unbind(-2))], dim=-2)

    def inverse_quadratic(self, directions: Tensor) -> Tensor:
        """Return d'S^-1 d, squared Mahalanobis lengths, (..., L, H) -> (..., L), float64."""
        return torch.stack(
            [(part * self._solve(layer, part)).sum(dim=-1) for layer, part in enumerate(directions.unbind(-2))], dim=-1
        )

    def quadratic(self, directions: Tensor) -> Tensor:
        """Return d'S d for one direction a layer, (L, H) -> (L,), float64."""
        wide = directions.double()
        through = torch.stack([factor.double() @ part for factor, part in zip(self.factor, wide, strict=True)])
        return through.square().sum(dim=1) + (self.diagonal.double() * wide.square()).sum(dim=1)

    def whiten(self, layer: int, vectors: Tensor) -> Tensor:
        """Return A^-1 x of one layer, (B, H), float64: as long as x is by S^-1.

        Args:
            layer: Which one.
            vectors: x, (B, H).
        """
        scaled, flat = self._scaled(layer), vectors.double() / self.diagonal[layer].double().sqrt()
        inner = _of(self._inner_roots[layer], lambda values: 1 / (values * (1 + values)))
        return flat - flat @ scaled.T @ inner @ scaled

    def colour(self, vectors: Tensor) -> Tensor:
        """Return A z, from which ``whiten`` makes z again, for one z a layer, (L, H) -> (L, H), float64."""
        found = []
        for layer, flat in enumerate(vectors.double()):
            scaled = self._scaled(layer)
            inner = _of(self._inner_roots[layer], lambda values: 1 / (1 + values))
            found.append(self.diagonal[layer].double().sqrt() * (flat + scaled.T @ (inner @ (scaled @ flat))))
        return torch.stack(found)

    def _scaled(self, layer: int) -> Tensor:
        """Return G of one layer, (R, H), float64."""
        return self.factor[layer].double() / self.diagonal[layer].double().sqrt()

    @cached_property
    def _inner_roots(self) -> list[tuple[Tensor, Tensor]]:
        """The eigenvalues, (R,), and eigenvectors, (R, R), of Q in each layer, float64."""
        found = [torch.linalg.eigh(self._inside(layer)) for layer in range(len(self.factor))]
        return [(values.clamp(min=1).sqrt(), vectors) for values, vectors in found]

    def _solve(self, layer: int, directions: Tensor) -> Tensor:
        diagonal = self.diagonal[layer].double()
        scaled, flat = self.factor[layer].double() / diagonal, directions.double().reshape(-1, len(diagonal))
        inside = torch.cholesky_solve(scaled @ flat.T, self._roots[layer])
        return (flat / diagonal).addmm_(inside.T, scaled, alpha=-1).reshape(directions.shape)

    @cached_property
    def _roots(self) -> list[Tensor]:
        """The Cholesky factor of C of each layer, (R, R), float64."""
        return [torch.linalg.cholesky(self._inside(layer)) for layer in range(len(self.factor))]

    def _inside(self, layer: int) -> Tensor:
        """Return C of one layer, (R, R), float64."""
        factor = self.factor[layer].double()
        one = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
        return one.addmm_(factor / self.diagonal[layer].double(), factor.T)


def _of(eigen: tuple[Tensor, Tensor], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of a symmetric matrix, of which the eigenvalues and eigenvectors are given."""
    values, vectors = eigen
    return (vectors * function(values)) @ vectors.T
