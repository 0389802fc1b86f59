"""The routed block against the formula, worked out expert by expert and token by token."""

from __future__ import annotations

import collections
import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flexctl.model.routed import (
    RoutedFeedForward,
    Router,
    exclude,
    masking,
    observing,
    routed_layers,
    set_top_k,
    token_mask,
)

HIDDEN, TOKENS = 6, 17

pytestmark = pytest.mark.usefixtures("one_thread")


def make_block(experts: int, top_k: int, renormalise: bool) -> RoutedFeedForward:
    torch.manual_seed(experts)
    modules = [nn.Sequential(nn.Linear(HIDDEN, 9), nn.SiLU(), nn.Linear(9, HIDDEN)) for _ in range(experts)]
    return RoutedFeedForward(modules, Router(torch.randn(experts, HIDDEN)), top_k, renormalise).eval()


def reference(block: RoutedFeedForward, inputs: Tensor, present: list[int]) -> tuple[Tensor, Tensor]:
    """Outputs and kept probabilities by the definition, over the experts that are there."""
    kept = torch.zeros(len(inputs), len(block.experts), dtype=torch.float64)
    outputs = torch.zeros_like(inputs, dtype=torch.float64)
    for t, x in enumerate(inputs):
        logits = {i: float(block.router.rows[i].double() @ x.double()) for i in present}
        total = sum(torch.tensor(value).exp() for value in logits.values())
        shares = {i: float(torch.tensor(value).exp() / total) for i, value in logits.items()}
        chosen = sorted(shares, key=lambda i: -shares[i])[: block.top_k]
        mass = sum(shares[i] for i in chosen) if block.renormalise else 1.0
        for i in chosen:
            kept[t, i] = shares[i] / mass
            outputs[t] += shares[i] / mass * block.experts[i](x).double()
    return outputs, kept


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (4, 4), (4, 2), (4, 1), (5, 9)])
@torch.no_grad()
def test_block_is_the_weighted_sum_of_the_kept_experts(experts: int, top_k: int, renormalise: bool) -> None:
    block, inputs = make_block(experts, top_k, renormalise), torch.randn(TOKENS, HIDDEN)
    outputs, kept = reference(block, inputs, list(range(experts)))
    torch.testing.assert_close(block(inputs).double(), outputs, rtol=0, atol=1e-6)
    torch.testing.assert_close(block.route(inputs).double(), kept, rtol=0, atol=1e-6)
    assert (block.route(inputs) > 0).sum(dim=1).eq(min(top_k, experts)).all()


