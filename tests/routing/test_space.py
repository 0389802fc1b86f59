"""The router space: measured as the model sees it, kept as a factor and a diagonal, inverted exactly."""

from __future__ import annotations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexctl.errors import BundleError, UsageError
from flexctl.model.routed import routed_layers
from flexctl.routing.space import (
    MAX_RANK,
    SHRINKAGE,
    VARIETY,
    InputStatistics,
    RouterSpace,
    add_outer,
    constant_spread,
    fit_space,
    measure_documents,
    measure_inputs,
    mirrored,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def statistics_of(samples: Tensor) -> InputStatistics:
    """Of samples (L, T, H)."""
    wide = samples.double()
    second = torch.einsum("lth,ltk->lhk", wide, wide) / wide.shape[1]
    return InputStatistics(count=wide.shape[1], mean=wide.mean(dim=1), second=second)


def make_samples(seed: int = 0, layers: int = 2, tokens: int = 400, hidden: int = 8) -> Tensor:
    """Correlated, with a mean well away from zero."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layers, hidden, hidden, generator=generator)
    noise = torch.randn(layers, tokens, hidden, generator=generator)
    return noise @ mixing + 3 * torch.randn(layers, 1, hidden, generator=generator)


def covariance_of(samples: Tensor) -> Tensor:
    centred = samples.double() - samples.double().mean(dim=1, keepdim=True)
    return torch.einsum("lth,ltk->lhk", centred, centred) / samples.shape[1]


def test_fit_keeps_the_covariance_and_adds_the_shrinkage() -> None:
    samples = make_samples()
    space = fit_space(statistics_of(samples))
    torch.testing.assert_close(space.mean, samples.mean(dim=1), rtol=0, atol=1e-5)
    for layer, covariance in enumerate(covariance_of(samples)):
        shrunk = covariance + SHRINKAGE * covariance.diagonal().mean() * torch.eye(8)
        torch.testing.assert_close(space.covariance(layer), shrunk, rtol=1e-5, atol=1e-5)


def test_fit_of_wide_inputs_keeps_the_largest_directions_and_every_variance() -> None:
    hidden = MAX_RANK + 14
    samples = make_samples(layers=1, tokens=600, hidden=hidden)
    space = fit_space(statistics_of(samples))
    assert space.factor.shape == (1, MAX_RANK, hidden)
    covariance = covariance_of(samples)[0]
    shrinkage = SHRINKAGE * covariance.diagonal().mean()
    torch.testing.assert_close(space.covariance(0).diagonal(), covariance.diagonal() + shrinkage, rtol=1e-4, atol=0)
    kept = torch.linalg.eigvalsh(space.factor[0].double() @ space.factor[0].double().T)
    torch.testing.assert_close(kept, torch.linalg.eigvalsh(covariance)[-MAX_RANK:], rtol=1e-3, atol=1e-4)


def test_fit_of_too_few_tokens_still_has_an_inverse() -> None:
    space = fit_space(statistics_of(make_samples(tokens=3)))
    assert space.solve(torch.ones(2, 8)).isfinite().all()
    assert (space.diagonal > 0).all()


@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(2, 8), (1, 2, 8), (5, 2, 8)]))
@settings(max_examples=20, deadline=None)
def test_solve_is_the_inverse(seed: int, shape: tuple[int, ...]) -> None:
    space = fit_space(statistics_of(make_samples(seed)))
    directions = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()
    solved = space.solve(directions)
    back = torch.stack([solved[..., i, :] @ space.covariance(i) for i in range(2)], dim=-2)
    torch.testing.assert_close(back, directions, rtol=0, atol=1e-8)


def test_quadratic_is_d_times_s_times_d() -> None:
    space, directions = fit_space(statistics_of(make_samples())), torch.randn(2, 8).double()
    direct = torch.stack([d @ space.covariance(i) @ d for i, d in enumerate(directions)])
    torch.testing.assert_close(space.quadratic(directions), direct, rtol=1e-10, atol=0)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_constant_direction_has_mean_one_and_the_least_spread(seed: int) -> None:
    samples = make_samples(seed)
    statistics = statistics_of(samples)
    space = fit_space(statistics)
    constant = space.constant()
    torch.testing.assert_close((constant * space.mean.double()).sum(dim=1), torch.ones(2, dtype=torch.float64))
    direct = torch.einsum("lh,lth->lt", constant, samples.double())
    torch.testing.assert_close(direct.mean(dim=1), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    spread = constant_spread(space, statistics)
    torch.testing.assert_close(spread, direct.std(dim=1, correction=0), rtol=1e-4, atol=1e-6)
    assert (space.spread_bound() >= spread).all()
    other = space.mean.double() / space.mean.double().square().sum(dim=1, keepdim=True)
    assert (space.quadratic(other) >= space.quadratic(constant) * (1 - 1e-9)).all()


@pytest.mark.parametrize("width", [1, 3, 8, 21])
def test_half_of_an_outer_product_is_all_of_it(width: int) -> None:
    states = torch.randn(30, width, generator=torch.Generator().manual_seed(width))
    sums = torch.zeros(1, width, width, dtype=torch.float64)
    for part in states.split(10):
        add_outer(sums[0], part)
    if width > 4:
        assert sums[0].tril(-width + 1).eq(0).all()
    (found,) = mirrored(sums)
    torch.testing.assert_close(found, states.double().T @ states.double(), rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T)


def test_space_survives_its_tensors() -> None:
    space = fit_space(statistics_of(make_samples()))
    tensors = space.to_tensors()
    assert set(tensors) == {
        f"layers.{i}.{part}" for i in range(2) for part in ("mean", "covariance_factor", "covariance_diagonal")
    }
    again = RouterSpace.from_tensors({name: tiny.raw(tensor) for name, tensor in tensors.items()})
    for part in ("mean", "factor", "diagonal"):
        assert torch.equal(getattr(again, part), getattr(space, part))
        assert getattr(again, part).dtype == torch.float32


def test_kinds_add_their_covariance_to_how_text_usually_varies_and_to_nothing_else() -> None:
    samples = make_samples()
    plain = fit_space(statistics_of(samples))
    kinds = [covariance_of(make_samples(seed)).float() for seed in (1, 2)]
    space = fit_space(statistics_of(samples), kinds)
    assert torch.equal(space.factor, plain.factor)
    assert torch.equal(space.diagonal, plain.diagonal)
    assert torch.equal(space.constant(), plain.constant())
    for layer in range(2):
        mixed = covariance_of(samples)[layer] + VARIETY * (kinds[0][layer] + kinds[1][layer]).double() / 2
        shrunk = mixed + SHRINKAGE * mixed.diagonal().mean() * torch.eye(8)
        torch.testing.assert_close(space.usual(layer), shrunk, rtol=1e-4, atol=1e-4)
        assert torch.equal(plain.usual(layer), plain.covariance(layer))
    again = RouterSpace.from_tensors({name: tiny.raw(tensor) for name, tensor in space.to_tensors().items()})
    assert torch.equal(again.usual(0), space.usual(0))
    assert not any("variety" in name for name in plain.to_tensors())


def test_space_without_layers_is_refused() -> None:
    with pytest.raises(BundleError, match=r"router-space\.safetensors"):
        RouterSpace.from_tensors({})


@torch.no_grad()
def router_inputs(config: dict[str, object], batch: Tensor) -> Tensor:
    """What enters each layer's feed-forward network in the stock dense model, (L, B, S, H)."""
    model, found = tiny.make_dense(config), []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _module, given: found.append(given[0]))
    model(batch)
    return torch.stack(found)


