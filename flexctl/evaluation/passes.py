"""Passes of one model over domains: whole, with experts left out, with fewer active. One build serves them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from flexctl.bundle.runnable import Runnable
from flexctl.errors import UsageError
from flexctl.evaluation.cache import recall, remember
from flexctl.evaluation.domains import Content, score_domain
from flexctl.evaluation.scoring import Score
from flexctl.model.building import build_model, load_tokenizer
from flexctl.model.routed import exclude, set_top_k
from flexctl.runtime import Reporter, software_versions

__all__ = ["Passes", "Variant", "ablate", "every_top_k", "one_left_out", "sweep_top_k"]

SCORING = 1
"""Part of what the cache knows a pass by; goes up when the same inputs get other figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """How a model runs in a pass.

    Attributes:
        without: Names of the experts that are left out, sorted.
        top_k: Experts kept for each token, at most those that are left.
    """

    without: tuple[str, ...]
    top_k: int


class Passes:
    """Scores of one model. It is built when the first pass is asked for that no earlier run has scored.

    Threads and batch size move figures by rounding alone, so that a pass is the same pass with others.

    Args:
        runnable: The model, proven to be what its digest says.
        seq_len: Window length.
        batch_tokens: Positions that go through the model at once.
        device: Where it runs.
        dtype: Of the model.
        reporter: Hears of progress.

    Attributes:
        count: Passes so far.
        recalled: How many of them are from the cache.
    """

    def __init__(
        self,
        runnable: Runnable,
        *,
        seq_len: int,
        batch_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        reporter: Reporter,
    ) -> None:
        self.runnable = runnable
        self.count = self.recalled = 0
        self.seq_len, self.device, self.dtype = seq_len, device, dtype
        self._batch_tokens, self._reporter = batch_tokens, reporter
        self._scores: dict[tuple[Content, Variant], Score] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model, built now if it was not before."""
        return build_model(self.runnable.weights, device=self.device, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.runnable.tokenizer)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the figures beside model and text."""
        return {"seq_len": self.seq_len, "device": self.device.type, "dtype": str(self.dtype).split(".")[1]}

    def free(self) -> None:
        """Let go of the model; scores stay, and one that is still to come builds it again."""
        self.__dict__.pop("model", None)

    def score(self, content: Content, variant: Variant) -> Score:
        """Return the score of one pass.

        Raises:
            UsageError: The text is no longer what it was when ``content`` was read.
        """
        key = (content, variant)
        if key not in self._scores:
            identity = self._identity(content, variant)
            score = recall(identity)
            self.count += 1
            self.recalled += score is not None
            if score is None:
                score = self._run(content, variant)
                remember(identity, score)
            self._scores[key] = score
        return self._scores[key]

    def model_as(self, variant: Variant) -> nn.Module:
        """Return the model, set to run as ``variant`` until the next pass."""
        set_top_k(self.model, variant.top_k)
        exclude(self.model, self.runnable.select(variant.without).left_out)
        return self.model

    def _run(self, content: Content, variant: Variant) -> Score:
        left_out = f" without {', '.join(variant.without)}" if variant.without else ""
        score = score_domain(
            self.model_as(variant),
            self.tokenizer,
            content.domain,
            seq_len=self.seq_len,
            batch_tokens=self._batch_tokens,
            reporter=self._reporter,
            title=f"scoring {content.domain.name}{left_out}, {variant.top_k} active",
        )
        if (score.documents, score.num_bytes) != (content.documents, content.num_bytes):
            raise UsageError(f"{content.domain.path} changed while it was read", hint="run it again", field="data")
        return score

    def _identity(self, content: Content, variant: Variant) -> dict[str, Any]:
        return {
            "scoring": SCORING,
            "software": software_versions(),
            "model": [bundle.digest for bundle in self.runnable.bundles],
            "without": variant.without,
            "top_k": variant.top_k,
            "data": content.digest,
            **self.settings,
        }


def one_left_out(passes: Passes, whole: Variant) -> dict[str, Variant]:
    """Return {left out: variant} with each closed expert left out on top of ``whole``'s."""
    closed = [name for name in passes.runnable.experts[1:] if name not in whole.without]
    remaining = len(passes.runnable.experts) - len(whole.without) - 1
    top_k = min(whole.top_k, remaining)
    return {name: Variant(without=tuple(sorted((*whole.without, name))), top_k=top_k) for name in closed}


def every_top_k(passes: Passes, whole: Variant) -> dict[int, Variant]:
    """Return {k: variant} for every number of experts that can be active on a token."""
    most = len(passes.runnable.experts) - len(whole.without)
    return {k: Variant(without=whole.without, top_k=k) for k in range(1, most + 1)}


def ablate(passes: Passes, contents: Sequence[Content], whole: Variant) -> dict[str, dict[str, float]]:
    """Return {left out: {domain: bits per byte}} with each closed expert left out on top of ``whole``'s."""
    return {name: _bits_per_byte(passes, contents, variant) for name, variant in one_left_out(passes, whole).items()}


def sweep_top_k(passes: Passes, contents: Sequence[Content], whole: Variant) -> dict[int, dict[str, float]]:
    """Return {k: {domain: bits per byte}} for every number of experts that can be active on a token."""
    return {k: _bits_per_byte(passes, contents, variant) for k, variant in every_top_k(passes, whole).items()}


def _bits_per_byte(passes: Passes, contents: Sequence[Content], variant: Variant) -> dict[str, float]:
    return {content.domain.name: passes.score(content, variant).bits_per_byte for content in contents}
