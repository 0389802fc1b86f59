"""Router rows: calibrated against public text, blind to each other, and still the posterior of the right mixture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexctl.errors import UsageError
from flexctl.routing.rows import (
    MAX_NOISE,
    MAX_NOISE_SHARE,
    OwnerInputs,
    bias_of,
    discriminant,
    finish_rows,
    row_logits,
    set_bias,
)
from flexctl.routing.space import (
    PassageInputs,
    RouterSpace,
    fit_space,
    measure_documents,
    measure_inputs,
    measure_passages,
)

LAYERS, HIDDEN = 3, 8

pytestmark = pytest.mark.usefixtures("one_thread")


def make_space(seed: int = 0, *, constant_noise: float = 0.01, layers: int = LAYERS) -> RouterSpace:
    """A space whose last coordinate is nearly constant at 1, so that u is nearly that coordinate."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(layers, HIDDEN, HIDDEN, generator=generator)
    factor[:, :, -1] = 0
    diagonal = torch.full((layers, HIDDEN), 0.3)
    diagonal[:, -1] = constant_noise**2
    mean = torch.randn(layers, HIDDEN, generator=generator)
    mean[:, -1] = 1
    return RouterSpace(mean=mean, factor=factor, diagonal=diagonal)


def make_owner(space: RouterSpace, seed: int, *, distance: float = 1.0, uncertainty: float = 0.0) -> OwnerInputs:
    """An owner whose mean is off the public one in all but the last coordinate; their own covariance is none."""
    shift = distance * torch.randn(space.mean.shape, generator=torch.Generator().manual_seed(seed)).double()
    shift[:, -1] = 0
    unsure = torch.full((len(shift),), uncertainty, dtype=torch.float64)
    within = torch.zeros(len(shift), HIDDEN, HIDDEN)
    return OwnerInputs(mean=space.mean.double() + shift, within=within, uncertainty=unsure)


def direction(kind: str, space: RouterSpace, owner: OwnerInputs) -> Tensor:
    return discriminant(space, owner, 0.0) if kind == "discriminant" else owner.mean - space.mean.double()


def rows_of(space: RouterSpace, owner: OwnerInputs, kind: str = "discriminant") -> Tensor:
    return finish_rows(space, owner, direction(kind, space, owner)).rows


seeds = st.integers(0, 2**31)


@given(
    seed=seeds,
    kind=st.sampled_from(["discriminant", "hidden", "random"]),
    distance=st.floats(0.01, 5),
    uncertainty=st.floats(0, 3),
    noise=st.floats(1e-3, 2),
)
@settings(max_examples=60, deadline=None)
def test_mean_logit_on_public_text_is_the_bias(
    seed: int, kind: str, distance: float, uncertainty: float, noise: float
) -> None:
    space = make_space(seed, constant_noise=noise)
    owner = make_owner(space, seed + 1, distance=distance, uncertainty=uncertainty)
    random = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
    found = finish_rows(space, owner, random if kind == "random" else direction(kind, space, owner))
    logits = (found.rows.double() * space.mean.double()).sum(dim=1)
    scale = (found.rows.double().abs() * space.mean.double().abs()).sum(dim=1)
    assert ((logits - found.bias).abs() <= 1e-5 * (1 + scale)).all()
    assert (found.bias <= 1e-9).all()
    most = MAX_NOISE_SHARE * (found.distance + uncertainty) / 2
    assert (found.noise <= most.clamp(min=MAX_NOISE) + 1e-9).all()
    assert (found.scale >= 0).all()
    torch.testing.assert_close(bias_of(found.rows, space), found.bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["discriminant", "hidden"])
