"""Blends, mixtures and routing agree with direct computation on stock models."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from classifier import fit_classifier, save_classifier
from torch.nn import functional as F
from upcycled import btx_start

from flexctl.bundle import Weights
from flexctl.errors import BundleError, UsageError
from flexctl.evaluation.baselines.blends import Blend, dare, soup, ties
from flexctl.evaluation.baselines.mixing import mixed_logit_losses, soup_losses
from flexctl.evaluation.baselines.prompt import PromptClassifier
from flexctl.evaluation.baselines.windows import Windows, choose, cut, softmax_weights
from flexctl.evaluation.scoring import score_documents
from flexctl.model.losses import LOGIT_BUDGET
from flexctl.text.tokens import Framed

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = tiny.dense_config()
SEEDS = (0, 1, 2)


def weights_of(seed: int, **changes: Any) -> Weights:
    return tiny.make_weights(tiny.dense_config(**changes), seed=seed)  # type: ignore[return-value]


MODELS = [weights_of(seed) for seed in SEEDS]
STOCK = [tiny.make_dense(CONFIG, seed) for seed in SEEDS]


def state_of(blend: Blend) -> dict[str, torch.Tensor]:
    """A blend's tensors by their names in a stock dense model."""
    from flexctl.model.tensors import to_torch

    return {name: to_torch(blend.shared[name]) for name in blend.shared} | {
        f"model.{name}": to_torch(blend.experts["public"][name]) for name in blend.experts["public"]
    }


def stacked(name: str) -> np.ndarray[Any, Any]:
    return np.stack([model.state_dict()[name].numpy() for model in STOCK])


def documents(lengths: tuple[int, ...] = (40, 9, 33)) -> list[Framed]:
    pieces = [tiny.some_tokens(1, length, seed=length)[0].numpy() for length in lengths]
    return [Framed(tokens=piece, num_bytes=3 * len(piece)) for piece in pieces]


def windows_of(lengths: tuple[int, ...] = (40, 9, 33)) -> Windows:
    return cut("a", lambda: documents(lengths), seq_len=16, advance=lambda _bytes: None)


@torch.no_grad()
def stock_losses(model: Any, windows: Any) -> list[float]:
    """Sum of losses of each window by a stock model."""
    found = []
    for piece in windows.pieces():
        tokens = torch.from_numpy(piece.tokens)
        found.append(float(F.cross_entropy(model(tokens[None, :-1]).logits[0], tokens[1:], reduction="sum")))
    return found


def test_soup_is_the_mean_of_state_dicts() -> None:
    found = state_of(soup(MODELS))
    assert set(found) == set(STOCK[0].state_dict())
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), stacked(name).mean(axis=0), atol=1e-6)


def test_soup_of_tied_and_rounded_models_has_no_head_and_is_float32() -> None:
    found = soup([weights_of(seed, tie_word_embeddings=True) for seed in SEEDS])
    assert "lm_head.weight" not in found.shared
    assert {found.shared[name].dtype for name in found.shared} == {"F32"}


