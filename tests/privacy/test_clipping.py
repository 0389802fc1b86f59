"""Clipped sums are those of one document at a time, in every family, and no document moves one by more than C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn

from flexctl.errors import FlexctlError
from flexctl.model.losses import training_loss
from flexctl.model.lowrank import LowRankDifference
from flexctl.privacy.clipping import PerDocument
from flexctl.privacy.documents import padded
from flexctl.training.pair import Pair

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["olmo2", "qwen3", "llama", "mistral"]
LENGTHS = (17, 5, 30, 2, 11)
DOCUMENTS = [tiny.some_tokens(1, length, seed=i)[0].numpy() for i, length in enumerate(LENGTHS)]


def make(family: str = "olmo2", rank: int | None = None) -> tuple[Any, list[nn.Parameter]]:
    """A model with a pair whose expert has moved, so that no B is zero."""
    model = tiny.build(tiny.make_weights(tiny.dense_config(family)))
    rows = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    pair = Pair(model, rows, public_match=1.0, rank=rank)
    (group,) = pair.groups()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in group.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model, list(group.parameters)


def passing(model: Any, documents: Sequence[Any], rows: int, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
    batch = padded(documents, rows)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            return training_loss(model, batch.inputs, batch.targets, 1e-5, batch.weights)

    return run


def one_at_a_time(model: Any, parameters: Sequence[nn.Parameter]) -> list[list[Tensor]]:
    """Each document's gradient by plain autograd on it alone, without padding."""
    found = []
    for document in DOCUMENTS:
        tokens = torch.from_numpy(document)[None]
        loss = training_loss(model, tokens[:, :-1], tokens[:, 1:], 1e-5) / (len(document) - 1)
        found.append(list(torch.autograd.grad(loss, parameters)))
    return found


def length(gradient: Sequence[Tensor]) -> float:
    return float(torch.stack([part.double().square().sum() for part in gradient]).sum().sqrt())


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_clipped_sum_is_that_of_one_document_at_a_time(family: str, rank: int | None) -> None:
    model, parameters = make(family, rank)
    sums = PerDocument(model, parameters)
    alone = one_at_a_time(model, parameters)
    norms = [length(gradient) for gradient in alone]
    found = sums.norms(passing(model, DOCUMENTS, 7), 7)
    assert found[:5].tolist() == pytest.approx(norms, rel=1e-5)
    assert found[5:].tolist() == [0.0, 0.0]
    clip = sorted(norms)[2]
    clipped = sums.clipped_sum(passing(model, DOCUMENTS, 7), 7, clip)
    scales = [min(1.0, clip * 0.999 / norm) for norm in norms]
    assert sum(scale < 1 for scale in scales) == 3
    for i, part in enumerate(clipped):
        expected = sum(scale * gradient[i] for scale, gradient in zip(scales, alone, strict=True))
        assert (part - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_and_chunks_of_logits_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, parameters = make(rank=4)
    sums = PerDocument(model, parameters)
    whole = sums.clipped_sum(passing(model, DOCUMENTS, 5), 5, 0.3)
    monkeypatch.setattr("flexctl.model.losses.LOGIT_BUDGET", 24 * tiny.VOCAB_SIZE)
    parts = [
        sums.clipped_sum(passing(model, DOCUMENTS[first : first + size], size), size, 0.3)
        for first in range(0, 5, size)
    ]
    for i, expected in enumerate(whole):
        assert (sum(part[i] for part in parts) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_document_more_moves_the_sum_by_at_most_the_clip(
    family: str, rank: int | None, dtype: torch.dtype | None
) -> None:
    model, parameters = make(family, rank)
    sums, clip = PerDocument(model, parameters), 0.02
    whole = sums.clipped_sum(passing(model, DOCUMENTS, 5, dtype), 5, clip)
    for left_out in range(5):
        others = [document for i, document in enumerate(DOCUMENTS) if i != left_out]
        without = sums.clipped_sum(passing(model, others, 5, dtype), 5, clip)
        moved = length([one - other for one, other in zip(whole, without, strict=True)])
        assert 0.9 * clip < moved <= clip


def test_a_document_that_is_not_finite_counts_nothing() -> None:
    model, parameters = make()
    sums = PerDocument(model, parameters)
    expected = sums.clipped_sum(passing(model, DOCUMENTS[1:], 5), 5, 0.1)
    batch = padded(DOCUMENTS, 5)
    batch.weights[0] = float("nan")
    found = sums.clipped_sum(lambda: training_loss(model, batch.inputs, batch.targets, 1e-5, batch.weights), 5, 0.1)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_it_leaves_no_gradient_and_watches_nothing_afterwards() -> None:
    model, parameters = make()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    sums = PerDocument(model, parameters)
    sums.clipped_sum(passing(model, DOCUMENTS, 5), 5, 0.1)
    assert all(parameter.grad is None for parameter in model.parameters())
    sums.close()
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks


def test_what_trains_is_covered_by_one_known_module_each_or_refused() -> None:
    model, parameters = make()
    with pytest.raises(FlexctlError, match="not covered by exactly one linear map"):
        PerDocument(model, parameters[1:])
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(FlexctlError, match=r"model\.norm trains and is no linear map"):
        PerDocument(model, parameters)


def test_a_matrix_of_two_modules_or_of_none_is_refused() -> None:
    twins = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    twins[1].weight = twins[0].weight
    with pytest.raises(FlexctlError, match="not covered by exactly one"):
        PerDocument(twins, [twins[0].weight])
    with pytest.raises(FlexctlError, match="not covered by exactly one"):
        PerDocument(nn.Sequential(), [nn.Parameter(torch.zeros(2))])
    biased = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(FlexctlError, match="0 trains and is no linear map"):
        PerDocument(biased, list(biased.parameters()))


def test_a_module_that_runs_twice_or_not_at_all_is_refused() -> None:
    layer = nn.Linear(3, 3, bias=False)
    sums = PerDocument(layer, [layer.weight])
    data = torch.from_numpy(np.ones((2, 3), dtype=np.float32))
    with pytest.raises(FlexctlError, match="ran twice in one pass"):
        sums.clipped_sum(lambda: layer(layer(data)).sum(), 1, 1.0)
    sums = PerDocument(layer, [layer.weight])
    with pytest.raises(FlexctlError, match="did not run"):
        sums.clipped_sum(lambda: data.sum(), 1, 1.0)


def test_both_factors_of_a_low_rank_map_are_covered() -> None:
    low = LowRankDifference(torch.zeros(3, 3), 2, torch.Generator())
    assert PerDocument(low, [low.a, low.b]).norms(lambda: low(torch.ones(2, 3)).sum(), 1) > 0