def test_row_rises_from_public_to_the_owner_s_text_as_much_as_it_falls_below_zero(kind: str) -> None:
    """Halfway between the two means the logit is zero: owner and public are even there."""
    space = make_space(constant_noise=1e-4)
    owner = make_owner(space, 1)
    rows = rows_of(space, owner, kind).double()
    halfway = (space.mean.double() + owner.mean) / 2
    torch.testing.assert_close((rows * halfway).sum(dim=1), torch.zeros(LAYERS).double(), rtol=0, atol=1e-3)
    assert ((rows * owner.mean).sum(dim=1) > 0).all()


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_rows_made_apart_give_the_posterior_of_the_gaussian_mixture(seed: int) -> None:
    space = make_space(seed, constant_noise=1e-4, layers=1)
    owners = [make_owner(space, seed + i, distance=1.0) for i in (1, 2, 3)]
    rows = torch.cat([torch.zeros(1, HIDDEN), *(rows_of(space, owner) for owner in owners)]).double()
    means = [space.mean[0].double(), *(owner.mean[0] for owner in owners)]
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.stack(means).repeat_interleave(20, dim=0)
    inputs[:, :-1] += torch.randn(len(inputs), HIDDEN - 1, generator=generator).double()

    densities = [
        torch.distributions.MultivariateNormal(mean, covariance_matrix=space.covariance(0)).log_prob(inputs)
        for mean in means
    ]
    posterior = torch.stack(densities, dim=1).softmax(dim=1)
    routed = (inputs @ rows.T).softmax(dim=1)
    torch.testing.assert_close(routed, posterior, rtol=0, atol=2e-3)
    assert posterior.max() - posterior.min() > 0.4


def test_discriminant_has_scale_one_and_half_the_distance_as_bias() -> None:
    space = make_space()
    owner = make_owner(space, 1, distance=0.3)
    found = finish_rows(space, owner, direction("discriminant", space, owner))
    assert (found.noise < MAX_NOISE).all()
    torch.testing.assert_close(found.scale, torch.ones(LAYERS).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.bias, -found.distance / 2, rtol=1e-4, atol=1e-6)
    shift = owner.mean - space.mean.double()
    direct = torch.stack([d @ torch.linalg.inv(space.covariance(i)) @ d for i, d in enumerate(shift)])
    torch.testing.assert_close(found.distance, direct, rtol=1e-8, atol=0)


@pytest.mark.parametrize("length", [1e-3, 7.0])
def test_length_of_the_direction_does_not_matter(length: float) -> None:
    space = make_space()
    owner = make_owner(space, 1)
    shift = direction("hidden", space, owner)
    torch.testing.assert_close(
        finish_rows(space, owner, length * shift).rows, finish_rows(space, owner, shift).rows, rtol=1e-4, atol=1e-5
    )


def test_direction_that_points_away_from_the_owner_gives_an_empty_row() -> None:
    space = make_space()
    owner = make_owner(space, 1)
    found = finish_rows(space, owner, -direction("hidden", space, owner))
    assert not found.rows.any()
    assert not found.bias.any()


def with_noise(space: RouterSpace, variance: float) -> RouterSpace:
    """Return a space whose second layer has another variance in its last dimension."""
    noisy = RouterSpace(mean=space.mean, factor=space.factor, diagonal=space.diagonal.clone())
    noisy.diagonal[1, -1] = variance
    return noisy


def test_noisy_layer_is_scaled_down_to_one_nat_and_no_other() -> None:
    space = make_space()
    noisy = with_noise(space, 25.0)
    owner = make_owner(space, 1, distance=1.0)
    quiet_rows = finish_rows(space, owner, direction("discriminant", space, owner))
    found = finish_rows(noisy, owner, direction("discriminant", noisy, owner))
    assert quiet_rows.noise[[0, 2]].max() < MAX_NOISE
    assert float(found.noise[1]) == pytest.approx(MAX_NOISE)
    assert torch.equal(found.rows[[0, 2]], quiet_rows.rows[[0, 2]])
    assert float(found.scale[1]) < 1
    torch.testing.assert_close(bias_of(found.rows, noisy), found.bias, rtol=1e-4, atol=1e-5)


def test_noise_that_is_small_beside_the_bias_costs_a_far_row_nothing() -> None:
    """All owners' rows keep one scale, or the one that was scaled down would lose its text to the others."""
    space = make_space()
    noisy = with_noise(space, 0.04)
    owner = make_owner(space, 1, distance=12.0)
    found = finish_rows(noisy, owner, direction("discriminant", noisy, owner))
    assert MAX_NOISE < float(found.noise[1]) < MAX_NOISE_SHARE * -float(found.bias[1])
    torch.testing.assert_close(found.scale, torch.ones(LAYERS).double(), rtol=1e-6, atol=0)