def test_ties_agrees_with_numpy() -> None:
    found = state_of(ties(MODELS, density=0.3))
    for name, tensor in found.items():
        base, *others = stacked(name)
        changes = np.stack(others) - base
        for change in changes:
            wanted = max(1, round(0.3 * change.size))
            change[np.abs(change) < np.sort(np.abs(change), axis=None)[-wanted]] = 0
        elected = np.where(changes.sum(axis=0) >= 0, 1, -1)
        agree = np.sign(changes) == elected
        merged = (changes * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        np.testing.assert_allclose(tensor.numpy(), base + merged, atol=1e-6)


def test_dare_keeps_a_tenth_ten_times_as_large() -> None:
    found = state_of(dare(MODELS[:2], drop=0.9))
    name = "lm_head.weight"
    base, other = stacked(name)[:2]
    change, full = found[name].numpy() - base, (other - base) / 2
    kept = np.abs(change) > 1e-7
    assert kept.mean() == pytest.approx(0.1, abs=0.02)
    np.testing.assert_allclose(change[kept], 10 * full[kept], atol=1e-5)
    again, differently = state_of(dare(MODELS[:2])), state_of(dare(MODELS[:2], seed=1))
    assert torch.equal(found[name], again[name])
    assert not torch.equal(found[name], differently[name])
    whole = state_of(dare(MODELS, drop=0.0))
    np.testing.assert_allclose(whole[name].numpy(), stacked(name).mean(axis=0), atol=1e-5)


def test_btx_starts_from_each_models_experts_and_the_mean_of_the_rest() -> None:
    start = btx_start(dict(zip(("public", "a", "b"), MODELS, strict=True)), top_k=2)
    model, mean = tiny.build(start), soup(MODELS)
    state, expected = model.state_dict(), state_of(mean)
    assert all(torch.allclose(state[name], expected[name]) for name in mean.shared)
    for index, stock in enumerate(STOCK):
        for layer, block in enumerate(stock.model.layers):
            inside = model.model.layers[layer].mlp
            assert torch.equal(inside.experts[index].up_proj.weight, block.mlp.up_proj.weight)
            assert inside.top_k == 2
    assert not model.model.layers[0].mlp.router.public.any()


def test_windows_are_the_scorers_own() -> None:
    model = tiny.build(MODELS[0])
    windows = windows_of()
    assert [len(piece.tokens) - 1 for piece in windows.pieces()] == [16, 16, 7, 8, 16, 16] == windows.targets.tolist()
    assert windows.document.tolist() == [0, 0, 0, 1, 2, 2]
    assert windows.first.tolist() == [True, False, False, True, True, False]
    scored: list[int] = []
    losses = windows.losses(model, windows.pieces(), 64, scored.append)
    assert (sum(scored), len(scored)) == (6, 2)
    assert losses == pytest.approx(stock_losses(STOCK[0], windows), abs=1e-3)
    expected = score_documents(model, documents(), seq_len=16, batch_tokens=64)
    np.testing.assert_allclose(windows.score(losses).per_document, expected.per_document, rtol=1e-6)


@pytest.mark.parametrize("now", [(40, 9), (40, 9, 33, 2), (40, 10, 33), (40, 9, 33, 33), ()])
def test_text_that_changes_between_passes_is_refused(now: tuple[int, ...]) -> None:
    lengths: list[tuple[int, ...]] = [(40, 9, 33), now]
    windows = cut("law", lambda: documents(lengths.pop(0)), seq_len=16, advance=lambda _bytes: None)
    with pytest.raises(UsageError, match="the text of law changed while it was read"):
        windows.losses(tiny.build(MODELS[0]), windows.pieces(), 64, lambda _: None)


def test_what_is_known_before_a_window_is_the_documents_earlier_text() -> None:
    windows = windows_of()
    losses = np.array([[16.0, 32.0, 7.0, 8.0, 48.0, 16.0]])
    np.testing.assert_allclose(windows.before(losses), [[np.nan, 1.0, 1.5, np.nan, np.nan, 3.0]])
    np.testing.assert_allclose(windows.itself(losses), [[1.0, 2.0, 1.0, 1.0, 3.0, 1.0]])


def test_weights_are_a_softmax_cut_to_the_best() -> None:
    evidence = np.array([[1.0, np.nan, 2.0], [1.1, np.nan, 2.0], [1.3, np.nan, 1.0]])
    raw = np.exp(-np.array([1.0, 1.1, 1.3]) / 0.1)
    weights = softmax_weights(evidence, 0.1)
    np.testing.assert_allclose(weights[:, 0], raw / raw.sum())
    np.testing.assert_allclose(weights[:, 1], [1 / 3] * 3)
    best = softmax_weights(evidence, 0.1, top_k=2)
    np.testing.assert_allclose(best[:, 0], [*(raw[:2] / raw[:2].sum()), 0.0])
    np.testing.assert_allclose(best[:, 1], [1 / 3] * 3)
    assert choose(evidence).tolist() == [0, 0, 2]


def some_weights(windows: int) -> np.ndarray[Any, Any]:
    drawn = np.random.default_rng(0).random((3, windows))
    drawn[1, ::2] = 0
    drawn[:, 1] = drawn[:, 3]
    return drawn / drawn.sum(axis=0)


@pytest.mark.parametrize("together", [256, 4])
def test_weighted_soup_is_a_soup_of_its_own_for_each_window(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.evaluation.baselines.mixing._TOGETHER", together)
    windows = windows_of()
    weights = some_weights(len(windows))
    told: list[int] = []
    models = [tiny.build(model) for model in MODELS]
    losses = soup_losses(models, weights, windows, batch_tokens=64, advance=told.append)
    assert sum(told) == len(windows)
    direct = tiny.make_dense(CONFIG)
    for index, column in enumerate(weights.T):
        state = {
            name: sum(w * s.state_dict()[name] for w, s in zip(column.tolist(), STOCK, strict=True))
            for name in direct.state_dict()
        }
        direct.load_state_dict(state)
        assert losses[index] == pytest.approx(stock_losses(direct, windows)[index], abs=1e-3)
    assert models[0].lm_head.weight.equal(STOCK[0].lm_head.weight)


@pytest.mark.parametrize(
    ("budget", "lengths", "batch_tokens", "together"),
    [
        (LOGIT_BUDGET, (40, 9, 33), 32, 256),
        (7 * tiny.VOCAB_SIZE, (40, 9, 33), 32, 256),
        (LOGIT_BUDGET, (40, 9, 33), 64, 4),
        (LOGIT_BUDGET, (33, 2, 2, 3), 1, 256),
    ],
    ids=["all", "logits in parts", "few windows at a time", "one window at a time, some of one target"],
)
def test_btm_mixes_stock_logits_token_by_token(
    budget: int, lengths: tuple[int, ...], batch_tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexctl.evaluation.baselines.mixing.LOGIT_BUDGET", budget)
    monkeypatch.setattr("flexctl.evaluation.baselines.mixing._TOGETHER", together)
    windows = windows_of(lengths)
    weights = some_weights(len(windows))
    told: list[int] = []
    models = [tiny.build(model) for model in MODELS]
    losses = mixed_logit_losses(models, weights, windows, batch_tokens=batch_tokens, advance=told.append)
    assert sum(told) == len(windows)
    for index, piece in enumerate(windows.pieces()):
        tokens = torch.from_numpy(piece.tokens)
        with torch.no_grad():
            mixed = sum(
                w * m(tokens[None, :-1]).logits[0] for w, m in zip(weights[:, index].tolist(), STOCK, strict=True)
            )
        assert losses[index] == pytest.approx(float(F.cross_entropy(mixed, tokens[1:], reduction="sum")), abs=1e-3)


def test_models_of_weight_zero_do_not_run() -> None:
    windows = windows_of((9,))
    models: list[Any] = [tiny.build(MODELS[0]), None]
    alone = mixed_logit_losses(models, np.array([[1.0], [0.0]]), windows, batch_tokens=64, advance=lambda _: None)
    assert alone == pytest.approx(stock_losses(STOCK[0], windows), abs=1e-3)


def test_classifier_tells_separable_classes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 2, 8, generator=generator)
    stretched = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 0.1]))

    def draw(index: int, count: int) -> torch.Tensor:
        return centres[index] + 0.3 * torch.randn(count, 2, 8, generator=generator) @ stretched

    classifier = fit_classifier({name: draw(i, 60) for i, name in enumerate(("public", "a", "b"))})
    for index in range(3):
        picked = classifier.logits(draw(index, 60)).argmax(dim=1)
        assert float((picked == index).float().mean()) > 0.9


