"""From passes of a model over domains to figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import transformers

from flexctl.evaluation.bootstrap import resample
from flexctl.evaluation.comparison import compare_domain, most_moved
from flexctl.evaluation.domains import Content
from flexctl.evaluation.figures import Comparison, DomainScore, Estimate
from flexctl.evaluation.lineage import lineage
from flexctl.evaluation.passes import Passes, Variant
from flexctl.evaluation.scoring import Score
from flexctl.families import family_of

__all__ = ["Measured"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Measured:
    """A model on domains. Passes that were not made before are made when a figure of them is asked for.

    Attributes:
        passes: The model's.
        contents: The domains.
        whole: How the model runs.
    """

    passes: Passes
    contents: Sequence[Content]
    whole: Variant

    @property
    def scores(self) -> dict[str, Score]:
        """The whole model's score on each domain."""
        return {content.domain.name: self.passes.score(content, self.whole) for content in self.contents}

    def perplexity(self) -> dict[str, DomainScore]:
        """Return the figures of each domain."""
        return {content.domain.name: self._domain(content) for content in self.contents}

    def _domain(self, content: Content) -> DomainScore:
        score = self.passes.score(content, self.whole)
        bits = self.passes.resampled(content, self.whole).estimate()
        return DomainScore(
            nll=score.nll,
            perplexity=score.perplexity,
            bits_per_byte=bits.value,
            bits_per_byte_low=bits.low,
            bits_per_byte_high=bits.high,
            tokens=score.tokens,
            bytes=score.num_bytes,
            documents=score.documents,
        )

    def routing(self) -> dict[str, dict[str, float]]:
        """Return domain -> expert -> share of the kept probability, mean over targets and layers."""
        names = self.passes.runnable.experts
        return {name: dict(zip(names, score.routing(), strict=True)) for name, score in self.scores.items()}

    def routing_layers(self) -> dict[str, dict[str, list[float]]]:
        """Return domain -> expert -> the same layer by layer."""
        names = self.passes.runnable.experts
        return {name: dict(zip(names, score.routing_layers(), strict=True)) for name, score in self.scores.items()}

    def router_agreement(self) -> dict[str, float]:
        """Return domain -> how often a bfloat16 router keeps the same experts, where some are cut."""
        shares = {name: score.router_agreement for name, score in self.scores.items()}
        return {name: share for name, share in shares.items() if share is not None}

    def post_norm_ratio(self) -> list[float] | None:
        """Return each layer's mean square of the feed-forward output over rms_norm_eps, the smallest over domains."""
        config, scores = self.passes.runnable.weights.dense_config, self.scores.values()
        if not scores or not family_of(config["model_type"]).post_norm:
            return None
        eps = transformers.AutoConfig.for_model(**config).rms_norm_eps
        ratios = [(score.output_square / score.tokens / eps).tolist() for score in scores]
        return [min(layer) for layer in zip(*ratios, strict=True)]

    def bits(self, variant: Variant) -> dict[str, float]:
        """Return domain -> bits per byte of the model as a variant of it."""
        return {content.domain.name: self.passes.resampled(content, variant).value for content in self.contents}

    def change(self, variant: Variant) -> dict[str, Estimate]:
        """Return domain -> by how much a variant is above the whole model."""
        return {
            content.domain.name: self.passes.resampled(content, variant).above(
                self.passes.resampled(content, self.whole)
            )
            for content in self.contents
        }

    def change_of(self, scores: Mapping[str, Score]) -> dict[str, Estimate]:
        """Return domain -> by how much another way to answer is above the whole model."""
        return {
            content.domain.name: resample(scores[content.domain.name].per_document).above(
                self.passes.resampled(content, self.whole)
            )
            for content in self.contents
        }

    def beside(self, other: Measured) -> Comparison:
        """Return how it stands beside another model."""
        runnable, scores, others = other.passes.runnable, self.scores, other.scores
        return Comparison(
            path=runnable.path,
            digest=runnable.digest,
            lineage=lineage(runnable.bundles, other.whole.without),
            num_experts_per_tok=other.whole.top_k,
            domains={
                content.domain.name: compare_domain(
                    scores[content.domain.name],
                    others[content.domain.name],
                    self.passes.resampled(content, self.whole),
                    other.passes.resampled(content, other.whole),
                )
                for content in self.contents
            },
            moved=most_moved(self.contents, scores, others),
        )