def test_small_samples_shrink_rows_and_tiny_ones_empty_them() -> None:
    space = make_space()
    sure = finish_rows(space, make_owner(space, 1), direction("discriminant", space, make_owner(space, 1)))
    half = float(sure.distance.min()) / 2
    for uncertainty, smallest, largest in ((half, 0.4, 0.99), (float(sure.distance.max()) * 2, 0.0, 0.0)):
        owner = make_owner(space, 1, uncertainty=uncertainty)
        found = finish_rows(space, owner, direction("discriminant", space, owner))
        ratio = found.rows.norm(dim=1) / sure.rows.norm(dim=1)
        assert (ratio >= smallest).all()
        assert (ratio <= largest).all()
        torch.testing.assert_close(found.distance, (sure.distance - uncertainty).clamp(min=0), rtol=1e-6, atol=1e-9)


def inputs_of(means: Tensor) -> PassageInputs:
    """Passages inside which nothing varies."""
    return PassageInputs(means=means, within=torch.zeros(means.shape[1], HIDDEN, HIDDEN))


def test_uncertainty_of_a_mean_is_measured_from_the_documents() -> None:
    space = make_space()
    documents = torch.randn(7, LAYERS, HIDDEN)
    owner = OwnerInputs.of(inputs_of(documents), space)
    torch.testing.assert_close(owner.mean, documents.double().mean(dim=0))
    for layer in range(LAYERS):
        inverse = torch.linalg.inv(space.covariance(layer))
        apart = documents[:, layer].double() - owner.mean[layer]
        direct = sum(float(d @ inverse @ d) for d in apart) / (7 * 6)
        assert float(owner.uncertainty[layer]) == pytest.approx(direct, rel=1e-8)


def test_distance_of_public_documents_from_public_is_nothing_on_average() -> None:
    """Without the correction it is hidden_size / documents, here 0.8."""
    space = make_space(layers=1)
    normal = torch.distributions.MultivariateNormal(space.mean[0].double(), covariance_matrix=space.covariance(0))
    torch.manual_seed(0)
    raw, corrected = [], []
    for _ in range(200):
        owner = OwnerInputs.of(inputs_of(normal.sample((10,))[:, None]), space)
        shift = owner.mean - space.mean.double()
        raw.append(float((shift * space.solve(shift)).sum()))
        corrected.append(raw[-1] - float(owner.uncertainty[0]))
    assert sum(raw) / len(raw) == pytest.approx(0.8, rel=0.15)
    assert abs(sum(corrected) / len(corrected)) < 0.1


@torch.no_grad()
def test_row_logits_are_rows_times_router_inputs() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    candidates = [torch.randn(2, 32), torch.randn(2, 32)]
    documents = [tiny.some_tokens(1, length, seed=length)[0] for length in (6, 11)]
    found = row_logits(model, candidates, documents)
    assert [logits.shape for logits in found] == [(5 + 10, 2), (5 + 10, 2)]
    for layer, logits in enumerate(found):
        direct = []
        for tokens in documents:
            inputs: list[Tensor] = []
            handle = model.model.layers[layer].mlp.register_forward_pre_hook(
                lambda _module, given, inputs=inputs: inputs.append(given[0])
            )
            model(tokens[None])
            handle.remove()
            direct.append(inputs[0][0, 1:] @ torch.stack([row[layer] for row in candidates]).T)
        torch.testing.assert_close(logits, torch.cat(direct), rtol=0, atol=1e-5)


