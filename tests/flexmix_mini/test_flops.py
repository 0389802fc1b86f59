"""The accounting of floating-point operations equals what torch counts, attention scores aside."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from flops import Matrices
from torch.utils.flop_counter import FlopCounterMode
from upcycled import upcycle

from flexctl.model.routed import set_top_k

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny.dense_config()
MATRICES = Matrices.of(CONFIG)
PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm"}


def counted(model: Any, *, backward: bool) -> float:
    """Operations a token in matrix products; those of attention scores go through another operator."""
    tokens = tiny.some_tokens(batch=1, length=48)
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens, labels=tokens, use_cache=False).loss
        if backward:
            loss.backward()
    found = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in found.items() if str(operator) in PRODUCTS) / 48


def test_sizes_are_those_of_the_model() -> None:
    shapes = {name: value.numel() for name, value in tiny.make_dense(CONFIG).state_dict().items() if value.ndim == 2}
    layer = [size for name, size in shapes.items() if ".layers.0." in name]
    assert MATRICES.attention + MATRICES.feed_forward == sum(layer)
    assert MATRICES.head == shapes["lm_head.weight"]
    assert Matrices.of(tiny.dense_config("qwen3", head_dim=16)).attention == 2 * 32 * 16 * 6


def test_dense_model_costs_six_a_weight() -> None:
    model = tiny.make_dense(CONFIG)
    assert counted(model, backward=False) == pytest.approx(MATRICES.forward(), rel=0.01)
    assert counted(model, backward=True) == pytest.approx(MATRICES.training(), rel=0.01)
    weights = MATRICES.layers * (MATRICES.attention + MATRICES.feed_forward) + MATRICES.head
    assert MATRICES.training() == 6 * weights


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixture_costs_its_active_experts(top_k: int) -> None:
    model = tiny.build(tiny.make_weights(CONFIG))
    upcycle(model, 4, top_k, seed=0)
    set_top_k(model, top_k)
    model.requires_grad_(True)
    assert counted(model, backward=False) == pytest.approx(MATRICES.forward(top_k, 4), rel=0.01)
    assert counted(model, backward=True) == pytest.approx(MATRICES.training(top_k, 4), rel=0.03)


def test_pair_pays_no_weight_gradient_for_what_is_frozen() -> None:
    from flexctl.model.building import add_expert

    model = tiny.build(tiny.make_weights(CONFIG))
    add_expert(model, 0.1 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    assert counted(model, backward=True) == pytest.approx(MATRICES.pair_training(), rel=0.03)
    assert MATRICES.pair_training() < MATRICES.training(2, 2)
