"""Dense experts beside each other: each alone, and what weighs or chooses among them window by window.

Shapes: M models, W windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import numpy as np
from torch import nn

from flexctl.bundle import PUBLIC
from flexctl.evaluation.baselines.mixing import mixed_logit_losses, soup_losses
from flexctl.evaluation.baselines.prompt import PromptClassifier
from flexctl.evaluation.baselines.windows import Floats, Windows, choose, softmax_weights
from flexctl.runtime import Progress, Reporter, counted

__all__ = ["ORACLE", "TEMPERATURE", "Panel", "names_alone", "names_together"]

TEMPERATURE = 0.1
"""Of the weights of weighted soups and BTM, in nats a token."""

ORACLE = "oracle"
"""What the name of a baseline ends with that looks at the very text it is scored on."""


def names_alone(models: Iterable[str]) -> list[str]:
    """Return what models are called as baselines, by their names, the anchor's among them."""
    return ["public only" if name == PUBLIC else f"dense {name}" for name in models]


def names_together(*, classified: bool) -> list[str]:
    """Return the baselines that weigh or choose among models, with a prompt classifier or without."""
    names = ["weighted soup", "btm", "perplexity routing", *(["prompt routing"] if classified else [])]
    return [*names, *(f"{name} {ORACLE}" for name in names)]


class Panel:
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
            found = [windows.losses(model, windows.pieces(), batch_tokens, bar.advance) for model in models.values()]
        self._losses = np.stack(found)

    def alone(self) -> dict[str, Floats]:
        """Return the losses (W,) of each model by itself."""
        return dict(zip(names_alone(self._models), self._losses, strict=True))

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
            models = list(self._models.values())
            return mixed_logit_losses(
                models, weights, self._windows, batch_tokens=self._batch_tokens, advance=bar.advance
            )

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