@torch.no_grad()
def test_shape_of_the_input_is_kept_and_positions_do_not_mix() -> None:
    block, inputs = make_block(4, 2, False), torch.randn(3, 5, HIDDEN)
    whole = block(inputs)
    assert whole.shape == inputs.shape
    torch.testing.assert_close(whole[1, 2], block(inputs[1, 2][None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@torch.no_grad()
def test_excluding_equals_dropping(top_k: int, renormalise: bool) -> None:
    block, inputs = make_block(4, top_k, renormalise), torch.randn(TOKENS, HIDDEN)
    kept = [0, 1, 3]
    smaller = RoutedFeedForward(
        [block.experts[i] for i in kept], Router(block.router.rows[kept]), min(top_k, len(kept)), renormalise
    )
    exclude(block, [2])
    torch.testing.assert_close(block(inputs), smaller(inputs), rtol=0, atol=1e-6)
    torch.testing.assert_close(block.route(inputs)[:, kept], smaller.route(inputs), rtol=0, atol=1e-6)
    assert not block.route(inputs)[:, 2].any()


@torch.no_grad()
def test_excluding_all_but_public_leaves_public_and_can_be_taken_back() -> None:
    block, inputs = make_block(3, 2, False), torch.randn(TOKENS, HIDDEN)
    before = block(inputs)
    exclude(block, [1, 2])
    torch.testing.assert_close(block(inputs), block.experts[0](inputs), rtol=0, atol=1e-6)
    exclude(block, [])
    assert torch.equal(block(inputs), before)


@torch.no_grad()
def test_excluded_experts_do_not_run_even_when_they_would_give_nan() -> None:
    block, inputs = make_block(3, 3, False), torch.randn(TOKENS, HIDDEN)
    for parameter in block.experts[2].parameters():
        parameter.fill_(float("nan"))
    exclude(block, [2])
    assert block(inputs).isfinite().all()


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize("renormalise", [False, True])
def test_gradients_are_those_of_the_formula_on_both_paths(top_k: int, renormalise: bool) -> None:
    block, inputs = make_block(3, top_k, renormalise), torch.randn(TOKENS, HIDDEN)
    block.router.closed.requires_grad_(True)
    trained = [block.router.closed, *block.experts[0].parameters(), *block.experts[1].parameters()]
    target = torch.randn(TOKENS, HIDDEN)
    ours = torch.autograd.grad((block(inputs) - target).square().sum(), trained)

    shares = (inputs @ block.router.rows.T).softmax(dim=1)
    mask = torch.zeros_like(shares).scatter(1, shares.topk(top_k, dim=1).indices, 1.0)
    kept = shares * mask
    kept = kept / kept.sum(dim=1, keepdim=True) if renormalise else kept
    everyone = torch.stack([expert(inputs) for expert in block.experts], dim=1)
    direct = torch.autograd.grad(((kept[:, :, None] * everyone).sum(dim=1) - target).square().sum(), trained)
    for one, other in zip(ours, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert ours[0].abs().sum() > 0
    assert not block.router.public.requires_grad


def test_router_computes_in_float32_whatever_runs_around_it() -> None:
    rows, inputs = torch.randn(3, HIDDEN), torch.randn(TOKENS, HIDDEN).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = Router(rows)(inputs)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, inputs.float() @ rows.T, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_are_those_of_now_whatever_was_done_to_them() -> None:
    def is_now(router: Router) -> bool:
        return torch.equal(router.rows, torch.cat([router.public, router.closed]))

    router = Router(torch.randn(3, HIDDEN))
    assert router.rows is router.rows
    router.closed.copy_(torch.randn(2, HIDDEN))
    assert is_now(router)
    router.public[0, 3] = 7
    assert is_now(router)
    router.closed.data = torch.randn(2, HIDDEN)
    assert is_now(router)
    router.load_state_dict(Router(torch.randn(3, HIDDEN)).state_dict())
    assert is_now(router)
    copied = copy.deepcopy(router)
    for changed in (copied, router):
        changed.closed.add_(1)
        assert is_now(copied)
        assert is_now(router)
    assert not torch.equal(router.rows, copied.rows + 1)
    router.double()
    assert router.rows.dtype == torch.float64


def test_rows_in_training_have_gradients_and_follow_the_optimiser() -> None:
    router, inputs = Router(torch.randn(3, HIDDEN)), torch.randn(TOKENS, HIDDEN)
    before = router(inputs).detach()
    router.closed.requires_grad_(True)
    optimiser = torch.optim.SGD([router.closed], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        router(inputs).square().sum().backward()
        optimiser.step()
    router.closed.requires_grad_(False)
    assert torch.equal(router.rows[1:], router.closed)
    assert not torch.allclose(router(inputs)[:, 1:], before[:, 1:])
    with torch.inference_mode():
        made = Router(torch.randn(3, HIDDEN))
        made.closed.zero_()
        assert not made.rows[1:].any()


class Counter(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left_out", [[], [2]])
@torch.no_grad()
def test_nothing_is_done_twice_in_a_layer(left_out: list[int]) -> None:
    block, inputs = make_block(5, 2, True), torch.randn(TOKENS, HIDDEN)
    exclude(block, left_out)
    block(inputs)
    for tokens in (inputs, inputs[:1]):
        with Counter() as counter:
            block(tokens)
        assert counter.calls["topk"] == counter.calls["_softmax"] == 1
        assert not counter.calls.keys() & {"cat", "scatter", "lift_fresh", "_to_copy", "index_fill"}


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@torch.no_grad()
def test_one_token_by_itself_is_to_the_bit_what_it_is_when_sorted(top_k: int, renormalise: bool) -> None:
    block = make_block(4, top_k, renormalise)
    for parameter in block.experts[3].parameters():
        parameter.fill_(float("nan"))
    for seed, left_out in enumerate([(3,), (1, 3), (2, 3), (1, 2, 3)]):
        inputs = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
        with masking([block], token_mask([(left_out, 1)], 4, torch.device("cpu"))):
            chosen = block._choose(block._shares(block.router(inputs)))
            assert torch.equal(block(inputs), block._mix_cut(inputs, chosen))
            assert block(inputs).isfinite().all()


def test_router_copies_its_rows() -> None:
    rows = torch.randn(3, HIDDEN)
    router = Router(rows)
    rows.zero_()
    assert router.rows.abs().sum() > 0
    assert torch.equal(router.rows, torch.cat([router.public, router.closed]))


@torch.no_grad()
def test_observers_see_every_layer_once_in_order_and_go_away() -> None:
    weights = tiny.make_weights(tiny.dense_config(), ("public", "a", "b"), top_k=2)
    model, tokens = tiny.build(weights), tiny.some_tokens(2, 7)
    seen = []
    with observing(model, lambda *args: seen.append(args)):
        model(tokens)
    model(tokens)
    assert [layer for layer, *_ in seen] == [0, 1]
    for block, (_, inputs, kept, outputs) in zip(routed_layers(model), seen, strict=True):
        assert inputs.shape == (14, 32)
        assert torch.equal(kept, block.route(inputs))
        assert torch.equal(outputs, block(inputs))


@torch.no_grad()
def test_observers_go_away_after_an_error_too() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observing(model, fail):
        model(tiny.some_tokens())
    model(tiny.some_tokens())


@torch.no_grad()
def test_set_top_k_reaches_every_layer() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a", "b")))
    set_top_k(model, 1)
    counts = []
    with observing(model, lambda _layer, _inputs, kept, _outputs: counts.append((kept > 0).sum(dim=1))):
        model(tiny.some_tokens())
    assert len(counts) == 2
    assert all(count.eq(1).all() for count in counts)
