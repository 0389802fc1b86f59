"""Score an anchor, an expert beside its anchor, or a merged model, domain by domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexctl import workspace
from flexctl.bundle.runnable import open_runnable
from flexctl.config import refuse_out_of_range
from flexctl.errors import UsageError
from flexctl.families import family_of
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes

if TYPE_CHECKING:
    from torch import nn

    from flexctl.evaluation.scoring import Score
    from flexctl.training.tokens import Framed

__all__ = ["DomainScore", "EvaluateConfig", "EvaluateResult", "evaluate"]

_MAX_SEQ_LEN = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """What ``evaluate`` is asked to do.

    Attributes:
        data: Test texts, NAME=PATH each; a path is a folder, a text file or a .jsonl (also .gz, .zst).
        bundle: Anchor, expert or merged model; None is the workspace's merged model.
        without: Experts to leave out, as a mask at run time.
        anchor: Anchor directory for an expert; None is the workspace's.
        top_k: Experts kept for each token; None is the bundle's.
        seq_len: Window length; None is 1024, or what the model can hold.
        batch_tokens: Positions that go through the model at once.
        threads: CPU threads; None is torch's choice.
        device: auto, cpu or cuda.
        dtype: Of the model: auto, float32 or bfloat16.
    """

    data: tuple[str, ...]
    bundle: Path | None = None
    without: tuple[str, ...] = ()
    anchor: Path | None = None
    top_k: int | None = None
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
        experts: Experts that were there, the public one first.
        without: Those left out.
        perplexity: A score a domain.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        post_norm_ratio: Mean square of each layer's feed-forward output over rms_norm_eps, the smallest over domains;
            only for families with a norm after the feed-forward network, where it must be far above 1 for the norm to
            absorb that kept probabilities do not add up to 1.
    """

    path: Path
    digest: str
    experts: list[str]
    without: list[str]
    num_experts_per_tok: int
    perplexity: dict[str, DomainScore]
    routing: dict[str, dict[str, float]]
    post_norm_ratio: list[float] | None = None
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
    from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype, set_threads
    from flexctl.model.routed import exclude, set_top_k

    refuse_out_of_range(config, above_zero=("top_k", "seq_len", "batch_tokens", "threads"))
    domains = _domains(config.data)
    place = workspace.find()
    runnable = open_runnable(config.bundle or place.merged, config.anchor or place.anchor)
    names = runnable.experts
    left_out = runnable.indices(config.without)
    top_k = runnable.active(config.top_k, len(left_out), reporter)
    set_threads(config.threads)
    device = pick_device(config.device)
    model = build_model(runnable.weights, device=device, dtype=pick_dtype(config.dtype, device))
    set_top_k(model, top_k)
    exclude(model, left_out)
    tokenizer = load_tokenizer(runnable.tokenizer)
    longest = int(runnable.weights.dense_config.get("max_position_embeddings") or _MAX_SEQ_LEN)
    seq_len = config.seq_len or min(_MAX_SEQ_LEN, longest)
    scores = {
        name: _score(model, tokenizer, name, source, seq_len, config.batch_tokens, reporter)
        for name, source in domains.items()
    }
    return EvaluateResult(
        path=runnable.path,
        digest=runnable.digest,
        experts=names,
        without=list(config.without),
        num_experts_per_tok=top_k,
        perplexity={name: _domain_score(score) for name, score in scores.items()},
        routing={name: dict(zip(names, score.routing(), strict=True)) for name, score in scores.items()},
        post_norm_ratio=_post_norm_ratio(model.config, list(scores.values())),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _domains(data: Sequence[str]) -> dict[str, Path]:
    from flexctl.training.documents import text_files

    domains: dict[str, Path] = {}
    for item in data:
        name, separator, path = item.partition("=")
        if not (separator and name and path):
            raise UsageError(f"--data: {item!r} is not NAME=PATH", hint="for example --data news=./news-test")
        if name in domains:
            raise UsageError(f"--data: {name!r} is given twice")
        text_files([Path(path)])
        domains[name] = Path(path)
    if not domains:
        raise UsageError("--data: nothing to evaluate on", hint="add --data NAME=PATH")
    return domains


def _score(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    source: Path,
    seq_len: int,
    batch_tokens: int,
    reporter: Reporter,
) -> Score:
    from flexctl.evaluation.scoring import score_documents
    from flexctl.training.documents import read_documents, text_files
    from flexctl.training.tokens import frame_documents

    size = sum(file.stat().st_size for file in text_files([source]))
    with reporter.progress(f"scoring {name}", size, "bytes") as bar:

        def counted() -> Iterator[Framed]:
            for document in frame_documents(tokenizer, read_documents([source])):
                bar.advance(document.num_bytes)
                yield document

        score = score_documents(model, counted(), seq_len=seq_len, batch_tokens=batch_tokens)
    if score.documents == 0:
        raise UsageError(f"--data: no document with text in {source}")
    return score


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
        [float(square) / score.tokens / config.rms_norm_eps for square in score.output_square]
        for score in scores
        if score.output_square is not None and score.tokens
    ]
    return [min(layer) for layer in zip(*ratios, strict=True)]
