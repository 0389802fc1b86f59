"""Laws 8 and 9: flexctl's forward is stock Transformers' forward, of the dense model and of the mixture.

Every family, tied and untied heads, grouped-query attention; float32, largest difference of any logit at most 1e-4.
"""

from __future__ import annotations

import pytest
import tiny
import torch

from flexctl.families import FAMILIES, family_of
from flexctl.model.routed import exclude, observing

TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("one_thread")

every_family = pytest.mark.parametrize("model_type", [family.dense_type for family in FAMILIES])


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return float((one - other).abs().max())


def undecided(model: torch.nn.Module, tokens: torch.Tensor, top_k: int) -> bool:
    """Whether some token's k-th and next router logits are so near that rounding may choose either."""
    gaps = []

    def observe(layer: int, inputs: torch.Tensor, _kept: torch.Tensor, _outputs: torch.Tensor) -> None:
        ranked = model.model.layers[layer].mlp.router(inputs).sort(dim=1, descending=True).values
        gaps.append(float((ranked[:, top_k - 1] - ranked[:, top_k]).min()))

    with observing(model, observe):
        logits(model, tokens)
    return min(gaps) < 1e-5


@every_family
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_stock_mixture_computes_the_same(model_type: str, tied: bool, top_k: int) -> None:
    config = tiny.dense_config(model_type, tie_word_embeddings=tied)
    weights = tiny.make_weights(config, ("public", "a", "b"), top_k=top_k)
    stock, info = tiny.stock_mixture(weights)
    assert not any(info.values()), info
    ours, tokens = tiny.build(weights), tiny.some_tokens()
    assert top_k == 3 or not undecided(ours, tokens, top_k)
    expected = logits(stock, tokens)
    assert expected.std() > 0.3
    assert largest_difference(logits(ours, tokens), expected) <= TOLERANCE


@every_family
def test_experts_matter(model_type: str) -> None:
    config = tiny.dense_config(model_type)
    weights = tiny.make_weights(config, ("public", "a", "b"), top_k=2)
    dense = tiny.make_dense(config)
    assert largest_difference(logits(tiny.build(weights), tiny.some_tokens()), logits(dense, tiny.some_tokens())) > 0.05


@every_family
@pytest.mark.parametrize("tied", [False, True])
def test_anchor_only_gives_the_dense_logits(model_type: str, tied: bool) -> None:
    config = tiny.dense_config(model_type, tie_word_embeddings=tied)
    weights, tokens = tiny.make_weights(config), tiny.some_tokens()
    dense = logits(tiny.make_dense(config), tokens)
    stock, _ = tiny.stock_mixture(weights)
    assert largest_difference(logits(tiny.build(weights), tokens), dense) <= TOLERANCE
    assert largest_difference(logits(stock, tokens), dense) <= TOLERANCE


@every_family
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_experts_after_no_step_give_the_dense_logits(model_type: str, top_k: int) -> None:
    if top_k < 3 and not family_of(model_type).renormalises:
        pytest.skip("kept probabilities do not add up to 1; see the test below")
    config = tiny.dense_config(model_type)
    weights, tokens = tiny.make_weights(config, ("public", "a", "b"), top_k=top_k, spread=0.0), tiny.some_tokens()
    dense = logits(tiny.make_dense(config), tokens)
    stock, _ = tiny.stock_mixture(weights)
    assert largest_difference(logits(tiny.build(weights), tokens), dense) <= TOLERANCE
    assert largest_difference(logits(stock, tokens), dense) <= TOLERANCE


def test_post_norm_absorbs_the_scale_only_far_above_eps() -> None:
    tokens = tiny.some_tokens()
    differences = {}
    for eps in (1e-12, 1e-5, 1.0):
        config = tiny.dense_config("olmo2", rms_norm_eps=eps)
        weights = tiny.make_weights(config, ("public", "a", "b"), top_k=1, spread=0.0)
        dense = logits(tiny.make_dense(config), tokens)
        differences[eps] = largest_difference(logits(tiny.build(weights), tokens), dense)
    assert differences[1e-12] <= TOLERANCE
    assert differences[1e-12] < differences[1e-5] < differences[1.0]
    assert differences[1.0] > TOLERANCE


@every_family
@pytest.mark.parametrize("requested", [1, 2, 4])
def test_masking_equals_removing(model_type: str, requested: int) -> None:
    names = ("public", "a", "b", "c")
    weights = tiny.make_weights(tiny.dense_config(model_type), names, top_k=requested)
    masked, tokens = tiny.build(weights), tiny.some_tokens()
    exclude(masked, [names.index("b")])
    smaller = tiny.without(weights, "b", requested)
    expected = logits(tiny.build(smaller), tokens)
    assert largest_difference(logits(masked, tokens), expected) <= 1e-5
    stock, _ = tiny.stock_mixture(smaller)
    assert largest_difference(logits(masked, tokens), logits(stock, tokens)) <= TOLERANCE


@every_family
def test_generation_with_a_cache_agrees_with_the_stock_mixture(model_type: str) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "a", "b"), top_k=2)
    stock, _ = tiny.stock_mixture(weights)
    tokens = tiny.some_tokens(1, 5)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 1}
    assert torch.equal(tiny.build(weights).generate(tokens, **settings), stock.generate(tokens, **settings))


def test_every_family_is_covered() -> None:
    assert [family.dense_type for family in FAMILIES] == ["olmo2", "llama", "mistral", "qwen3"]
