"""Score an anchor, an expert beside its anchor, or a merged model: domain by domain, task by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from flexctl import evaluation, flags, model, workspace
from flexctl.bundle.checks import prove
from flexctl.bundle.runnable import Runnable
from flexctl.bundle.store import check_file_target, new_file
from flexctl.errors import UsageError
from flexctl.evaluation.figures import Figures
from flexctl.evaluation.lineage import lineage
from flexctl.options import DATA, MODEL, OUTPUT, Config, flag, switch
from flexctl.processes import Joined, World, refuse_many
from flexctl.runtime import SILENT, Parts, Reporter, peak_rss_bytes, software_versions
from flexctl.steps import sources
from flexctl.steps.machine import machine_of

__all__ = ["EvaluateConfig", "EvaluateResult", "evaluate"]

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
    `results_from` draws it again from a results.json alone, without those tokens.

    Examples:
        flexctl evaluate --data law=heldout/law --data news=heldout/news
        flexctl evaluate --data law=heldout/law --without law --json
        flexctl evaluate --data law=heldout/law --data public=heldout/public --report report.html
        flexctl evaluate --data law=heldout/law --ablate --sweep-top-k --samples law.jsonl
        flexctl evaluate merged-2 --compare merged --data law=heldout/law
        flexctl evaluate --data law=heldout/law --baselines dense
        flexctl evaluate --tasks arc_easy.jsonl --tasks my-tasks/ --limit 100 --without law
        flexctl evaluate --from merged/results.json --report report.html
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
            "Write a page with all figures; it ablates and sweeps too, and holds excerpts of the texts.",
            OUTPUT,
        ),
    ] = None
    results_from: Annotated[
        Path | None,
        flag("FILE.json", "Show a results.json again, without a model; with `report`, as a page.", MODEL, name="from"),
    ] = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
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
        flag(
            "FILE.jsonl",
            "Write figures of each document and task item, without their text; shares tell its kind.",
            OUTPUT,
        ),
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
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateResult(Figures):
    """What ``evaluate`` found, and where it was kept.

    Attributes:
        path: The bundle; text for one on the Hub; the results that were shown again.
        baselines_missing: Ingredient of a baseline that was not there -> how to make it.
        samples: The file with a line a document and a task item.
        report: The file with the page.
        results: Where these figures were kept beside the bundle; None where that cannot be written, for a bundle on
            the Hub, and for a model that is not the bundle as it is.
        passes: Passes over a text by the bundle and by the model beside it, those from the cache included.
        dry_run: Whether nothing was scored and nothing written.
    """

    path: Path | str
    baselines_missing: dict[str, str] = field(default_factory=dict)
    samples: Path | None = None
    report: Path | None = None
    results: Path | None = None
    passes: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """Everything a run needs, read and proven, before anything is scored.

    Attributes:
        measured: The bundle on the domains.
        other: The model beside it, on the same.
        ablated: Expert left out -> how the bundle then runs.
        swept: Experts active -> how the bundle then runs.
        alone: How the public expert alone runs; None where that is not asked for.
        tasks: The tasks.
        ingredients: Of baselines.
    """

    config: EvaluateConfig
    reporter: Reporter
    measured: evaluation.Measured
    other: evaluation.Measured | None
    ablated: dict[str, evaluation.Variant]
    swept: dict[int, evaluation.Variant]
    alone: evaluation.Variant | None
    tasks: list[evaluation.Task]
    ingredients: evaluation.Ingredients | None

    @property
    def variants(self) -> list[evaluation.Variant]:
        """Every way in which the bundle runs."""
        return [
            self.measured.whole,
            *self.ablated.values(),
            *self.swept.values(),
            *([self.alone] if self.alone else []),
        ]

    @property
    def all_passes(self) -> list[evaluation.Passes]:
        """The bundle's passes, and those of the model beside it."""
        return [self.measured.passes, *([self.other.passes] if self.other else [])]


