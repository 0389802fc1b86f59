"""Score an anchor, an expert beside its anchor, or a merged model: domain by domain, task by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import flags, hub, workspace
from flexctl.bundle.checks import prove
from flexctl.bundle.runnable import Runnable
from flexctl.bundle.store import check_file_target
from flexctl.errors import UsageError
from flexctl.families import family_of
from flexctl.options import DATA, MODEL, OUTPUT, Config, flag, switch
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes, software_versions

if TYPE_CHECKING:
    from flexctl.evaluation.baselines import Baselines, Ingredients
    from flexctl.evaluation.comparison import Comparison
    from flexctl.evaluation.domains import Content
    from flexctl.evaluation.passes import Passes, Variant
    from flexctl.evaluation.report.data import Report
    from flexctl.evaluation.scoring import Score
    from flexctl.evaluation.tasks.harness import Task, TaskRun

__all__ = ["DomainScore", "EvaluateConfig", "EvaluateResult", "TaskScore", "evaluate"]

_BTM_TOP_K = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Config):
    """What ``evaluate`` is asked to do.

    Perplexity and bits per byte with a 95 % interval, and the share of each expert in the answers. The figures
    also go to results.json beside the bundle, which push sends along, unless `without` or `top_k` makes it
    another model. What was scored before comes from a cache: a run that is repeated, extended or was
    interrupted scores only what is new.

    The page of `report` holds every figure, those of `ablate` and `sweep_top_k` included: with n closed
    experts some 2n + 1 more passes over the texts. It also holds the first 120 tokens or so of each text.

    Examples:
        flexctl evaluate --data law=heldout/law --data news=heldout/news
        flexctl evaluate --data law=heldout/law --without law --json
        flexctl evaluate --data law=heldout/law --data public=heldout/public --report report.html
        flexctl evaluate --data law=heldout/law --ablate --sweep-top-k --samples law.jsonl
        flexctl evaluate merged-2 --compare merged --data law=heldout/law
        flexctl evaluate --data law=heldout/law --baselines dense
        flexctl evaluate --tasks arc_easy.jsonl --tasks my-tasks/ --limit 100 --without law
    """

    bundle: flags.Bundle = None
    data: flags.Domains = ()
    tasks: Annotated[
        tuple[Path, ...],
        flag("PATH", "Questions (.jsonl), an lm-eval task (.yaml), or a folder of them; repeatable.", DATA),
    ] = ()
    without: flags.Without = ()
    compare: Annotated[
        Path | None,
        flag(
            "BUNDLE", "Hold it against another bundle, here or hf://OWNER/NAME, and say which documents moved.", MODEL
        ),
    ] = None
    report: Annotated[
        Path | None,
        flag(
            "FILE.html",
            "Write a page with all figures; it ablates and sweeps too, and holds passages of the texts.",
            OUTPUT,
        ),
    ] = None
    text_field: flags.TextField = "text"
    shots: Annotated[
        int | None,
        flag(
            "N", "Solved examples in each prompt of a task (default: a .yaml's own number, else 0).", DATA, at_least=0
        ),
    ] = None
    limit: Annotated[int | None, flag("N", "Only the first N items of each task.", DATA, above=0)] = None
    ablate: Annotated[bool, switch("Also score with each expert left out in turn.", MODEL)] = False
    sweep_top_k: Annotated[bool, switch("Also score with every number of experts active for a token.", MODEL)] = False
    samples: Annotated[
        Path | None,
        flag("FILE.jsonl", "Write figures of each document and task item, without their text.", OUTPUT),
    ] = None
    anchor: flags.Anchor = None
    top_k: flags.TopK = None
    baselines: Annotated[
        Path | None,
        flag("DIR", "Compare with soups, BTM, routing and more, from dense experts here: docs/baselines.md.", MODEL),
    ] = None
    seq_len: flags.SeqLen = None
    forward_tokens: flags.ForwardTokens = 8192
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Figures of one domain.

    Attributes:
        nll: Mean over targets, nats a token.
        perplexity: Its exponential.
        bits_per_byte: Total nll / ln 2 / UTF-8 bytes.
        bits_per_byte_low: Lower end of its 95 % interval over resampled documents; None for a single document.
        bits_per_byte_high: Upper end.
        tokens: Targets.
        bytes: UTF-8 bytes.
        documents: Documents.
    """

    nll: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    tokens: int
    bytes: int
    documents: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """Figures of one task.

    Attributes:
        metrics: Name, as lm-evaluation-harness calls it -> value.
        stderr: Name -> standard error, for metrics that are means over items.
        items: Items that were scored.
        shots: Solved examples in each prompt.
        digest: Of the task's file and all that it refers to.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    items: int
    shots: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult:
    """What ``evaluate`` found.

    Attributes:
        path: The bundle; text for one on the Hub.
        experts: Experts that were there, the public one first.
        without: Those left out.
        perplexity: A score a domain.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        routing_layers: Domain -> expert -> the same layer by layer.
        ablation: Expert left out -> domain -> bits per byte; empty unless asked for.
        top_k: Experts active -> domain -> bits per byte; empty unless asked for.
        router_agreement: Domain -> how often a bfloat16 router keeps the same experts, mean over targets and layers;
            empty where all experts are active.
        post_norm_ratio: Mean square of each layer's feed-forward output over rms_norm_eps, the smallest over domains;
            only for families with a norm after the feed-forward network, where it must be far above 1 for the norm to
            absorb that kept probabilities do not add up to 1.
        compare: How it stands beside another model.
        baselines: Baseline -> domain -> bits per byte.
        baselines_missing: Ingredient of a baseline that was not there -> how to make it.
        tasks: A score a task.
        data: Domain -> digest of its documents.
        samples: The file with a line a document and a task item.
        report: The file with the page.
        results: Where these figures were kept beside the bundle; None where that cannot be written, for a bundle on
            the Hub, and for a model that is not the bundle as it is.
    """

    path: Path | str
    digest: str
    experts: list[str]
    without: list[str]
    num_experts_per_tok: int
    perplexity: dict[str, DomainScore]
    routing: dict[str, dict[str, float]]
    routing_layers: dict[str, dict[str, list[float]]]
    ablation: dict[str, dict[str, float]] = field(default_factory=dict)
    top_k: dict[int, dict[str, float]] = field(default_factory=dict)
    router_agreement: dict[str, float] = field(default_factory=dict)
    post_norm_ratio: list[float] | None = None
    compare: Comparison | None = None
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines_missing: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    samples: Path | None = None
    report: Path | None = None
    results: Path | None = None
    peak_rss_bytes: int = 0


def evaluate(config: EvaluateConfig, reporter: Reporter = SILENT) -> EvaluateResult:
    """Score a bundle on test texts by the rule of docs/how-it-works.md, section 7.

    Args:
        config: Which bundle, which texts, what to leave out.
        reporter: Hears of progress.

    Returns:
        Perplexity, bits per byte and routing a domain, accuracy a task, and whatever else was asked for.

    Raises:
        UsageError: A setting or the data is wrong.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    from flexctl.evaluation.domains import parse_domains, read_domain
    from flexctl.evaluation.passes import Variant, ablate, sweep_top_k
    from flexctl.evaluation.records import write_results, write_samples
    from flexctl.evaluation.report.measured import other_of, report_of, tasks_of

    domains = parse_domains(config.data, config.text_field) if config.data or not config.tasks else []
    _refuse_bad_settings(config)
    tasks = _read_tasks(config)
    anchor = config.anchor or workspace.find().anchor
    runnable = hub.runnable(config.bundle or workspace.find().merged, anchor, reporter)
    other = hub.runnable(config.compare, anchor, reporter) if config.compare else None
    selection = runnable.select(config.without)
    runnable.warn_of_expired(selection, reporter)
    top_k = runnable.active(config.top_k, selection, reporter)
    whole = Variant(without=selection.without, top_k=top_k)
    ingredients = _ingredients(config, runnable)
    passes, *others = _prepare(config, [runnable, other] if other else [runnable], reporter)
    contents = [read_domain(domain, reporter) for domain in domains]
    scores = _score(passes, contents, whole)
    runs = _run_tasks(tasks, passes, whole, config, reporter)
    result = EvaluateResult(
        path=runnable.path,
        digest=runnable.digest,
        experts=runnable.experts,
        without=list(config.without),
        num_experts_per_tok=top_k,
        **_figures(scores, runnable),
        ablation=ablate(passes, contents, whole) if config.ablate or config.report else {},
        top_k=sweep_top_k(passes, contents, whole) if config.sweep_top_k or config.report else {},
        tasks={task.name: _task_score(task, runs[task.name]) for task in tasks},
        data={content.domain.name: content.digest for content in contents},
        samples=config.samples,
        report=config.report,
    )
    answered = tasks_of(tasks, runs)
    report = report_of(passes, contents, whole, result.post_norm_ratio, answered) if config.report else None
    passes.free()
    if others:
        beside = _compare(others[0], contents, scores)
        result = dataclasses.replace(result, compare=beside)
        report = report and dataclasses.replace(report, other=other_of(others[0].runnable, beside))
    baselines = _baselines(ingredients, passes, config, reporter)
    compared = baselines.score(domains) if baselines else {}
    if ingredients:
        bits = {way: {name: score.bits_per_byte for name, score in row.items()} for way, row in compared.items()}
        result = dataclasses.replace(result, baselines=bits, baselines_missing=dict(ingredients.missing))
    _say_what_was_recalled([passes, *others, *([baselines] if baselines else [])], reporter)
    if config.samples:
        answers = [record for run in runs.values() for record in run.records]
        write_samples(config.samples, contents, scores, runnable.experts, answers, overwrite=config.overwrite)
    if config.report and report:
        _write_report(config.report, report, compared, scores, overwrite=config.overwrite)
    if isinstance(runnable.path, Path) and not config.without and config.top_k is None:
        kept = write_results(runnable.path, _results(result, passes), reporter)
        result = dataclasses.replace(result, results=kept)
    return dataclasses.replace(result, peak_rss_bytes=peak_rss_bytes())


