"""Experts that run at once against the same experts one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from flexctl.model import routed, stacked
from flexctl.model.building import add_expert, build_model, route
from flexctl.model.routed import RoutedFeedForward, TokenMask, exclude, masking, routed_layers, set_top_k, token_mask

CPU = torch.device("cpu")
has_kernel_here = stacked._has_kernel
NAMES = ("public", "a", "b", "c")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped product"),
]


@pytest.fixture(autouse=True)
def has_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "_has_kernel", lambda _block, _device: True)


def build(model_type: str = "olmo2", dtype: torch.dtype = torch.float32, top_k: int = 2) -> Any:
    weights = tiny.make_weights(tiny.dense_config(model_type), NAMES, top_k=top_k)
    return build_model(weights, device=CPU, dtype=dtype)


def apart(block: RoutedFeedForward, inputs: torch.Tensor) -> torch.Tensor:
    """What a block computes expert by expert."""
    together, block.together = block.together, None
    try:
        outputs: torch.Tensor = block(inputs)
    finally:
        block.together = together
    return outputs


MASKS = {
    "all": (),
    "one by one": (((1,), 1), ((), 2), ((1, 2, 3), 3), ((2, 3), 1), ((), 10)),
    "the public one alone": (((1, 2, 3), 17),),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("left_out", [(), (2,), (1, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("model_type", ["olmo2", "qwen3"])
@torch.no_grad()
def test_it_is_the_sum_expert_by_expert(model_type: str, top_k: int, left_out: tuple[int, ...], mask: str) -> None:
    model = build(model_type)
    exclude(model, left_out)
    set_top_k(model, top_k)
    blocks, inputs = routed_layers(model), torch.randn(17, 32)
    who = token_mask(MASKS[mask], 4, CPU) if MASKS[mask] else None
    for block in blocks:
        with masking(blocks, who):
            torch.testing.assert_close(block(inputs), apart(block, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3, 64, 300])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
@torch.no_grad()
def test_however_many_tokens_there_are(model_type: str, dtype: torch.dtype, close: float, tokens: int) -> None:
    inputs = torch.randn(tokens, 32).to(dtype)
    for block in routed_layers(build(model_type, dtype)):
        expected = apart(block, inputs)
        torch.testing.assert_close(block(inputs), expected, rtol=close, atol=close * float(expected.abs().max()))


@torch.no_grad()
def test_few_rows_have_matrices_copied_more_are_sorted_and_the_rest_goes_expert_by_expert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways: list[str] = []
    make = stacked._run_by

    def told(way: str, both: torch.Tensor, down: torch.Tensor, activation: str) -> Any:
        run = make(way, both, down, activation)
        run.register_forward_hook(lambda *_: ways.append(way))
        return run

    monkeypatch.setattr(stacked, "_run_by", told)
    block = routed_layers(build(top_k=2))[0]
    for tokens in (1, 2, 8, 9, 300, 513):
        block(torch.randn(tokens, 32))
    assert ways == ["batched_mm", "batched_mm", "grouped_mm", "grouped_mm"]


@torch.no_grad()
def test_an_expert_without_tokens_is_no_trouble() -> None:
    model = build(top_k=1)
    for block in routed_layers(model):
        block.router.closed[1].fill_(0)
        block.router.closed[0], block.router.closed[2] = torch.ones(32), -torch.ones(32)
        inputs = torch.randn(9, 32)
        assert not block.route(inputs)[:, [0, 2]].any()
        torch.testing.assert_close(block(inputs), apart(block, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_k", [2, 4])
@torch.no_grad()
def test_who_is_left_out_does_not_run_even_where_it_would_give_nan(top_k: int) -> None:
    model = build(top_k=top_k)
    blocks, inputs = routed_layers(model), torch.randn(5, 32)
    for block in blocks:
        for parameter in block.experts[2].parameters():
            parameter.fill_(float("nan"))
        assert not block(inputs * 9).isfinite().all()
    with masking(blocks, token_mask([((1, 2, 3), 2), ((2,), 3)], 4, CPU)):
        assert all(block(inputs).isfinite().all() for block in blocks)
    exclude(model, [1, 2, 3])
    assert all(block(inputs).isfinite().all() for block in blocks)


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize("top_k", [2, 4])
@torch.no_grad()
def test_leaving_out_is_removing(model_type: str, top_k: int) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), NAMES, top_k=top_k)
    whole, less = (
        build_model(source, device=CPU, dtype=torch.float32) for source in (weights, tiny.without(weights, "b", top_k))
    )
    exclude(whole, [2])
    assert all(block.together for model in (whole, less) for block in routed_layers(model))
    for ids in (tiny.some_tokens(), tiny.some_tokens()[:1, :3]):
        torch.testing.assert_close(whole(ids).logits, less(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
@torch.no_grad()
def test_a_model_stays_what_it_is(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(model_type)
    monkeypatch.undo()
    plain = build(model_type)
    assert not any(block.together for block in routed_layers(plain))
    one, other = model.state_dict(), plain.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    ids = tiny.some_tokens()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_matrices_are_in_memory_once_and_what_is_written_into_an_expert_counts() -> None:
    model = build().to(CPU)
    for block in routed_layers(model):
        matrices = list(block.experts.parameters())
        storages = {matrix.untyped_storage().data_ptr(): matrix.untyped_storage().nbytes() for matrix in matrices}
        assert len(storages) == 2
        assert sum(storages.values()) == sum(matrix.nbytes for matrix in matrices)
        inputs = torch.randn(9, 32)
        before = block(inputs)
        for matrix in matrices:
            matrix.mul_(1.5)
        assert not torch.equal(block(inputs), before)
        torch.testing.assert_close(block(inputs), apart(block, inputs), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_copy_and_a_model_with_one_more_expert_run_one_by_one() -> None:
    model = build()
    copied = copy.deepcopy(model)
    ids, expected = tiny.some_tokens(), model(tiny.some_tokens()).logits
    torch.testing.assert_close(copied(ids).logits, expected, rtol=0, atol=1e-5)
    for parameter in model.parameters():
        parameter.zero_()
    torch.testing.assert_close(copied(ids).logits, expected, rtol=0, atol=1e-5)
    grown = build()
    add_expert(grown, 9 * torch.randn(2, 32))
    assert grown(ids).logits.isfinite().all()


@pytest.mark.parametrize(
    ("capability", "device", "dtype", "inner", "has"),
    [
        ((9, 0), "cuda", torch.bfloat16, 48, True),
        ((10, 0), "cuda", torch.bfloat16, 48, True),
        ((8, 0), "cuda", torch.bfloat16, 48, False),
        ((12, 0), "cuda", torch.bfloat16, 48, False),
        ((9, 0), "cpu", torch.bfloat16, 48, False),
        ((9, 0), "cuda", torch.float32, 48, False),
        ((9, 0), "cuda", torch.bfloat16, 44, False),
    ],
)
def test_only_where_the_device_has_one_kernel_for_it(
    capability: tuple[int, int],
    device: str,
    dtype: torch.dtype,
    inner: int,
    has: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    dense = tiny.make_dense(tiny.dense_config(intermediate_size=inner)).to(dtype)
    assert has_kernel_here(routed_layers(route(dense))[0], torch.device(device)) == has


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tokens went through all experts at once, call by call."""
    seen: list[int] = []
    make = stacked._stacked

    def counting(block: RoutedFeedForward, device: torch.device) -> routed.Together:
        run = make(block, device)

        def count(inputs: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            seen.append(len(inputs))
            return run(inputs, experts, weights)

        return count

    monkeypatch.setattr(stacked, "_stacked", counting)
    return seen


def test_many_tokens_and_training_go_expert_by_expert(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed, "TOGETHER_ROWS", 20)
    block = routed_layers(build(top_k=2))[0]
    with torch.no_grad():
        block(torch.randn(10, 32))
        block(torch.randn(11, 32))
    assert calls == [10]
    block.top_k = 4
    with torch.no_grad():
        block(torch.randn(5, 32))
        block(torch.randn(6, 32))
    assert calls == [10, 5]
    block(torch.randn(5, 32))
    block.router.closed.requires_grad_(True)
    block(torch.randn(5, 32)).sum().backward()
    assert calls == [10, 5]


def test_an_anchor_alone_is_left_as_it_is() -> None:
    weights = tiny.make_weights(tiny.dense_config())
    assert not any(block.together for block in routed_layers(build_model(weights, device=CPU, dtype=torch.float32)))


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("model_type", ["olmo2", "qwen3"])
@torch.no_grad()
def test_experts_at_once_do_not_wait_for_the_device(model_type: str, top_k: int) -> None:
    """Fake tensors have no numbers: to ask for one fails, as a device would have to be waited for."""
    model = build(model_type, torch.bfloat16, top_k)
    exclude(model, [3])
    for block in routed_layers(model):
        for tokens in (2, 9):
            barred = torch.zeros(tokens, 4, dtype=torch.bool)
            with FakeTensorMode(allow_non_fake_inputs=True):
                inputs = torch.zeros(tokens, 32, dtype=torch.bfloat16)
                assert block(inputs).shape == inputs.shape
                with masking([block], TokenMask(barred, (None,) * 4)):
                    assert block(inputs).shape == inputs.shape
                block.top_k = 2
                with pytest.raises(DataDependentOutputException):
                    apart(block, inputs)
                block.top_k = top_k


@torch.no_grad()
def test_the_activation_is_the_anchor_s() -> None:
    weights = tiny.make_weights(tiny.dense_config("llama", hidden_act="gelu"), NAMES, top_k=2)
    inputs = torch.randn(9, 32)
    for block in routed_layers(build_model(weights, device=CPU, dtype=torch.float32)):
        torch.testing.assert_close(block(inputs), apart(block, inputs), rtol=0, atol=1e-5)
