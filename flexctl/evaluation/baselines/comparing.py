"""Every baseline whose ingredients are there, scored like any bundle: docs/baselines.md says what each one is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn

from flexctl.bundle import PUBLIC
from flexctl.errors import UsageError
from flexctl.evaluation.baselines.blends import dare, soup, ties
from flexctl.evaluation.baselines.ingredients import Ingredients
from flexctl.evaluation.baselines.mixing import mixed_logit_losses, soup_losses
from flexctl.evaluation.baselines.prompt import PromptClassifier
from flexctl.evaluation.baselines.windows import Floats, Windows, choose, cut, softmax_weights
from flexctl.evaluation.domains import Domain
from flexctl.evaluation.scoring import Score
from flexctl.model.building import WeightSource, build_model
from flexctl.runtime import Progress, Reporter, counted
from flexctl.training.tokens import Framed, frame_documents

__all__ = ["ORACLE", "TEMPERATURE", "score_baselines"]

TEMPERATURE = 0.1
"""Of the weights of weighted soups and BTM, in nats a token."""

ORACLE = "oracle"
"""What the name of a baseline ends with that looks at the very text it is scored on."""


def score_baselines(
    ingredients: Ingredients,
    tokenizer: Any,
    domains: Sequence[Domain],
    *,
    seq_len: int,
    batch_tokens: int,
    top_k: int,
    device: torch.device,
    dtype: torch.dtype,
    reporter: Reporter,
) -> dict[str, dict[str, Score]]:
    """Return {baseline: {domain: score}}.

    All dense experts are in memory at once while they are mixed; every other model is alone.

    Args:
        ingredients: From ``find_ingredients``.
        tokenizer: The anchor's.
        domains: What to score on; their documents are read anew for every pass.
        seq_len: Window length.
        batch_tokens: Positions that go through a model at once.
        top_k: Dense experts that BTM keeps.
        device: Where models run.
        dtype: Of their weights.
        reporter: Hears of progress.

    Raises:
        UsageError: There is no document with text, or a text changed while it was read.
    """

    def build(source: WeightSource) -> nn.Module:
        return build_model(source, device=device, dtype=dtype)

    texts = [_cut(domain, tokenizer, seq_len, reporter) for domain in domains]
    scores: dict[str, dict[str, Score]] = {}
    for name, source in _whole_models(ingredients):
        with reporter.progress(f"scoring {name}", sum(map(len, texts)), "windows") as bar:
            model = build(source)
            scores[name] = {}
            for windows in texts:
                losses = windows.losses(model, counted(windows.pieces(), bar), batch_tokens)
                scores[name][windows.name] = windows.score(losses)
    dense = {PUBLIC: build(ingredients.anchor)} | {name: build(model) for name, model in ingredients.dense.items()}
    for windows in texts:
        panel = _Panel(dense, windows, batch_tokens, top_k, reporter)
        found = panel.alone() | (panel.together(ingredients.classifier) if ingredients.complete else {})
        for name, losses in found.items():
            scores.setdefault(name, {})[windows.name] = windows.score(losses)
    return scores


def _cut(domain: Domain, tokenizer: Any, seq_len: int, reporter: Reporter) -> Windows:
    def documents() -> Iterable[Framed]:
        return frame_documents(tokenizer, domain.documents())

    with reporter.progress(f"reading {domain.name}", domain.size_bytes(), "bytes") as bar:
        windows = cut(domain.name, documents, seq_len=seq_len, advance=bar.advance)
    if not len(windows):
        raise UsageError(f"--data: no document with text in {domain.path}")
    return windows


def _whole_models(ingredients: Ingredients) -> Iterator[tuple[str, WeightSource]]:
    """Yield the baselines that are one model for all text."""
    if ingredients.complete:
        models = [ingredients.anchor, *ingredients.dense.values()]
        yield from (("soup", soup(models)), ("ties", ties(models)), ("dare", dare(models)))
    yield from ingredients.mixtures.items()


class _Panel:
    """The anchor and the dense experts, which score windows alone and together.

    Args:
        models: By name, the anchor first.
        windows: What to score.
        batch_tokens: Positions that go through a model at once.
        top_k: Models that BTM keeps.
        reporter: Hears of progress.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], windows: Windows, batch_tokens: int, top_k: int, reporter: Reporter
    ) -> None:
        self._models, self._windows, self._batch_tokens = models, windows, batch_tokens
        self._top_k, self._reporter = top_k, reporter
        with self._progress("scoring dense experts", len(models)) as bar:
            found = [windows.losses(model, counted(windows.pieces(), bar), batch_tokens) for model in models.values()]
        self._losses = np.stack(found)

    def alone(self) -> dict[str, Floats]:
        """Return the losses (W,) of each model by itself."""
        names = ["public only" if name == PUBLIC else f"dense {name}" for name in self._models]
        return dict(zip(names, self._losses, strict=True))

    def together(self, classifier: PromptClassifier | None) -> dict[str, Floats]:
        """Return the losses (W,) of what weighs or chooses among the models, by earlier text and as oracles."""
        found = {}
        votes = None if classifier is None else self._votes(classifier)
        for suffix, look in (("", self._windows.before), (f" {ORACLE}", self._windows.itself)):
            evidence = look(self._losses)
            found[f"weighted soup{suffix}"] = self._soup(softmax_weights(evidence, TEMPERATURE))
            found[f"btm{suffix}"] = self._btm(softmax_weights(evidence, TEMPERATURE, self._top_k))
            found[f"perplexity routing{suffix}"] = self._routed(evidence)
            if votes is not None:
                found[f"prompt routing{suffix}"] = self._routed(look(votes))
        return found

    def _routed(self, evidence: Floats) -> Floats:
        losses: Floats = np.take_along_axis(self._losses, choose(evidence)[None], axis=0)[0]
        return losses

    def _soup(self, weights: Floats) -> Floats:
        with self._progress("weighted soups") as bar:
            models = list(self._models.values())
            return soup_losses(models, weights, self._windows, batch_tokens=self._batch_tokens, advance=bar.advance)

    def _btm(self, weights: Floats) -> Floats:
        with self._progress("BTM") as bar:
            return mixed_logit_losses(list(self._models.values()), weights, self._windows, advance=bar.advance)

    def _votes(self, classifier: PromptClassifier) -> Floats:
        """Return the classifier's logits against each model, times each window's targets, (M, W)."""
        with self._progress("prompt routing") as bar:
            logits = classifier.read(self._models[PUBLIC], counted(self._windows.pieces(), bar))
        order = [classifier.names.index(name) for name in self._models]
        votes: Floats = -logits[:, order].numpy().T * self._windows.targets
        return votes

    def _progress(self, title: str, times: int = 1) -> AbstractContextManager[Progress]:
        windows = self._windows
        return self._reporter.progress(f"{title} on {windows.name}", times * len(windows), "windows")
