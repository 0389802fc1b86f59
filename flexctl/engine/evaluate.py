"""Score an anchor, an expert beside its anchor, or a merged model, domain by domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexctl import hub, workspace
from flexctl.config import refuse_out_of_range
from flexctl.families import family_of
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes

if TYPE_CHECKING:
    from flexctl.bundle.runnable import Runnable
    from flexctl.evaluation.baselines import Ingredients
    from flexctl.evaluation.domains import Domain
    from flexctl.evaluation.scoring import Score

__all__ = ["DomainScore", "EvaluateConfig", "EvaluateResult", "evaluate"]

_BTM_TOP_K = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What ``evaluate`` is asked to do.

    Attributes:
        data: Test texts, NAME=PATH each; a path is a folder, a file or ``hf://datasets/owner/name``,
            as in ``train_expert``.
        text_field: The column of a table, or the field of a .jsonl line, that holds the text.
        bundle: Anchor, expert or merged model, or ``hf://owner/name``; None is the workspace's merged model.
        without: Experts to leave out, as a mask at run time.
        anchor: Anchor for an expert, a directory or ``hf://owner/name``; None is the workspace's.
        top_k: Experts kept for each token; None is the bundle's.
        baselines: Folder of dense experts and mixtures to compare with: docs/baselines.md.
        seq_len: Window length; None is 1024, or what the model can hold.
        batch_tokens: Positions that go through the model at once.
        threads: CPU threads; None is torch's choice.
        device: auto, cpu or cuda.
        dtype: Of the model: auto, float32 or bfloat16.
    """

    data: tuple[str, ...]
    text_field: str = "text"
    bundle: Path | None = None
    without: tuple[str, ...] = ()
    anchor: Path | None = None
    top_k: int | None = None
    baselines: Path | None = None
    seq_len: int | None = None
    batch_tokens: int = 8192
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Figures of one domain.

    Attributes:
        nll: Mean over targets, nats a token.
        perplexity: Its exponential.
        bits_per_byte: Total nll / ln 2 / UTF-8 bytes.
        tokens: Targets.
        bytes: UTF-8 bytes.
        documents: Documents.
    """

    nll: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """What ``evaluate`` found.

    Attributes:
        path: The bundle; text for one on the Hub.
        experts: Experts that were there, the public one first.
        without: Those left out.
        perplexity: A score a domain.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        post_norm_ratio: Mean square of each layer's feed-forward output over rms_norm_eps, the smallest over domains;
            only for families with a norm after the feed-forward network, where it must be far above 1 for the norm to
            absorb that kept probabilities do not add up to 1.
        baselines: Baseline -> domain -> bits per byte.
        baselines_missing: Ingredient of a baseline that was not there -> how to make it.
    """

    path: Path | str
    digest: str
    experts: list[str]
    without: list[str]
    num_experts_per_tok: int
    perplexity: dict[str, DomainScore]
    routing: dict[str, dict[str, float]]
    post_norm_ratio: list[float] | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines_missing: dict[str, str] = field(default_factory=dict)
    peak_rss_bytes: int = 0


def evaluate(config: EvaluateConfig, reporter: Reporter = SILENT) -> EvaluateResult:
    """Score a bundle on test texts by the rule of docs/how-it-works.md, section 7.

    Args:
        config: Which bundle, which texts, what to leave out.
        reporter: Hears of progress.

    Returns:
        Perplexity, bits per byte and routing a domain.

    Raises:
        UsageError: A setting or the data is wrong.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    from flexctl.evaluation.domains import parse_domains, score_domain, window_length
    from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype, set_threads
    from flexctl.model.routed import exclude, set_top_k

    refuse_out_of_range(config, above_zero=("top_k", "seq_len", "batch_tokens", "threads"))
    domains = parse_domains(config.data, config.text_field)
    place = workspace.find()
    runnable = hub.runnable(config.bundle or place.merged, config.anchor or place.anchor, reporter)
    names = runnable.experts
    left_out = runnable.indices(config.without)
    top_k = runnable.active(config.top_k, len(left_out), reporter)
    ingredients = _ingredients(config, runnable, [name for i, name in enumerate(names) if i not in left_out])
    set_threads(config.threads)
    device = pick_device(config.device)
    model = build_model(runnable.weights, device=device, dtype=pick_dtype(config.dtype, device))
    set_top_k(model, top_k)
    exclude(model, left_out)
    tokenizer = load_tokenizer(runnable.tokenizer)
    seq_len = window_length(runnable.weights.dense_config, config.seq_len)
    scores = {
        domain.name: score_domain(
            model, tokenizer, domain, seq_len=seq_len, batch_tokens=config.batch_tokens, reporter=reporter
        )
        for domain in domains
    }
    compared = _compare(ingredients, tokenizer, domains, seq_len, config, reporter)
    return EvaluateResult(
        path=runnable.path,
        digest=runnable.digest,
        experts=names,
        without=list(config.without),
        num_experts_per_tok=top_k,
        perplexity={name: _domain_score(score) for name, score in scores.items()},
        routing={name: dict(zip(names, score.routing(), strict=True)) for name, score in scores.items()},
        post_norm_ratio=_post_norm_ratio(model.config, list(scores.values())),
        baselines=compared,
        baselines_missing=dict(ingredients.missing) if ingredients is not None else {},
        peak_rss_bytes=peak_rss_bytes(),
    )


def _ingredients(config: EvaluateConfig, runnable: Runnable, experts: Sequence[str]) -> Ingredients | None:
    from flexctl.evaluation.baselines import find_ingredients

    if config.baselines is None:
        return None
    return find_ingredients(config.baselines, runnable.weights, experts, runnable.tokenizer)


def _compare(
    ingredients: Ingredients | None,
    tokenizer: Any,
    domains: Sequence[Domain],
    seq_len: int,
    config: EvaluateConfig,
    reporter: Reporter,
) -> dict[str, dict[str, float]]:
    """Return {baseline: {domain: bits per byte}}."""
    from flexctl.evaluation.baselines import score_baselines
    from flexctl.model.building import pick_device, pick_dtype

    if ingredients is None:
        return {}
    device = pick_device(config.device)
    scores = score_baselines(
        ingredients,
        tokenizer,
        domains,
        seq_len=seq_len,
        batch_tokens=config.batch_tokens,
        top_k=config.top_k or _BTM_TOP_K,
        device=device,
        dtype=pick_dtype(config.dtype, device),
        reporter=reporter,
    )
    return {name: {domain: score.bits_per_byte for domain, score in found.items()} for name, found in scores.items()}


def _domain_score(score: Score) -> DomainScore:
    return DomainScore(
        nll=score.nll,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        tokens=score.tokens,
        bytes=score.num_bytes,
        documents=score.documents,
    )


def _post_norm_ratio(config: Any, scores: Sequence[Score]) -> list[float] | None:
    if not family_of(config.model_type).post_norm:
        return None
    ratios = [
        [float(square) / score.tokens / config.rms_norm_eps for square in score.output_square] for score in scores
    ]
    return [min(layer) for layer in zip(*ratios, strict=True)]
