"""Mixtures trained as a whole: they start as the anchor, train every expert, and are stock on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from upcycled import LoadBalance, save_mixture, train_mixture, upcycle

from flexctl.model.routed import observing, routed_layers
from flexctl.runtime import SILENT
from flexctl.text.tokens import TokenStream, frame_documents, pack
from flexctl.training.whole import WholeSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = WholeSettings(max_tokens=4_000, seq_len=32, batch_tokens=256, lr=5e-3, seed=0)
FAMILIES = ("olmo2", "llama", "qwen3")


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> TokenStream:
    documents = frame_documents(tokenizer, tiny.make_texts("public", 20) + tiny.make_texts("sums", 20))
    return pack(tmp_path_factory.mktemp("union") / "t.tokens", documents)


def start(model_type: str = "olmo2", top_k: int = 2) -> Any:
    model = tiny.build(tiny.make_weights(tiny.dense_config(model_type)))
    upcycle(model, 4, top_k, seed=0)
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("top_k", [2, 4])
def test_upcycled_logits_are_the_anchors(model_type: str, top_k: int) -> None:
    anchor = tiny.build(tiny.make_weights(tiny.dense_config(model_type)))
    model, tokens = start(model_type, top_k), tiny.some_tokens()
    with torch.no_grad():
        apart = (model(tokens).logits - anchor(tokens).logits).abs().max()
    # flex_olmo does not renormalise after the cut; its post-norm absorbs the scale up to rms_norm_eps.
    assert apart < (2e-2 if model_type == "olmo2" and top_k < 4 else 1e-4)
    rows = torch.stack([block.router.rows for block in routed_layers(model)])
    assert not rows[:, 0].any()
    assert rows[:, 1:].std() == pytest.approx(0.02, rel=0.2)


def test_every_expert_trains_and_the_loss_falls(stream: TokenStream, tmp_path: Path) -> None:
    before, model = start(), start()
    tokens, loss = train_mixture(model, stream, SETTINGS, work=tmp_path, resume=False, autocast=None, reporter=SILENT)
    assert tokens == 16 * 256
    inputs = torch.from_numpy(stream.sequence(0, 100))[None]
    with torch.no_grad():
        first, last = (float(which(inputs, labels=inputs).loss) for which in (before, model))
    assert last < first - 0.5
    assert loss < first
    for old, new in zip(routed_layers(before), routed_layers(model), strict=True):
        assert not torch.equal(old.router.closed, new.router.closed)
        for one, other in zip(old.experts, new.experts, strict=True):
            assert all(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_balance_is_one_when_even_and_n_when_one_expert_has_all() -> None:
    model = start(top_k=1)
    balance = LoadBalance(1.0)
    kept = torch.eye(4).repeat(3, 1).requires_grad_()
    balance.watch(0, kept, kept, kept)
    assert balance.penalty().item() == pytest.approx(1.0 * 12)
    one = torch.tensor([[0.0, 1.0, 0.0, 0.0]]).repeat(12, 1).requires_grad_()
    balance.watch(0, one, one, one)
    assert balance.penalty().item() == pytest.approx(4.0 * 12)
    model.requires_grad_(True)
    with observing(model, balance.watch):
        model(tiny.some_tokens())
    balance.penalty().backward()
    assert all(block.router.closed.grad.abs().sum() > 0 for block in routed_layers(model))


def test_resumed_after_an_expert_had_no_token(tmp_path: Path) -> None:
    """AdamW keeps no state for what never had a gradient; a checkpoint of it is taken up again."""
    from flexctl.training.checkpoints import Checkpoints, TrainingState

    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimiser = torch.optim.AdamW([used, unused], lr=0.1)
    used.sum().backward()
    optimiser.step()
    state = TrainingState(parameters=[used, unused], optimiser=optimiser)
    Checkpoints(tmp_path, {}, every_steps=1, resume=False, reporter=SILENT).save(1, state, [1.0], lambda: None)
    expected = used.detach().clone()
    used.data.zero_()
    losses = Checkpoints(tmp_path, {}, every_steps=1, resume=True, reporter=SILENT).restore(state)
    assert losses == [1.0]
    assert torch.equal(used, expected)
    unused.sum().backward()
    optimiser.step()
    assert not torch.equal(unused, torch.ones(3))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_saved_mixture_is_stock(model_type: str, tmp_path: Path, tokenizer: Any) -> None:
    model, tokens = start(model_type), tiny.some_tokens()
    save_mixture(model, tmp_path / "moe", tokenizer)
    stock, about = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "moe", output_loading_info=True)
    assert not about["missing_keys"]
    assert not about["unexpected_keys"]
    with torch.no_grad():
        assert (stock.eval()(tokens).logits - model(tokens).logits).abs().max() < 1e-4