def _refuse_bad_settings(config: EvaluateConfig) -> None:
    from flexctl.evaluation.report.charts import require_matplotlib
    from flexctl.model.building import pick_device, pick_dtype

    pick_dtype(config.dtype, pick_device(config.device))
    for name in () if config.data else ("ablate", "sweep_top_k", "compare", "baselines", "report"):
        if getattr(config, name):
            raise UsageError("there is no text to score", hint="add `data`", field=name)
    for name, path in (("samples", config.samples), ("report", config.report)):
        if path is None:
            continue
        check_file_target(path, overwrite=True)
        if path.exists() and not config.overwrite:
            raise UsageError(f"{path} exists", hint="give another file, or `overwrite` to replace it", field=name)
    if config.report:
        require_matplotlib()


def _read_tasks(config: EvaluateConfig) -> list[Task]:
    if not config.tasks:
        return []
    from flexctl.evaluation.tasks import refuse_without_harness

    refuse_without_harness()
    from flexctl.evaluation.tasks.harness import read_tasks

    return read_tasks(config.tasks, config.shots)


def _run_tasks(
    tasks: Sequence[Task], passes: Passes, variant: Variant, config: EvaluateConfig, reporter: Reporter
) -> dict[str, TaskRun]:
    if not tasks:
        return {}
    from flexctl.evaluation.tasks.harness import run_task
    from flexctl.evaluation.tasks.model import HarnessModel

    model = HarnessModel(
        passes.model_as(variant), passes.tokenizer, batch_tokens=config.forward_tokens, reporter=reporter
    )
    return {task.name: run_task(task, model, config.limit) for task in tasks}