def test_measured_inputs_are_the_stock_model_s_but_for_the_first_position() -> None:
    config = tiny.dense_config()
    model = tiny.build(tiny.make_weights(config))
    batches = [tiny.some_tokens(3, 10, seed=1), tiny.some_tokens(2, 10, seed=2)]
    found = measure_inputs(model, batches)
    direct = torch.cat([router_inputs(config, batch)[:, :, 1:].flatten(1, 2) for batch in batches], dim=1).double()
    assert found.count == direct.shape[1] == 5 * 9
    torch.testing.assert_close(found.mean, direct.mean(dim=1), rtol=0, atol=1e-6)
    second = torch.einsum("lth,ltk->lhk", direct, direct) / found.count
    torch.testing.assert_close(found.second, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batches", [[], [tiny.some_tokens(1, 2)]], ids=["nothing", "one token"])
def test_measuring_what_cannot_vary_is_refused(batches: list[Tensor]) -> None:
    with pytest.raises(UsageError, match="too little public text"):
        measure_inputs(tiny.build(tiny.make_weights(tiny.dense_config())), batches)


def test_document_means_are_the_stock_model_s() -> None:
    config = tiny.dense_config()
    model = tiny.build(tiny.make_weights(config))
    documents = [tiny.some_tokens(1, length, seed=length)[0] for length in (2, 9, 30)]
    found = measure_documents(model, iter(documents))
    assert found.shape == (3, 2, 32)
    for mean, tokens in zip(found, documents, strict=True):
        direct = router_inputs(config, tokens[None])[:, 0, 1:].mean(dim=1)
        torch.testing.assert_close(mean, direct, rtol=0, atol=1e-5)
    assert all(block.observer is None for block in routed_layers(model))


def test_one_document_is_too_few() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    with pytest.raises(UsageError, match="at least two"):
        measure_documents(model, [tiny.some_tokens(1, 5)[0]])


def test_documents_of_like_length_go_through_together_and_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    documents = [tiny.some_tokens(1, length, seed=length)[0] for length in (30, 2, 9, 31, 3, 29)]
    alone, sizes, told = measure_documents(model, documents), [], []
    handle = model.model.register_forward_pre_hook(lambda _module, given: sizes.append(tuple(given[0].shape)))
    monkeypatch.setattr("flexctl.routing.space.BATCH_TOKENS", 60)
    found = measure_documents(model, documents, told.append)
    handle.remove()
    assert sizes == [(3, 9), (2, 30), (1, 31)]
    assert told == [3, 2, 1]
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
