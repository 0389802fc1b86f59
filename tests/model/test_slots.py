"""Many sequences in one pass: each has the logits that it has alone, in the checkpoint without who was left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

from flexctl.model import SlotCache, Span, forward, masking, routed_layers, token_mask

NAMES = ("public", "a", "b", "c")
MASKS = ((), (1,), (2, 3), (1, 2, 3), (3,))
LENGTHS = (5, 17, 9, 30, 1)
SLOTS = (4, 0, 6, 1, 2)
FAMILIES = ("olmo2", "llama", "mistral", "qwen3")


def family_weights(model_type: str, top_k: int | None) -> SimpleNamespace:
    changes = {"sliding_window": 6} if model_type == "mistral" else {}
    return tiny.make_weights(tiny.dense_config(model_type, **changes), NAMES, top_k=top_k)


def removed(weights: SimpleNamespace, left_out: tuple[int, ...]) -> Any:
    for index in left_out:
        weights = tiny.without(weights, NAMES[index], weights.num_experts_per_tok)
    return tiny.build(weights)


@pytest.mark.parametrize("top_k", [None, 2, 1])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_mixed_masks_and_lengths_in_one_pass(model_type: str, top_k: int | None, one_thread: int) -> None:
    assert one_thread == 1
    weights = family_weights(model_type, top_k)
    prompts = [tiny.some_tokens(1, length, seed=length)[0] for length in LENGTHS]
    model = tiny.build(weights)
    cache = SlotCache(model, 8, tiny.CONTEXT)
    done, rows = [0] * len(prompts), [[] for _ in prompts]
    for step in range(30):
        # Pieces of 1, 4 and 7 tokens in turn, so that single tokens and chunks of every sequence share passes.
        sizes = [min((1, 4, 7)[(i + step) % 3], len(prompt) - done[i]) for i, prompt in enumerate(prompts)]
        order = sorted((i for i, size in enumerate(sizes) if size), key=lambda i: sizes[i] != 1)
        if not order:
            break
        spans = [Span(SLOTS[i], done[i], sizes[i]) for i in order]
        tokens = torch.cat([prompts[i][done[i] : done[i] + sizes[i]] for i in order])
        cache.reserve(max(span.end for span in spans))
        mask = token_mask([(MASKS[i], sizes[i]) for i in order], len(NAMES), tokens.device)
        with masking(routed_layers(model), mask):
            logits = forward(model, cache, spans, tokens, torch.arange(len(tokens)))
        for i, part in zip(order, logits.split([sizes[i] for i in order]), strict=True):
            rows[i].append(part.log_softmax(-1))
            done[i] += sizes[i]
    for prompt, left_out, row in zip(prompts, MASKS, rows, strict=True):
        with torch.no_grad():
            expected = removed(weights, left_out)(prompt[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(torch.cat(row), expected, atol=1e-5, rtol=0)


def test_a_slot_that_was_used_before_is_as_new() -> None:
    model = tiny.build(family_weights("llama", None))
    cache, tokens, last = SlotCache(model, 2, tiny.CONTEXT), tiny.some_tokens(1, 12)[0], torch.tensor([-1])
    cache.reserve(40)
    first = forward(model, cache, [Span(1, 0, 12)], tokens, last)
    forward(model, cache, [Span(1, 12, 12)], tiny.some_tokens(1, 12, seed=1)[0], last)
    cache.wipe(1)
    assert not any(tensor[1].any() for tensor in (*cache.keys, *cache.values))
    torch.testing.assert_close(forward(model, cache, [Span(1, 0, 12)], tokens, last), first, atol=0, rtol=0)


def test_the_cache_grows_and_keeps_what_it_has() -> None:
    model = tiny.build(family_weights("qwen3", None))
    cache = SlotCache(model, 2, 1000)
    sizes = []
    for positions in (3, 256, 257, 600, 600, 1000):
        cache.reserve(positions)
        sizes.append(cache.keys[0].shape[2])
        cache.keys[0][0, :, 0] = 1
        assert bool((cache.keys[0][0, :, 0] == 1).all())
    assert sizes == [256, 256, 512, 1000, 1000, 1000]


@pytest.mark.parametrize("top_k", [None, 2])
def test_nobody_computes_for_a_token_that_may_not_use_it(top_k: int | None) -> None:
    model = tiny.build(family_weights("olmo2", top_k))
    ran: list[tuple[int, int]] = []
    for block in routed_layers(model):
        for index, expert in enumerate(block.experts):
            expert.register_forward_pre_hook(lambda _, inputs, index=index: ran.append((index, len(inputs[0]))))
    cache, tokens = SlotCache(model, 2, tiny.CONTEXT), tiny.some_tokens(1, 10)[0]
    cache.reserve(10)
    with masking(routed_layers(model), token_mask([((1, 2), 6), ((1,), 4)], len(NAMES), tokens.device)):
        forward(model, cache, [Span(0, 0, 6), Span(1, 0, 4)], tokens, torch.tensor([-1]))
    assert 1 not in {index for index, _ in ran}
    assert max(count for index, count in ran if index == 2) <= 4
    assert all(block.mask is None for block in routed_layers(model))


def test_an_expert_that_is_not_finite_reaches_nobody_who_left_it_out() -> None:
    weights = family_weights("llama", None)
    model = tiny.build(weights)
    for block in routed_layers(model):
        block.experts[2].down_proj.weight.data.fill_(float("nan"))
    cache, tokens = SlotCache(model, 2, tiny.CONTEXT), tiny.some_tokens(1, 10)[0]
    cache.reserve(10)
    with masking(routed_layers(model), token_mask([((2,), 6), ((), 4)], len(NAMES), tokens.device)):
        logits = forward(model, cache, [Span(0, 0, 6), Span(1, 0, 4)], tokens, torch.arange(10))
    assert bool(logits[:6].isfinite().all())
    assert bool(logits[6:].isnan().all())


def test_where_all_may_run_there_is_no_mask() -> None:
    assert token_mask([((), 3), ((), 1)], 4, torch.device("cpu")) is None
