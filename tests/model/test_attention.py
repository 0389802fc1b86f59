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
from flexctl.model.attention import attend_by_blocks
from flexctl.model.building import build_model
from flexctl.model.dense import build_dense

pytestmark = pytest.mark.usefixtures("one_thread")

every_family = pytest.mark.parametrize("model_type", [family.dense_type for family in FAMILIES])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine computes this; where it does not pay, only slower."""
    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: True)


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
    found, wanted = attend_by_blocks(*given, head_dim**-0.5), expected(*given)
    assert found.dtype == torch.bfloat16
    assert apart(found, wanted) < 0.006
    mine = torch.autograd.grad(found, given, grad)
    theirs = torch.autograd.grad(wanted, given, grad.double())
    assert all(apart(one, other.double()) < 0.012 for one, other in zip(mine, theirs, strict=True))


def test_a_block_of_queries_or_of_heads_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(2, 5, 5, 96, 16)
    whole = attend_by_blocks(*given, 0.25)
    monkeypatch.setattr(attention, "_QUERIES", 40)
    monkeypatch.setattr(attention, "_SCORES", 2 * 40 * 96)
    parts = attend_by_blocks(*given, 0.25)
    assert apart(parts, whole.double()) < 0.004
    grad = drawn(2, 5, 96, 16, seed=9)
    for one, other in zip(
        torch.autograd.grad(parts, given, grad), torch.autograd.grad(whole, given, grad), strict=True
    ):
        assert apart(one, other.double()) < 0.008


def test_what_is_later_or_in_another_sequence_does_not_matter() -> None:
    query, key, value = (each.detach() for each in inputs(3, 4, 2, 300, 16))
    before = attend_by_blocks(query, key, value, 0.25)
    for each in (key, value):
        each[:, :, 200:] = 50
        each[1] = -20
    after = attend_by_blocks(query, key, value, 0.25)
    assert torch.equal(after[[0, 2], :, :200], before[[0, 2], :, :200])
    assert torch.equal(attend_by_blocks(query[2:], key[2:], value[2:], 0.25)[0], after[2])


def test_it_keeps_what_goes_in_and_nothing_else() -> None:
    given = inputs(2, 4, 4, 300, 16)
    places: set[int] = set()
    with saved_tensors_hooks(lambda each: places.add(each.data_ptr()) or each, lambda each: each):
        attend_by_blocks(*given, 0.25)
    assert places == {each.data_ptr() for each in given}


@pytest.mark.parametrize(("heads", "shared", "positions"), [(1, 1, 1030), (8, 1, 600), (6, 2, 300)])
def test_scores_have_a_bound(heads: int, shared: int, positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_SCORES", 1 << 15)
    sizes, whole = [], attention._shares

    def counted(query: Tensor, key: Tensor, later: Tensor, scaling: float) -> Tensor:
        found = whole(query, key, later, scaling)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(attention, "_shares", counted)
    given = inputs(2, heads, shared, positions, 16)
    assert apart(attend_by_blocks(*given, 0.25), expected(*given)) < 0.006
    assert max(sizes) <= max(1 << 15, 16 * heads // shared * positions)


def test_large_scores_are_rounded_as_in_eager_attention() -> None:
    given = inputs(1, 4, 4, 300, 64)
    query, key, value = given[0].detach() * 4, *(each.detach() for each in given[1:])
    later = torch.full((300, 300), float("-inf")).triu_(1)
    scores = (query @ key.mT) * 0.125 + later.bfloat16()
    eager = scores.softmax(dim=-1, dtype=torch.float32).bfloat16() @ value
    wanted = expected(query, key, value)
    mine, theirs = apart(attend_by_blocks(query, key, value, 0.125), wanted), apart(eager, wanted)
    assert mine < 1.1 * theirs < 0.02


def test_who_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (each.detach() for each in inputs(1, 4, 2, 64, 16))
    assert attention._is_by_blocks(query, key)
    assert not attention._is_by_blocks(query.float(), key.float())
    assert not attention._is_by_blocks(query[:, :, 1:], key[:, :, 1:])
    assert not attention._is_by_blocks(query, key.repeat(1, 1, 2, 1))
    assert not attention._is_by_blocks(query.to("meta"), key.to("meta"))
    with torch.no_grad():
        assert not attention._is_by_blocks(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention._is_by_blocks(query.float(), key.float())
        found = attend_by_blocks(query.float(), key.float(), value.float(), 0.25)
    assert torch.equal(found, attend_by_blocks(query, key, value, 0.25))
    with torch.autocast("cpu", dtype=torch.float16):
        assert not attention._is_by_blocks(query, key)
    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: False)
    assert not attention._is_by_blocks(query, key)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths that attention by blocks was asked for."""
    lengths: list[int] = []
    whole = attention.attend_by_blocks

    def counted(query: Tensor, *rest: Any) -> Tensor:
        lengths.append(query.shape[2])
        return whole(query, *rest)

    monkeypatch.setattr(attention, "attend_by_blocks", counted)
    return lengths


@every_family
def test_every_family_trains_by_it_in_bfloat16_and_answers_by_torch(model_type: str, seen: list[int]) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "code"))
    tokens = tiny.some_tokens(2, 72)
    model: Any = build_model(weights, device=CPU, dtype=torch.bfloat16)
    found = model(tokens, attention_mask=torch.ones_like(tokens)).logits.double()
    assert seen == [72] * model.config.num_hidden_layers
    del seen[:]
    padded = torch.ones_like(tokens)
    padded[0, :3] = 0
    model(tokens, attention_mask=padded)
    with torch.no_grad():
        model(tokens)
    model.generate(tokens[:1], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert not seen, "padding, scores and answers are torch's"
    model.set_attn_implementation("sdpa")
    theirs, exact = model(tokens).logits.double(), tiny.build(weights)(tokens).logits.double()
    assert not seen
    assert apart(found, exact) < 1.5 * apart(theirs, exact)


def test_a_sliding_window_that_is_shorter_than_the_text_is_torch_s(seen: list[int]) -> None:
    for window, blocks in ((8, 0), (96, 2)):
        config = tiny.dense_config("mistral", sliding_window=window)
        model: Any = build_model(tiny.make_weights(config), device=CPU, dtype=torch.bfloat16)
        del seen[:]
        model(tiny.some_tokens(2, 72))
        assert len(seen) == blocks


def test_training_under_autocast_runs_by_it(seen: list[int]) -> None:
    config = tiny.dense_config("olmo2")
    state = tiny.make_dense(config).state_dict()
    dense = build_dense(config, {name: tiny.raw(value) for name, value in state.items()}, device=CPU)
    tokens = tiny.some_tokens(2, 72)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dense(tokens, labels=tokens).loss.backward()
    assert seen == [72, 72]
    exact = tiny.make_dense(config)
    exact(tokens, labels=tokens).loss.backward()
    found = dict(dense.named_parameters())
    for name, parameter in exact.named_parameters():
        assert parameter.grad is not None
        assert apart(found[name].grad, parameter.grad.double()) < 0.05, name