def evaluate(config: EvaluateConfig, reporter: Reporter = SILENT) -> EvaluateResult:
    """Score a bundle on test texts by the rule of docs/how-it-works.md, section 7.

    Args:
        config: Which bundle, which texts, what to leave out.
        reporter: Hears of progress.

    Returns:
        Perplexity, bits per byte and routing a domain, accuracy a task, and whatever else was asked for; in every
        process that torchrun started, of which one writes.

    Raises:
        UsageError: A setting or the data is wrong.
        BundleError: The bundle is not valid, or does not belong to the anchor.
    """
    _refuse_bad_settings(config)
    if config.results_from is not None:
        return _shown_again(config, config.results_from)
    with Joined(config.device) as world:
        run = _set_up(config, world, reporter)
        if config.dry_run:
            return _result(run, _facts(run))
        _score(run)
        answers = _answer_tasks(run)
        excerpts = _take_excerpts(run)
        run.measured.passes.free()
        compared = _score_others(run)
        return world.by_writer(lambda: _written(run, answers, excerpts, compared))


def _refuse_bad_settings(config: EvaluateConfig) -> None:
    for name in ("results_from", "tasks", "baselines"):
        if getattr(config, name):
            refuse_many(f"evaluate with `{name}`")
    needs_text = ("ablate", "sweep_top_k", "compare", "baselines")
    if config.results_from is not None:
        for name in ("bundle", "data", "tasks", *needs_text, "samples", "dry_run"):
            if getattr(config, name):
                raise UsageError("nothing is scored with `results_from`", hint="leave it out", field=name)
    elif not config.data:
        for name in (*needs_text, "report"):
            if getattr(config, name):
                raise UsageError("there is no text to score", hint="add `data`", field=name)
    for name, path in (("samples", config.samples), ("report", config.report)):
        if path is None:
            continue
        check_file_target(path, overwrite=True)
        if path.exists() and not config.overwrite:
            raise UsageError(f"{path} exists already", hint="give another, or `overwrite` to replace it", field=name)
    if config.report:
        evaluation.require_matplotlib()


def _shown_again(config: EvaluateConfig, path: Path) -> EvaluateResult:
    """Return the figures of an earlier run; a page of them is written where one is asked for."""
    figures = evaluation.read_results(path)
    if config.report and not figures.perplexity:
        raise UsageError(f"{path} has scores of tasks alone; a page shows scores on text", field="report")
    if config.report:
        _write_page(config.report, figures, (), overwrite=config.overwrite)
    return _with_places(figures, path=path, report=config.report, peak_rss_bytes=peak_rss_bytes())


def _set_up(config: EvaluateConfig, world: World, reporter: Reporter) -> _Run:
    """Read and refuse everything that can be before a model is built, and say which passes are to come."""
    domains = evaluation.parse_domains(config.data, config.text_field) if config.data or not config.tasks else []
    machine_of(config)
    tasks = _read_tasks(config)
    anchor = config.anchor or workspace.find().anchor
    # What the writer has fetched, the others find.
    runnable, other = world.writer_first(
        lambda: (
            sources.runnable(config.bundle or workspace.find().merged, anchor, reporter),
            sources.runnable(config.compare, anchor, reporter) if config.compare else None,
        )
    )
    selection = runnable.select(config.without)
    runnable.warn_of_expired(selection, reporter)
    top_k = runnable.active(config.top_k, selection, reporter)
    whole = evaluation.Variant(without=selection.without, top_k=top_k)
    ingredients = _ingredients(config, runnable)
    passes, *others = _prepare(config, [runnable, other] if other else [runnable], world, reporter)
    contents = world.by_writer(lambda: [evaluation.read_domain(domain, reporter) for domain in domains])
    alone = evaluation.public_alone(passes)
    run = _Run(
        config=config,
        reporter=reporter,
        measured=evaluation.Measured(passes=passes, contents=contents, whole=whole),
        other=_as_it_is(others[0], contents) if others else None,
        ablated=evaluation.one_left_out(passes, whole) if config.ablate or config.report else {},
        swept=evaluation.every_top_k(passes, whole) if config.sweep_top_k or config.report else {},
        alone=alone if config.report and whole.without != alone.without else None,
        tasks=tasks,
        ingredients=ingredients,
    )
    passes.expect(contents, run.variants)
    if run.other:
        run.other.passes.expect(contents, [run.other.whole])
    return run


