"""Rows under a guarantee: of a plain mean where nothing is clipped or noised, and one document's share is bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from flexctl.privacy.documents import Padded, padded
from flexctl.privacy.noise import Secret
from flexctl.routing.noised_rows import clipped_shifts, document_shifts, private_rows, shift_norm
from flexctl.routing.rows import OwnerInputs, discriminant, finish_rows
from flexctl.routing.space import RouterSpace, fit_space, measure_documents, measure_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

SECRET = Secret(bytes(range(32)))
DOCUMENTS = [tiny.some_tokens(1, 6 + 3 * i, seed=10 + i)[0] % 40 + 2 for i in range(9)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(tiny.make_weights(tiny.dense_config()))


@pytest.fixture(scope="module")
def space(model: Any) -> RouterSpace:
    return fit_space(measure_inputs(model, [tiny.some_tokens(8, 24, seed=3)]))


def batches(documents: Sequence[Tensor] = DOCUMENTS, size: int = 4) -> Iterator[Padded]:
    for first in range(0, len(documents), size):
        yield padded([document.numpy() for document in documents[first : first + size]], size)


def rows(model: Any, space: RouterSpace, kind: str = "discriminant", **changes: Any) -> Any:
    told: dict[str, Any] = {"documents": len(DOCUMENTS), "clip": 1e3, "noise_multiplier": 1e-9}
    return private_rows(kind, model, space, batches(), stream=SECRET.stream("rows"), **{**told, **changes})


@pytest.mark.parametrize("kind", ["discriminant", "hidden"])
def test_without_noise_they_are_those_of_the_documents_mean(model: Any, space: RouterSpace, kind: str) -> None:
    means = measure_documents(model, [document[:-1] for document in DOCUMENTS]).double().mean(dim=0)
    owner = OwnerInputs(mean=means, within=torch.zeros(2, 32, 32), uncertainty=torch.zeros(2).double())
    directions = discriminant(space, owner, 0.0) if kind == "discriminant" else means - space.mean.double()
    expected = finish_rows(space, owner, directions)
    found = rows(model, space, kind)
    assert (found.rows - expected.rows).abs().max() <= 1e-4 * expected.rows.abs().max()


def test_a_shift_has_length_one_in_units_of_public_variation(model: Any, space: RouterSpace) -> None:
    (shifts,) = document_shifts(model, space, batches(DOCUMENTS[:2], 3))
    means = measure_documents(model, [document[:-1] for document in DOCUMENTS[:2]]).double() - space.mean.double()
    expected = (means * space.solve(means)).sum(dim=(1, 2))
    assert shifts.square().sum(dim=(1, 2)).tolist() == pytest.approx([*expected.tolist(), 0.0], rel=1e-4)
    assert shift_norm(model, space, batches(DOCUMENTS[:2], 2)) == pytest.approx(float(expected.min().sqrt()), rel=1e-4)


def test_one_document_more_moves_the_sum_by_at_most_the_clip(model: Any, space: RouterSpace) -> None:
    clip = 0.5 * shift_norm(model, space, batches(DOCUMENTS[:8]))
    whole = clipped_shifts(model, space, batches(), clip)
    for left_out in range(len(DOCUMENTS)):
        others = [document for i, document in enumerate(DOCUMENTS) if i != left_out]
        moved = (whole - clipped_shifts(model, space, batches(others), clip)).norm()
        assert 0.99 * clip < moved <= clip


def test_noise_is_of_the_size_that_is_claimed_and_rows_know_it(model: Any, space: RouterSpace) -> None:
    """The mean's noise is clip times multiplier over documents; as much is taken off the distance as uncertain."""
    plain, noised = (rows(model, space, noise_multiplier=noise, clip=2.0) for noise in (1e-9, 3.0))
    assert not torch.allclose(plain.rows, noised.rows, rtol=0.1)
    swamped = rows(model, space, noise_multiplier=1e4, clip=2.0)
    assert swamped.scale.max() < 0.2
    again = rows(model, space, noise_multiplier=3.0, clip=2.0)
    assert torch.equal(again.rows, noised.rows)
