"""Losses without the whole batch's logits: the same numbers and gradients as with them."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch.nn import functional as F

from flexctl.model import losses
from flexctl.model.building import add_expert
from flexctl.model.losses import score_tokens, training_loss

pytestmark = pytest.mark.usefixtures("one_thread")

BUDGETS = [1, tiny.VOCAB_SIZE, 7 * tiny.VOCAB_SIZE, 10**9]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """A pair whose second expert and rows train."""
    made = tiny.build(tiny.make_weights(tiny.dense_config()))
    torch.manual_seed(1)
    add_expert(made, 0.5 * torch.randn(2, 32))
    return made


def plain_loss(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor, z_loss: float) -> torch.Tensor:
    logits = model(inputs).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss + z_loss * logits.logsumexp(dim=-1).square().sum()


@pytest.mark.parametrize("budget", BUDGETS)
def test_training_loss_and_gradients_do_not_depend_on_chunks(
    model: torch.nn.Module, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BUDGET", budget)
    tokens = tiny.some_tokens(3, 12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 6
    expected = plain_loss(model, tokens[:, :-1], tokens[:, 1:], 0.01)
    found = training_loss(model, tokens[:, :-1], tokens[:, 1:], 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    gradients = zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True)
    for one, other in gradients:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert one.abs().sum() > 0


def test_every_weight_of_the_whole_model_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's own too, tied to the embedding or not."""
    monkeypatch.setattr(losses, "LOGIT_BUDGET", 7 * tiny.VOCAB_SIZE)
    tokens = tiny.some_tokens(3, 12)
    for tied in (False, True):
        dense = tiny.make_dense(tiny.dense_config(tie_word_embeddings=tied)).requires_grad_(True)
        trained = list(dense.parameters())
        expected = torch.autograd.grad(plain_loss(dense, tokens[:, :-1], tokens[:, 1:], 0.01), trained)
        found = torch.autograd.grad(training_loss(dense, tokens[:, :-1], tokens[:, 1:], 0.01) * 3, trained)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, 3 * other, rtol=1e-4, atol=1e-3)


def test_positions_count_by_their_weights(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of weight 0 is as if it were not there."""
    monkeypatch.setattr(losses, "LOGIT_BUDGET", 4 * tiny.VOCAB_SIZE)
    tokens = tiny.some_tokens(3, 12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.zeros(3, 11)
    weights[1] = 0.5
    found = training_loss(model, tokens[:, :-1], tokens[:, 1:], 0.01, weights)
    expected = 0.5 * training_loss(model, tokens[1:2, :-1], tokens[1:2, 1:], 0.01)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one, other in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_products_stay_near_float32(model: torch.nn.Module) -> None:
    tokens = tiny.some_tokens(3, 12)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = training_loss(model, tokens[:, :-1], tokens[:, 1:], 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = training_loss(model, tokens[:, :-1], tokens[:, 1:], 0.01)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for one, other in zip(torch.autograd.grad(found, trained), torch.autograd.grad(expected, trained), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_z_loss_adds_the_squared_log_partition(model: torch.nn.Module) -> None:
    tokens = tiny.some_tokens(2, 9)
    with torch.no_grad():
        without, with_z = (training_loss(model, tokens[:, :-1], tokens[:, 1:], z) for z in (0.0, 0.5))
        square = model(tokens[:, :-1]).logits.logsumexp(dim=-1).square().sum()
    torch.testing.assert_close(with_z - without, 0.5 * square, rtol=1e-5, atol=0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_scores_are_the_stock_class_s_own_loss(
    model: torch.nn.Module, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGIT_BUDGET", budget)
    tokens = tiny.some_tokens(3, 12)
    found = score_tokens(model, tokens[:, :-1], tokens[:, 1:])
    assert found.shape == (3, 11)
    assert not found.requires_grad
    for row, scored in zip(tokens, found, strict=True):
        with torch.no_grad():
            expected = model(row[None], labels=row[None]).loss
        torch.testing.assert_close(scored.mean(), expected, rtol=1e-5, atol=0)


def test_chunks_do_bound_the_logits(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGIT_BUDGET", 4 * tiny.VOCAB_SIZE)
    sizes = []
    linear = F.linear

    def watching(*given: torch.Tensor) -> torch.Tensor:
        made = linear(*given)
        if made.shape[-1] == tiny.VOCAB_SIZE:
            sizes.append(made.numel())
        return made

    monkeypatch.setattr(F, "linear", watching)
    tokens = tiny.some_tokens(3, 12)
    training_loss(model, tokens[:, :-1], tokens[:, 1:], 0.0).backward()
    assert max(sizes) == 4 * tiny.VOCAB_SIZE
    assert sum(sizes) == 33 * tiny.VOCAB_SIZE  # and none once more going backwards
    sizes.clear()
    score_tokens(model, tokens[:, :-1], tokens[:, 1:])
    assert max(sizes) == 4 * tiny.VOCAB_SIZE
    assert sum(sizes) == 33 * tiny.VOCAB_SIZE
    model.zero_grad(set_to_none=True)