def _as_it_is(passes: evaluation.Passes, contents: Sequence[evaluation.Content]) -> evaluation.Measured:
    whole = evaluation.Variant.of(passes.runnable)
    return evaluation.Measured(passes=passes, contents=contents, whole=whole)


def _read_tasks(config: EvaluateConfig) -> list[evaluation.Task]:
    if not config.tasks:
        return []

    evaluation.refuse_without_harness()

    return evaluation.read_tasks(config.tasks, config.shots)


def _prepare(
    config: EvaluateConfig, runnables: Sequence[Runnable], world: World, reporter: Reporter
) -> list[evaluation.Passes]:
    """Return the models' passes, with windows that all of them can hold, once their bytes are proven."""
    for runnable in runnables:
        model.warn_of_length(config.seq_len, runnable.weights.dense_config, reporter)
    bundles = [bundle for runnable in runnables for bundle in runnable.bundles]
    for bundle in bundles:
        world.by_writer(partial(prove, bundle, reporter))
    seq_len = min(evaluation.window_length(runnable.weights.dense_config, config.seq_len) for runnable in runnables)
    machine = machine_of(config, runnables[0].weights.shared)
    parts = Parts(reporter)
    return [
        evaluation.Passes(
            runnable,
            seq_len=seq_len,
            batch_tokens=config.forward_tokens,
            device=machine.device,
            dtype=machine.dtype,
            special_as_text=config.special_as_text,
            reporter=parts,
            world=world,
        )
        for runnable in runnables
    ]


def _ingredients(config: EvaluateConfig, runnable: Runnable) -> evaluation.Ingredients | None:
    if config.baselines is None:
        return None
    experts = [name for name in runnable.experts if name not in config.without]
    return evaluation.find_ingredients(config.baselines, runnable.weights, experts, runnable.tokenizer)


def _score(run: _Run) -> None:
    """Make all passes of the bundle that no earlier run has made."""
    for variant in run.variants:
        for content in run.measured.contents:
            run.measured.passes.score(content, variant)


def _answer_tasks(run: _Run) -> dict[str, evaluation.TaskRun]:
    if not run.tasks:
        return {}

    passes, config = run.measured.passes, run.config
    answering = evaluation.HarnessModel(
        passes.model_as(run.measured.whole),
        # Prompts are read as the harness reads them, whatever `special_as_text` says of texts.
        model.load_tokenizer(passes.runnable.tokenizer),
        batch_tokens=config.forward_tokens,
        reporter=run.reporter,
    )
    return {task.name: evaluation.run_task(task, answering, config.limit) for task in run.tasks}


def _take_excerpts(run: _Run) -> list[evaluation.Excerpt]:
    if not run.config.report:
        return []

    measured = run.measured
    return [evaluation.take_excerpt(measured.passes, content, measured.whole) for content in measured.contents]


def _score_others(run: _Run) -> dict[str, dict[str, evaluation.Score]]:
    """Score the model beside the bundle, and return baseline -> domain -> score."""
    if run.other:
        for content in run.other.contents:
            run.other.passes.score(content, run.other.whole)
        run.other.passes.free()
    baselines = _baselines(run)
    compared = baselines.score([content.domain for content in run.measured.contents]) if baselines else {}
    _say_what_was_recalled([*run.all_passes, *([baselines] if baselines else [])], run.reporter)
    return compared


def _baselines(run: _Run) -> evaluation.Baselines | None:
    """Return the baselines, to be scored as the bundle was."""
    if run.ingredients is None:
        return None
    passes = run.measured.passes
    return evaluation.Baselines(
        run.ingredients,
        passes.tokenizer,
        seq_len=passes.seq_len,
        batch_tokens=run.config.forward_tokens,
        top_k=run.config.top_k or _BTM_TOP_K,
        device=passes.device,
        dtype=passes.dtype,
        reporter=run.reporter,
    )


