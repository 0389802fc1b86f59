"""Covariances by their factors are those that would be formed, at the widths and spreads of real router inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flexctl.routing.covariances import Covariances
from flexctl.routing.rows import OwnerInputs, discriminant, finish_rows
from flexctl.routing.space import RouterSpace

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, RANK, HIDDEN = 2, 12, 70


def make_space(seed: int = 0) -> RouterSpace:
    """Wider than its rank, with one direction 10,000 times as varied as most and the diagonal that shrinkage leaves."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(LAYERS, RANK, HIDDEN, generator=generator) * torch.logspace(0, -2, RANK)[:, None]
    factor[:, 0] *= 100
    diagonal = 0.1 * factor.square().sum(dim=1).mean(dim=1, keepdim=True) * (1 + torch.rand(LAYERS, HIDDEN))
    return RouterSpace(mean=torch.randn(LAYERS, HIDDEN, generator=generator), factor=factor, diagonal=diagonal)


def directions(*shape: int) -> Tensor:
    return torch.randn(*shape, LAYERS, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(space: RouterSpace) -> Tensor:
    wide = space.factor.double()
    return wide.mT @ wide + torch.diag_embed(space.diagonal.double())


def test_dense_is_the_formula() -> None:
    space = make_space()
    for layer, expected in enumerate(dense(space)):
        torch.testing.assert_close(space.covariance(layer), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_solve_is_that_of_the_matrix(shape: tuple[int, ...]) -> None:
    space, given = make_space(), directions(*shape)
    expected = torch.linalg.solve(dense(space), given[..., None])[..., 0]
    torch.testing.assert_close(space.solve(given), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    lengths = space.covariances.inverse_quadratic(given)
    torch.testing.assert_close(lengths, (given * expected).sum(dim=-1), rtol=1e-9, atol=0)


def test_what_is_whitened_varies_alike_in_all_directions() -> None:
    space = make_space()
    covariances, given = space.covariances, directions(40)
    for layer, matrix in enumerate(dense(space)):
        white = covariances.whiten(layer, torch.eye(HIDDEN))
        torch.testing.assert_close(white.T @ matrix @ white, torch.eye(HIDDEN).double(), rtol=0, atol=1e-9)
        lengths = covariances.whiten(layer, given[:, layer]).square().sum(dim=1)
        torch.testing.assert_close(lengths, covariances.inverse_quadratic(given)[:, layer], rtol=1e-9, atol=0)


def test_colour_takes_whitening_back() -> None:
    space, given = make_space(), directions()
    coloured = space.covariances.colour(given)
    back = torch.cat([space.covariances.whiten(layer, coloured[layer : layer + 1]) for layer in range(LAYERS)])
    torch.testing.assert_close(back, given, rtol=1e-9, atol=1e-9)


def test_only_an_owner_s_own_covariance_needs_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a width of 4,096 forming and factorising one takes a second a layer, and there were five."""
    formed: list[int] = []
    whole = Covariances.dense
    monkeypatch.setattr(Covariances, "dense", lambda self, layer: formed.append(layer) or whole(self, layer))
    space = make_space()
    owner = OwnerInputs.of_means((space.mean + directions(6)).float(), space)
    finish_rows(space, owner, discriminant(space, owner, 0.1))
    assert formed == []
    within = torch.eye(HIDDEN).expand(LAYERS, -1, -1)
    finish_rows(space, owner, discriminant(space, replace(owner, within=within), 0.1))
    assert formed == [0, 1]


def test_spread_bound_is_that_of_the_constant_direction() -> None:
    space = make_space()
    expected = torch.einsum("lh,lhk,lk->l", space.constant(), dense(space), space.constant()).sqrt()
    torch.testing.assert_close(space.spread_bound(), expected, rtol=1e-9, atol=0)