@given(seed=seeds, share=st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_discriminant_is_that_of_public_s_and_the_owner_s_covariance_blended(seed: int, share: float) -> None:
    space = make_space(seed)
    spread = torch.randn(LAYERS, 20, HIDDEN, generator=torch.Generator().manual_seed(seed + 2))
    owner = replace(make_owner(space, seed + 1), within=spread.transpose(1, 2) @ spread / 20)
    found = discriminant(space, owner, share)
    for layer in range(LAYERS):
        blended = (1 - share) * space.covariance(layer) + share * owner.within[layer].double()
        shift = owner.mean[layer] - space.mean[layer].double()
        torch.testing.assert_close(blended @ found[layer], shift, rtol=1e-6, atol=1e-8)


def test_own_covariance_turns_a_row_away_from_where_the_owner_s_text_varies() -> None:
    """Two owners are off public along the first coordinate, and in one of their own: the first marks neither."""
    space = RouterSpace(mean=torch.eye(HIDDEN)[-1:], factor=torch.zeros(1, 1, HIDDEN), diagonal=torch.ones(1, HIDDEN))
    space.diagonal[0, -1] = 1e-4
    common, own, other = torch.eye(HIDDEN)[:3].double()
    varies = 50 * torch.outer(common, common)[None].float()
    unsure = torch.zeros(1, dtype=torch.float64)
    owners = [
        OwnerInputs(mean=space.mean.double() + 4 * common + 2 * mark, within=varies, uncertainty=unsure)
        for mark in (own, other)
    ]

    def overlap(share: float) -> float:
        mine, theirs = (finish_rows(space, owner, discriminant(space, owner, share)).rows.double() for owner in owners)
        noise = torch.randn(4000, HIDDEN, generator=torch.Generator().manual_seed(0)).double()
        noise[:, 0] *= 50**0.5
        noise[:, -1] = 0
        inputs = owners[0].mean + noise
        logits = torch.cat([torch.zeros(4000, 1), inputs @ mine.T, inputs @ theirs.T], dim=1)
        return float(logits.softmax(dim=1)[:, 1].mean())

    assert overlap(0.1) > overlap(0.0) + 0.03


@torch.no_grad()
def test_passages_inputs_are_their_means_and_the_covariance_about_each_one_s_own() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    passages = [tiny.some_tokens(1, length, seed=length)[0] for length in (6, 11, 9)]
    found = measure_passages(model, passages)
    assert torch.equal(found.means, measure_documents(model, passages))
    for layer in range(2):
        scatter, freedom = torch.zeros(32, 32), 0
        for tokens in passages:
            inputs: list[Tensor] = []
            handle = model.model.layers[layer].mlp.register_forward_pre_hook(
                lambda _module, given, inputs=inputs: inputs.append(given[0][0, 1:])
            )
            model(tokens[None])
            handle.remove()
            scatter += torch.cov(inputs[0].T) * (len(inputs[0]) - 1)
            freedom += len(inputs[0]) - 1
        torch.testing.assert_close(found.within[layer], scatter / freedom, rtol=1e-4, atol=1e-6)
    with pytest.raises(UsageError, match="at least two"):
        measure_passages(model, passages[:1])


def test_rows_tell_two_kinds_of_tokens_apart_in_a_model() -> None:
    """Public text is made of half the vocabulary, the owner's of six other words."""
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    generator = torch.Generator().manual_seed(3)

    def documents(words: tuple[int, int], count: int) -> list[Tensor]:
        return [torch.randint(*words, (20,), generator=generator) for _ in range(count)]

    public, own = (2, 150), (160, 166)
    space = fit_space(measure_inputs(model, [torch.stack(documents(public, 60))]))
    rows = rows_of(space, OwnerInputs.of(measure_passages(model, documents(own, 40)), space))
    ours, theirs = (row_logits(model, [rows], documents(words, 20)) for words in (own, public))
    for layer in range(2):
        assert (ours[layer] > 0).float().mean() > 0.6
        assert (theirs[layer] < 0).float().mean() > 0.6


@given(seed=seeds, mean=st.floats(-5, 0))
@settings(max_examples=30, deadline=None)
def test_rows_get_the_bias_that_is_set(seed: int, mean: float) -> None:
    space = make_space(seed, constant_noise=1e-3)
    rows = rows_of(space, make_owner(space, seed + 1))
    moved = set_bias(rows, space, mean)
    assert bias_of(moved, space).tolist() == pytest.approx([mean] * LAYERS, abs=1e-4)
    expected = rows.double() + (mean - bias_of(rows, space))[:, None] * space.constant()
    assert torch.allclose(moved.double(), expected, atol=1e-5)