def _say_what_was_recalled(passes: Sequence[evaluation.Passes | evaluation.Baselines], reporter: Reporter) -> None:
    count, recalled = (sum(getattr(each, name) for each in passes) for name in ("count", "recalled"))
    if recalled:
        which = f"all {count}" if recalled == count > 1 else f"{recalled} of {count}"
        plural = "pass is" if count == 1 else "passes are"
        reporter.note(f"{which} {plural} from the cache: model, text and settings are those of an earlier run")


def _facts(run: _Run) -> Figures:
    """Return what is known before anything is scored."""
    passes, whole = run.measured.passes, run.measured.whole
    return Figures(
        digest=passes.runnable.digest,
        experts=passes.runnable.experts,
        without=list(run.config.without),
        num_experts_per_tok=whole.top_k,
        lineage=lineage(passes.runnable.bundles, whole.without),
        settings=passes.settings,
        data={content.domain.name: content.digest for content in run.measured.contents},
        software=software_versions(),
    )


def _figures(
    run: _Run, answers: Mapping[str, evaluation.TaskRun], compared: Mapping[str, Mapping[str, evaluation.Score]]
) -> Figures:
    """Return all that was found; what it is worked out from has been scored."""
    measured = run.measured
    return dataclasses.replace(
        _facts(run),
        perplexity=measured.perplexity(),
        routing=measured.routing(),
        routing_layers=measured.routing_layers(),
        public_alone=measured.bits(run.alone) if run.alone else {},
        public_alone_change=measured.change(run.alone) if run.alone else {},
        ablation={name: measured.bits(variant) for name, variant in run.ablated.items()},
        ablation_change={name: measured.change(variant) for name, variant in run.ablated.items()},
        top_k={k: measured.bits(variant) for k, variant in run.swept.items()},
        top_k_change={k: measured.change(variant) for k, variant in run.swept.items()},
        baselines={way: {name: score.bits_per_byte for name, score in row.items()} for way, row in compared.items()},
        baselines_change={way: measured.change_of(row) for way, row in compared.items()},
        compare=measured.beside(run.other) if run.other else None,
        tasks={task.name: evaluation.task_score(task, answers[task.name]) for task in run.tasks},
        router_agreement=measured.router_agreement(),
        post_norm_ratio=measured.post_norm_ratio(),
    )


def _written(
    run: _Run,
    answers: Mapping[str, evaluation.TaskRun],
    excerpts: Sequence[evaluation.Excerpt],
    compared: Mapping[str, Mapping[str, evaluation.Score]],
) -> EvaluateResult:
    """Return the figures once they, the samples and the page are written, as far as they are asked for."""
    config, measured, figures = run.config, run.measured, _figures(run, answers, compared)
    if config.samples:
        records = [record for answer in answers.values() for record in answer.records]
        evaluation.write_samples(
            config.samples, measured.contents, measured.scores, figures.experts, records, overwrite=config.overwrite
        )
    if config.report:
        _write_page(config.report, figures, excerpts, overwrite=config.overwrite)
    return _result(run, figures)


def _write_page(path: Path, figures: Figures, excerpts: Sequence[evaluation.Excerpt], *, overwrite: bool) -> None:
    page = evaluation.render(figures, excerpts)
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _result(run: _Run, figures: Figures) -> EvaluateResult:
    """Return the figures with where they were kept; results.json is written for a bundle that is here as it is."""
    config, path = run.config, run.measured.passes.runnable.path
    keep = isinstance(path, Path) and not (config.without or config.top_k is not None or config.dry_run)
    return _with_places(
        figures,
        path=path,
        baselines_missing=dict(run.ingredients.missing) if run.ingredients else {},
        samples=config.samples,
        report=config.report,
        results=evaluation.write_results(path, figures, run.reporter) if keep and isinstance(path, Path) else None,
        passes=sum(passes.count for passes in run.all_passes),
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
    )


def _with_places(figures: Figures, **places: Any) -> EvaluateResult:
    found = {item.name: getattr(figures, item.name) for item in dataclasses.fields(Figures)}
    return EvaluateResult(**found, **places)