def _task_score(task: Task, run: TaskRun) -> TaskScore:
    return TaskScore(metrics=run.metrics, stderr=run.stderr, items=run.items, shots=task.shots, digest=task.digest)


def _prepare(config: EvaluateConfig, runnables: Sequence[Runnable], reporter: Reporter) -> list[Passes]:
    """Return the models' passes, with windows that all of them can hold, once their bytes are proven."""
    from flexctl.evaluation.domains import window_length
    from flexctl.evaluation.passes import Passes
    from flexctl.model.building import pick_device, pick_dtype, set_threads
    from flexctl.model.configs import warn_of_length

    for runnable in runnables:
        warn_of_length(config.seq_len, runnable.weights.dense_config, reporter)
    for bundle in [bundle for runnable in runnables for bundle in runnable.bundles]:
        prove(bundle, reporter)
    set_threads(config.threads)
    device = pick_device(config.device)
    seq_len = min(window_length(runnable.weights.dense_config, config.seq_len) for runnable in runnables)
    return [
        Passes(
            runnable,
            seq_len=seq_len,
            batch_tokens=config.forward_tokens,
            device=device,
            dtype=pick_dtype(config.dtype, device),
            reporter=reporter,
        )
        for runnable in runnables
    ]


def _score(passes: Passes, contents: Sequence[Content], variant: Variant) -> dict[str, Score]:
    return {content.domain.name: passes.score(content, variant) for content in contents}


