"""Every baseline whose ingredients are there, scored like any bundle: docs/baselines.md says what each one is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flexctl.bundle import PUBLIC, Weights
from flexctl.bundle.weights import weights_digest
from flexctl.evaluation.baselines.blends import DARE_DROP, TIES_DENSITY, dare, soup, ties
from flexctl.evaluation.baselines.ingredients import Ingredients
from flexctl.evaluation.baselines.panel import TEMPERATURE, Panel, names_alone, names_together
from flexctl.evaluation.baselines.windows import Floats, Windows, cut
from flexctl.evaluation.domains import Domain
from flexctl.evaluation.scoring import Score, recall_score, remember_score
from flexctl.model.building import WeightSource, build_model
from flexctl.runtime import Reporter, counted, software_versions
from flexctl.text.tokens import Framed, frame_documents

__all__ = ["Baselines"]

SCORING = 2
"""Part of what the cache knows a baseline by; goes up when the same ingredients and text get other figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Way:
    """Baselines that are scored together.

    Attributes:
        names: Theirs.
        made_of: What decides their figures beside text and settings, as JSON has it.
        losses: Scores windows, {name: losses (W,)}; builds its models when it is first called.
    """

    names: Sequence[str]
    made_of: Mapping[str, Any]
    losses: Callable[[Windows], Mapping[str, Floats]]


class Baselines:
    """Scores of all baselines that the ingredients allow. Models are built for what no earlier run has scored.

    All dense experts are in memory at once while they are mixed; every other model is alone.

    Args:
        ingredients: From ``find_ingredients``.
        tokenizer: The anchor's.
        seq_len: Window length.
        batch_tokens: Positions that go through a model at once.
        top_k: Dense experts that BTM keeps.
        device: Where models run.
        dtype: Of their weights.
        reporter: Hears of progress.

    Attributes:
        count: Passes so far, of one baseline over one text each.
        recalled: How many of them are from the cache.
    """

    def __init__(
        self,
        ingredients: Ingredients,
        tokenizer: Any,
        *,
        seq_len: int,
        batch_tokens: int,
        top_k: int,
        device: torch.device,
        dtype: torch.dtype,
        reporter: Reporter,
    ) -> None:
        self.count = self.recalled = 0
        self._ingredients, self._tokenizer, self._reporter = ingredients, tokenizer, reporter
        self._seq_len, self._batch_tokens, self._top_k = seq_len, batch_tokens, top_k
        self._device, self._dtype = device, dtype

    def score(self, domains: Sequence[Domain]) -> dict[str, dict[str, Score]]:
        """Return {baseline: {domain: score}}.

        Args:
            domains: What to score on; their documents are read anew for every pass.

        Raises:
            UsageError: There is no document with text, or a text changed while it was read.
        """
        texts = [self._cut(domain) for domain in domains]
        scores: dict[str, dict[str, Score]] = {}
        for way in self._ways():
            for windows in texts:
                for name, score in self._score(way, windows).items():
                    scores.setdefault(name, {})[windows.name] = score
        return scores

    def _cut(self, domain: Domain) -> Windows:
        def documents() -> Iterable[Framed]:
            return frame_documents(self._tokenizer, domain.documents())

        with self._reporter.progress(f"reading {domain.name}", domain.size_bytes(), "bytes") as bar:
            windows = cut(domain.name, documents, seq_len=self._seq_len, advance=bar.advance)
        return windows

    def _ways(self) -> Iterator[_Way]:
        ingredients = self._ingredients
        dense = {PUBLIC: ingredients.anchor, **ingredients.dense}
        digests = self._digests(dense)
        if ingredients.complete:
            models = list(dense.values())
            yield self._whole("soup", soup(models), {"models": digests})
            yield self._whole("ties", ties(models), {"models": digests, "density": TIES_DENSITY})
            yield self._whole("dare", dare(models), {"models": digests, "drop": DARE_DROP})
        for name, mixture in ingredients.mixtures.items():
            yield self._whole(name, mixture, {"models": self._digests({name: mixture})})
        yield self._panel(dense, digests)

    def _digests(self, models: Mapping[str, Weights]) -> list[tuple[str, str]]:
        with self._reporter.progress("hashing models", len(models), "models") as bar:
            return [(name, weights_digest(weights)) for name, weights in counted(models.items(), bar)]

    def _whole(self, name: str, source: WeightSource, made_of: Mapping[str, Any]) -> _Way:
        """Return a baseline that is one model for all text."""
        model = functools.cache(lambda: self._build(source))

        def losses(windows: Windows) -> dict[str, Floats]:
            with self._reporter.progress(f"scoring {name} on {windows.name}", len(windows), "windows") as bar:
                return {name: windows.losses(model(), windows.pieces(), self._batch_tokens, bar.advance)}

        return _Way(names=[name], made_of=made_of, losses=losses)

    def _panel(self, dense: Mapping[str, Weights], digests: Sequence[tuple[str, str]]) -> _Way:
        """Return what the anchor and the dense experts are alone and, where none is missing, together."""
        complete, classifier = self._ingredients.complete, self._ingredients.classifier
        models = functools.cache(lambda: {name: self._build(weights) for name, weights in dense.items()})

        def losses(windows: Windows) -> dict[str, Floats]:
            panel = Panel(models(), windows, self._batch_tokens, self._top_k, self._reporter)
            return panel.alone() | (panel.together(classifier) if complete else {})

        return _Way(
            names=[*names_alone(dense), *(names_together(classified=classifier is not None) if complete else [])],
            made_of={
                "models": digests,
                "classifier": classifier and classifier.digest,
                "top_k": self._top_k,
                "temperature": TEMPERATURE,
            },
            losses=losses,
        )

    def _build(self, source: WeightSource) -> nn.Module:
        return build_model(source, device=self._device, dtype=self._dtype)

    def _score(self, way: _Way, windows: Windows) -> dict[str, Score]:
        identities = {name: self._identity(name, way, windows) for name in way.names}
        known = {name: score for name, identity in identities.items() if (score := recall_score(identity)) is not None}
        self.count += len(identities)
        if len(known) == len(identities):
            self.recalled += len(known)
            return known
        losses = way.losses(windows)
        scores = {name: windows.score(losses[name]) for name in way.names}
        for name, score in scores.items():
            remember_score(identities[name], score)
        return scores

    def _identity(self, name: str, way: _Way, windows: Windows) -> dict[str, Any]:
        return {
            "scoring": ["baselines", SCORING],
            "software": software_versions(),
            "name": name,
            "made_of": way.made_of,
            "data": windows.digest,
            "seq_len": self._seq_len,
            "device": self._device.type,
            "dtype": str(self._dtype),
        }
