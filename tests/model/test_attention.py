"""Causal attention by blocks of products: what torch computes, who gets it, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from flexctl.families import FAMILIES
from flexctl.model import attention
from flexctl.model.attention import block_attention, is_block_attention
from flexctl.model.building import build_model
from flexctl.model.dense import build_dense

pytestmark = pytest.mark.usefixtures("one_thread")

every_family = pytest.mark.parametrize("model_type", [family.dense_type for family in FAMILIES])
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in bfloat16 that lie in memory as a model's heads do: (B, heads, S, D) of (B, S, heads, D)."""
    sequences, heads, positions, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, positions, heads, head_dim, generator=generator).bfloat16().transpose(1, 2)


def inputs(sequences: int, heads: int, shared: int, positions: int, head_dim: int) -> list[Tensor]:
    shapes = [(sequences, count, positions, head_dim) for count in (heads, shared, shared)]
    return [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]


def expected(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What torch computes in double precision."""
    heads = query.shape[1] // key.shape[1]
    wide = [query.double(), *(each.double().repeat_interleave(heads, dim=1) for each in (key, value))]
    return F.scaled_dot_product_attention(*wide, is_causal=True)


def apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.mark.parametrize(
    ("heads", "shared", "positions", "head_dim"),
    [(4, 4, 2, 8), (4, 2, 7, 16), (3, 3, 256, 64), (6, 2, 257, 32), (4, 1, 700, 128), (9, 3, 1030, 64)],
)
def test_values_and_gradients_are_those_of_double_precision_within_bfloat16(
    heads: int, shared: int, positions: int, head_dim: int
) -> None:
    given = inputs(2, heads, shared, positions, head_dim)
    grad = drawn(2, heads, positions, head_dim, seed=9)
    found, wanted = block_attention(*given, head_dim**-0.5), expected(*given)
    assert found.dtype == torch.bfloat16
    assert apart(found, wanted) < 0.006
    mine = torch.autograd.grad(found, given, grad)
    theirs = torch.autograd.grad(wanted, given, grad.double())
    assert all(apart(one, other.double()) < 0.012 for one, other in zip(mine, theirs, strict=True))


def test_a_block_of_queries_or_of_heads_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 5, 5, 96, 16)
    whole = block_attention(*given, 0.25)
    monkeypatch.setattr(attention, "_QUERIES", 40)
    monkeypatch.setattr(attention, "_SCORES", 2 * 40 * 96)
    parts = block_attention(*given, 0.25)
    assert apart(parts, whole.double()) < 0.004
    grad = drawn(2, 5, 96, 16, seed=9)
    for one, other in zip(
        torch.autograd.grad(parts, given, grad), torch.autograd.grad(whole, given, grad), strict=True
    ):
        assert apart(one, other.double()) < 0.008


def test_what_is_later_or_in_another_sequence_does_not_matter() -> None:
    query, key, value = (each.detach() for each in inputs(3, 4, 2, 300, 16))
    before = block_attention(query, key, value, 0.25)
    for each in (key, value):
        each[:, :, 200:] = 50
        each[1] = -20
    after = block_attention(query, key, value, 0.25)
    assert torch.equal(after[[0, 2], :, :200], before[[0, 2], :, :200])
    assert torch.equal(block_attention(query[2:], key[2:], value[2:], 0.25)[0], after[2])


def test_it_keeps_what_goes_in_and_nothing_else() -> None:
    given = inputs(2, 4, 4, 300, 16)
    places: set[int] = set()
    with saved_tensors_hooks(lambda each: places.add(each.data_ptr()) or each, lambda each: each):
        block_attention(*given, 0.25)
    assert places == {each.data_ptr() for each in given}


def test_who_is_better_off_by_it() -> None:
    query, key, value = (each.detach() for each in inputs(1, 4, 2, 8, 16))
    assert is_block_attention(query, key)
    assert not is_block_attention(query.float(), key.float())
    assert not is_block_attention(query[:, :, -1:], key)
    assert not is_block_attention(query[:, :, 4:], key)
    assert not is_block_attention(query.to("meta"), key.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_block_attention(query.float(), key.float())
        found = block_attention(query.float(), key.float(), value.float(), 0.25)
    assert torch.equal(found, block_attention(query, key, value, 0.25))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not is_block_attention(query, key)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths that attention by blocks was asked for."""
    lengths: list[int] = []
    whole = attention.block_attention

    def counted(query: Tensor, *rest: Any) -> Tensor:
        lengths.append(query.shape[2])
        return whole(query, *rest)

    monkeypatch.setattr(attention, "block_attention", counted)
    return lengths


@every_family
def test_every_family_runs_by_it_in_bfloat16_and_by_torch_elsewhere(model_type: str, seen: list[int]) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "code"))
    tokens = tiny.some_tokens(2, 24)
    model: Any = build_model(weights, device=CPU, dtype=torch.bfloat16)
    with torch.no_grad():
        found = model(tokens, attention_mask=torch.ones_like(tokens)).logits.double()
        assert seen == [24] * model.config.num_hidden_layers
        padded = torch.ones_like(tokens)
        padded[0, :3] = 0
        model(tokens, attention_mask=padded)
        model.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert seen == [24] * 2 * model.config.num_hidden_layers, "padding is torch's, and so is one token at a time"
        model.set_attn_implementation("sdpa")
        theirs = model(tokens).logits.double()
        exact = tiny.build(weights)(tokens).logits.double()
    assert len(seen) == 2 * model.config.num_hidden_layers
    assert apart(found, exact) < 1.5 * apart(theirs, exact)


def test_a_sliding_window_that_is_shorter_than_the_text_is_torch_s(seen: list[int]) -> None:
    for window, blocks in ((8, 0), (64, 2)):
        config = tiny.dense_config("mistral", sliding_window=window)
        model: Any = build_model(tiny.make_weights(config), device=CPU, dtype=torch.bfloat16)
        del seen[:]
        with torch.no_grad():
            model(tiny.some_tokens(2, 24))
        assert len(seen) == blocks


def test_training_under_autocast_runs_by_it(seen: list[int]) -> None:
    config = tiny.dense_config("olmo2")
    state = tiny.make_dense(config).state_dict()
    dense = build_dense(config, {name: tiny.raw(value) for name, value in state.items()}, device=CPU)
    tokens = tiny.some_tokens(2, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense(tokens, labels=tokens).loss.backward()
    assert seen == [24, 24]
    exact = tiny.make_dense(config)
    exact(tokens, labels=tokens).loss.backward()
    found = dict(dense.named_parameters())
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        assert apart(found[name].grad, parameter.grad.double()) < 0.05, name
