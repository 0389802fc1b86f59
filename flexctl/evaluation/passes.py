"""Passes of one model over domains: whole, with experts left out, with fewer active. One build serves them all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
from torch import nn

from flexctl.bundle.runnable import Runnable
from flexctl.errors import UsageError
from flexctl.evaluation.bootstrap import Resampled, resample
from flexctl.evaluation.domains import Content, score_domain
from flexctl.evaluation.figures import Settings
from flexctl.evaluation.scoring import Score, recall_score, remember_score
from flexctl.model.building import build_model, load_tokenizer
from flexctl.model.routed import exclude, set_top_k
from flexctl.processes import ALONE, World
from flexctl.runtime import Parts, software_versions

__all__ = ["Passes", "Variant", "every_top_k", "one_left_out", "public_alone"]

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

    @classmethod
    def of(cls, runnable: Runnable) -> Variant:
        """Return how a model runs as it is."""
        return cls(without=(), top_k=runnable.weights.num_experts_per_tok)


_Pass = tuple[Content, Variant]


class Passes:
    """Scores of one model. It is built when the first pass is asked for that no earlier run has scored.

    Threads and batch size move figures by rounding alone, so that a pass is the same pass with others.

    Args:
        runnable: The model, proven to be what its digest says.
        seq_len: Window length.
        batch_tokens: Positions that go through the model of a process at once.
        device: Where it runs.
        dtype: Of the model.
        special_as_text: Whether special tokens that stand in a text are plain text.
        reporter: Hears of progress; told of all passes that are to come.
        world: The processes that share every pass.

    Attributes:
        count: Passes that were asked for so far.
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
        special_as_text: bool,
        reporter: Parts,
        world: World = ALONE,
    ) -> None:
        self.runnable, self._world = runnable, world
        self.count = self.recalled = 0
        self.seq_len, self.device, self.dtype = seq_len, device, dtype
        self.special_as_text = special_as_text
        self._batch_tokens, self._reporter = batch_tokens, reporter
        self._asked: set[_Pass] = set()
        self._scores: dict[_Pass, Score] = {}
        self._resampled: dict[_Pass, Resampled] = {}

    @cached_property
    def model(self) -> nn.Module:
        """The model, built now if it was not before."""
        return build_model(self.runnable.weights, device=self.device, dtype=self.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.runnable.tokenizer, special_as_text=self.special_as_text)

    @property
    def settings(self) -> Settings:
        """What decides the figures beside model and text."""
        return Settings(
            seq_len=self.seq_len,
            device=self.device.type,
            dtype=str(self.dtype).split(".")[1],
            special_as_text=self.special_as_text,
        )

    def free(self) -> None:
        """Let go of the model; scores stay, and one that is still to come builds it again."""
        self.__dict__.pop("model", None)

    def expect(self, contents: Sequence[Content], variants: Iterable[Variant]) -> None:
        """Take up passes: those that an earlier run has made are recalled, the others are said to come."""
        for asked in product(contents, variants):
            if asked in self._asked:
                continue
            self._asked.add(asked)
            self.count += 1
            if (score := self._recalled(*asked)) is not None:
                self.recalled += 1
                self._scores[asked] = score
            else:
                self._reporter.expect(asked[0].num_bytes)

    def score(self, content: Content, variant: Variant) -> Score:
        """Return the score of one pass, which is made now if it was not before.

        Raises:
            UsageError: The text is no longer what it was when ``content`` was read.
        """
        asked = (content, variant)
        self.expect([content], [variant])
        if asked not in self._scores:
            score = self._scores[asked] = self._run(content, variant)
            self._world.by_writer(lambda: remember_score(self._identity(content, variant), score))
        return self._scores[asked]

    def resampled(self, content: Content, variant: Variant) -> Resampled:
        """Return bits per byte of one pass over resampled documents."""
        asked = (content, variant)
        if asked not in self._resampled:
            self._resampled[asked] = resample(self.score(content, variant).per_document)
        return self._resampled[asked]

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
            batch_tokens=self._batch_tokens * self._world.size,
            reporter=self._reporter,
            title=f"scoring {content.domain.name}{left_out}, {variant.top_k} active",
            num_bytes=content.num_bytes,
            world=self._world,
        )
        if (score.documents, score.num_bytes) != (content.documents, content.num_bytes):
            raise UsageError(f"{content.domain.path} changed while it was read", hint="run it again", field="data")
        return score

    def _recalled(self, content: Content, variant: Variant) -> Score | None:
        return self._world.by_writer(lambda: recall_score(self._identity(content, variant)))

    def _identity(self, content: Content, variant: Variant) -> dict[str, Any]:
        return {
            "scoring": SCORING,
            "software": software_versions(),
            "model": [bundle.digest for bundle in self.runnable.bundles],
            "without": variant.without,
            "top_k": variant.top_k,
            "data": content.digest,
            **dataclasses.asdict(self.settings),
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


def public_alone(passes: Passes) -> Variant:
    """Return how the public expert runs alone, which is the anchor."""
    return Variant(without=tuple(sorted(passes.runnable.experts[1:])), top_k=1)