def _figures(scores: Mapping[str, Score], runnable: Runnable) -> dict[str, Any]:
    """Return the fields of the result that follow from the whole model's scores."""
    layers = {name: score.routing_layers() for name, score in scores.items()}
    agreement = {name: score.router_agreement for name, score in scores.items()}
    return {
        "perplexity": {name: _domain_score(score) for name, score in scores.items()},
        "routing": {name: dict(zip(runnable.experts, score.routing(), strict=True)) for name, score in scores.items()},
        "routing_layers": {name: dict(zip(runnable.experts, rows, strict=True)) for name, rows in layers.items()},
        "router_agreement": {name: share for name, share in agreement.items() if share is not None},
        "post_norm_ratio": _post_norm_ratio(runnable.weights.dense_config, list(scores.values())),
    }


def _domain_score(score: Score) -> DomainScore:
    from flexctl.evaluation.bootstrap import interval

    low, high = interval(score.per_document) or (None, None)
    return DomainScore(
        nll=score.nll,
        perplexity=score.perplexity,
        bits_per_byte=score.bits_per_byte,
        bits_per_byte_low=low,
        bits_per_byte_high=high,
        tokens=score.tokens,
        bytes=score.num_bytes,
        documents=score.documents,
    )


def _post_norm_ratio(config: Mapping[str, Any], scores: Sequence[Score]) -> list[float] | None:
    import transformers

    if not scores or not family_of(config["model_type"]).post_norm:
        return None
    eps = transformers.AutoConfig.for_model(**config).rms_norm_eps
    ratios = [(score.output_square / score.tokens / eps).tolist() for score in scores]
    return [min(layer) for layer in zip(*ratios, strict=True)]


def _compare(other: Passes, contents: Sequence[Content], scores: Mapping[str, Score]) -> Comparison:
    from flexctl.evaluation.comparison import compare
    from flexctl.evaluation.passes import Variant

    runnable = other.runnable
    others = _score(other, contents, Variant(without=(), top_k=runnable.weights.num_experts_per_tok))
    return compare(runnable.path, runnable.digest, contents, scores, others)


def _ingredients(config: EvaluateConfig, runnable: Runnable) -> Ingredients | None:
    from flexctl.evaluation.baselines import find_ingredients

    if config.baselines is None:
        return None
    experts = [name for name in runnable.experts if name not in config.without]
    return find_ingredients(config.baselines, runnable.weights, experts, runnable.tokenizer)


def _baselines(
    ingredients: Ingredients | None, passes: Passes, config: EvaluateConfig, reporter: Reporter
) -> Baselines | None:
    """Return the baselines, to be scored as the bundle was."""
    from flexctl.evaluation.baselines import Baselines

    if ingredients is None:
        return None
    return Baselines(
        ingredients,
        passes.tokenizer,
        seq_len=passes.seq_len,
        batch_tokens=config.forward_tokens,
        top_k=config.top_k or _BTM_TOP_K,
        device=passes.device,
        dtype=passes.dtype,
        reporter=reporter,
    )


def _write_report(
    path: Path,
    report: Report,
    baselines: Mapping[str, Mapping[str, Score]],
    scores: Mapping[str, Score],
    *,
    overwrite: bool,
) -> None:
    from flexctl.evaluation.report.measured import shifts_of, write_report

    compared = {way: shifts_of(row, scores) for way, row in baselines.items()}
    write_report(path, dataclasses.replace(report, baselines=compared), overwrite=overwrite)


def _say_what_was_recalled(passes: Sequence[Passes | Baselines], reporter: Reporter) -> None:
    count, recalled = (sum(getattr(each, name) for each in passes) for name in ("count", "recalled"))
    if recalled:
        which = "all" if recalled == count else f"{recalled} of"
        reporter.note(
            f"{which} {count} passes are from the cache: model, text and settings are those of an earlier run"
        )


def _results(result: EvaluateResult, passes: Passes) -> dict[str, Any]:
    """Return what results.json says: the figures and what they were computed with; no path and no text."""
    fields = dataclasses.asdict(result)
    for name in ("path", "samples", "report", "results", "peak_rss_bytes", "without", "baselines_missing"):
        del fields[name]
    if result.compare:
        fields["compare"] = {"digest": result.compare.digest, "domains": fields["compare"]["domains"]}
    return {"schema_version": 1, "settings": passes.settings, "software": software_versions(), **fields}