def test_classifier_is_bayes_rule_for_two_gaussians() -> None:
    """Half-way between two classes of the same spread the logits are equal; the slope is the distance squared."""
    spread = torch.tensor([[1.0], [-1.0], [2.0], [-2.0]])[:, None].double()
    classifier = fit_classifier({"public": spread, "a": spread + 5})
    variance = float(torch.cat([spread, spread]).square().sum() / 6) * 1.1
    logits = classifier.logits(torch.tensor([[[2.5]], [[5.0]]]))
    assert float(logits[0, 0] - logits[0, 1]) == pytest.approx(0, abs=1e-9)
    assert float(logits[1, 1] - logits[1, 0]) == pytest.approx(12.5 / variance, rel=1e-6)


def test_classifier_survives_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    classifier = fit_classifier({name: torch.randn(9, 2, 32, generator=generator) for name in ("public", "a")})
    save_classifier(classifier, tmp_path / "c.safetensors")
    again = PromptClassifier.load(tmp_path / "c.safetensors")
    assert again.names == ("public", "a")
    model, windows = tiny.build(MODELS[0]), windows_of((2, 40))
    logits = again.read(model, windows.pieces())
    assert logits.shape == (len(windows), 2)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, classifier.read(model, windows.pieces()))
    assert torch.allclose(logits[:1], classifier.read(model, islice(windows.pieces(), 1)))
    # What goes through the model together decides how sums are rounded, and nothing else.
    monkeypatch.setattr("flexctl.evaluation.baselines.prompt._TOGETHER", 2)
    assert torch.allclose(logits, classifier.read(model, windows.pieces()), atol=1e-4)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match="holds no prompt classifier"):
        PromptClassifier.load(tmp_path / "bad.safetensors")
