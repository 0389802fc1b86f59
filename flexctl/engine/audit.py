"""Audit what a model gives away of an owner's text: extraction, membership, canaries, and what removal leaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, text, tracing, training, workspace
from flexctl.bundle import Expert, Merged
from flexctl.bundle.checks import prove
from flexctl.bundle.index import Index, open_index
from flexctl.bundle.manifest import ExpertManifest, PrivacyInfo
from flexctl.bundle.runnable import Runnable
from flexctl.bundle.store import check_file_target, new_file, own_file
from flexctl.errors import UsageError
from flexctl.evaluation.attacks.findings import Audited, Recovery
from flexctl.evaluation.lineage import lineage
from flexctl.options import DATA, OUTPUT, TRAINING, Config, flag
from flexctl.runtime import SILENT, Parts, Reporter
from flexctl.steps import sources
from flexctl.steps.machine import Machine, machine_of
from flexctl.steps.recovery import recover

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AuditConfig", "AuditResult", "audit"]

_DELTA = 1e-5
"""Of the guarantee that canaries are held against where the expert claims none."""
_FEW = 20
_TRAINED_ON = 16
_ANCHOR = "anchor"


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig(Config):
    """What ``audit`` is asked to do.

    Attacks the anchor, the model, and the model without the expert, with text that the expert was trained on and text
    of the same kind that it was not. Runs at the owner's, who has the text; the result holds figures and no text.

    Examples:
        flexctl audit merged --name law --data corpus/law
        flexctl audit experts/law.st --data corpus/law --planted experts/law.canaries --report audit.html
    """

    bundle: flags.Bundle = None
    data: Annotated[tuple[Path, ...], flag("PATH", "The text that the expert was trained on; repeatable.", DATA)]
    name: Annotated[str | None, flag("NAME", "The expert (default: the only closed one).", OUTPUT)] = None
    held_out: Annotated[
        Path | None,
        flag("PATH", "Text of the same kind that it never saw (default: what training held out of `data`).", DATA),
    ] = None
    decontaminate: Annotated[
        tuple[Path, ...], flag("PATH", "The test text that training left out, as it was given there.", DATA)
    ] = ()
    planted: Annotated[
        Path | None, flag("DIR", "The canaries that train-expert planted, as experts/NAME.canaries.", DATA)
    ] = None
    recover: Annotated[
        int | None,
        flag("STEPS", "See how fast removed text comes back by so many steps of training.", TRAINING, above=0),
    ] = None
    report: Annotated[Path | None, flag("FILE", "Write a page, one HTML file.", OUTPUT)] = None
    documents: Annotated[int, flag("N", "Documents of each kind that are tried.", DATA, above=0)] = 200
    draws: Annotated[int, flag("N", "Continuations of each document.", DATA, above=0)] = 10
    prefix_tokens: Annotated[int, flag("N", "Tokens of a document that the model is given.", DATA, above=0)] = 32
    max_new_tokens: Annotated[int, flag("N", "Tokens that it is to go on with.", OUTPUT, above=0)] = 64
    index: Annotated[
        tuple[Path, ...],
        flag("DIR", "An index of the text: also look for spans of any document in answers; repeatable.", DATA),
    ] = ()
    text_field: flags.TextField = "text"
    anchor: flags.Anchor = None
    lr: Annotated[
        float | None, flag("X", "Learning rate of `recover` (default: by the model's width).", TRAINING, above=0)
    ] = None
    seq_len: flags.SeqLen = None
    forward_tokens: flags.ForwardTokens = 8192
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """What ``audit`` found.

    Attributes:
        path: The bundle; text for one on the Hub.
        name: The expert whose text it is about.
        members: Documents that were trained on, of those tried.
        others: Documents that were not.
        models: Model -> what attacks on it found: the anchor, the whole, and the whole without the expert.
        claimed: The guarantee that the expert claims; None is none.
        recovery: What comes back after removal, where that was asked for.
        report: The page.
    """

    path: Path | str
    digest: str
    name: str
    members: int
    others: int
    prefix_tokens: int
    max_new_tokens: int
    draws: int
    models: dict[str, Audited] = field(default_factory=dict)
    claimed: PrivacyInfo | None = None
    recovery: Recovery | None = None
    report: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """Everything an audit needs, read and proven."""

    config: AuditConfig
    reporter: Reporter
    machine: Machine
    passes: evaluation.Passes
    name: str
    manifest: ExpertManifest
    texts: evaluation.Texts
    started: list[evaluation.Beginning]
    indexes: list[Index]

    @property
    def variants(self) -> dict[str, evaluation.Variant]:
        """Model -> how the bundle runs as it, the anchor first."""
        whole = evaluation.Variant.of(self.passes.runnable)
        alone = evaluation.public_alone(self.passes)
        without = evaluation.one_left_out(self.passes, whole)[self.name]
        kind = self.passes.runnable.bundles[0].manifest.kind
        found = {_ANCHOR: alone, kind: whole}
        return found if without == alone else {**found, f"without {self.name}": without}


def audit(config: AuditConfig, reporter: Reporter = SILENT) -> AuditResult:
    """Attack a model with an owner's text, and say what that finds.

    Args:
        config: Which model, whose text, how hard to try.
        reporter: Hears of progress, and of too little text.

    Raises:
        UsageError: A setting or the data is wrong, or there is too little text.
        BundleError: The bundle or the index is not valid.
    """
    _refuse_bad_settings(config)
    run = _set_up(config, reporter)
    if config.dry_run:
        return _result(run, dry_run=True)
    models = _attack(run)
    run.passes.free()
    result = _result(run, models=models, recovery=_recover(run) if config.recover else None, report=config.report)
    if config.report:
        page = evaluation.render_audit(
            run.name,
            models,
            result.recovery,
            lineage=lineage(run.passes.runnable.bundles, ()),
            digest=result.digest,
            claimed=result.claimed,
            facts=_facts(run),
        )
        with new_file(config.report, overwrite=config.overwrite) as temporary, own_file(temporary) as file:
            file.write(page.encode())
    return result


def _refuse_bad_settings(config: AuditConfig) -> None:
    tracing.require_rapidfuzz()
    text.text_files(config.data)
    if config.held_out is not None:
        text.text_files([config.held_out], "held_out")
    if config.decontaminate:
        text.text_files(config.decontaminate, "decontaminate")
    if config.planted is not None:
        folder = text.CanaryFolder(config.planted)
        if not (folder.planted.is_file() and folder.left_out.is_file()):
            raise UsageError(f"{config.planted}: holds no canaries", hint="train-expert plants some", field="planted")
    if config.report:
        check_file_target(config.report, overwrite=config.overwrite)
        evaluation.require_jinja()
        evaluation.require_matplotlib()


def _set_up(config: AuditConfig, reporter: Reporter) -> _Run:
    place, machine = workspace.find(), machine_of(config)
    runnable = sources.runnable(config.bundle or place.merged, config.anchor or place.anchor, reporter)
    name, manifest = _expert(runnable, config.name)
    indexes = [open_index(path) for path in config.index]
    for bundle in runnable.bundles:
        prove(bundle, reporter)
    passes = evaluation.Passes(
        runnable,
        seq_len=evaluation.window_length(runnable.weights.dense_config, config.seq_len),
        batch_tokens=config.forward_tokens,
        device=machine.device,
        dtype=machine.dtype,
        # As the expert was trained.
        special_as_text=bool(manifest.training.get("special_as_text")),
        reporter=Parts(reporter),
    )
    texts = _read_texts(config, manifest, passes.tokenizer)
    started = evaluation.beginnings(passes.tokenizer, texts.members, config.prefix_tokens, config.max_new_tokens)
    _refuse_little(config, texts, started, reporter)
    if config.recover and len(runnable.experts) < 3:
        raise UsageError(f"without {name} this model is the anchor, and comes back as it does", field="recover")
    return _Run(
        config=config,
        reporter=reporter,
        machine=machine,
        passes=passes,
        name=name,
        manifest=manifest,
        texts=texts,
        started=started,
        indexes=indexes,
    )


def _expert(runnable: Runnable, name: str | None) -> tuple[str, ExpertManifest]:
    """Return the expert that an audit is about, and its owner's manifest."""
    bundle, closed = runnable.bundles[0], runnable.experts[1:]
    if not closed:
        raise UsageError(f"{runnable.path}: has no closed expert", hint="audit an expert or a merged model")
    if name is None and len(closed) > 1:
        raise UsageError(f"say which of {', '.join(closed)}", field="name")
    name = name or closed[0]
    if name not in closed:
        raise UsageError(f"{name!r} is not in {runnable.path}, which holds {', '.join(closed)}", field="name")
    if isinstance(bundle, Merged):
        return name, bundle.owner_manifest(closed.index(name) + 1)[0]
    assert isinstance(bundle, Expert)
    return name, bundle.manifest


def _read_texts(config: AuditConfig, manifest: ExpertManifest, tokenizer: Any) -> evaluation.Texts:
    folder = text.CanaryFolder(config.planted) if config.planted else None
    paths = [*config.data, *([folder.planted] if folder else [])]
    # Training under a guarantee holds nothing out.
    seed = manifest.training.get("seed") if manifest.privacy is None else None
    if config.held_out is None and not isinstance(seed, int):
        raise UsageError(
            "the expert does not say which documents training held out", hint="name such text", field="held_out"
        )
    without = text.Decontamination.read(config.decontaminate, config.text_field)
    split = (
        text.split_of(without.kept(text.read_documents(paths, config.text_field)), seed)
        if isinstance(seed, int)
        else None
    )

    def own() -> Iterable[str]:
        return without.kept(text.read_documents(config.data, config.text_field))

    members = split.training(own()) if split else own()
    others = (
        text.read_documents([config.held_out], config.text_field)
        if config.held_out
        else split.held_out(own())
        if split
        else []
    )

    def framed(documents: Iterable[str]) -> list[text.Framed]:
        chosen = text.sample_documents(documents, config.documents, config.seed)
        return list(text.frame_documents(tokenizer, chosen))

    def all_of(file: Path) -> list[text.Framed]:
        return list(text.frame_documents(tokenizer, text.read_documents([file], config.text_field)))

    return evaluation.Texts(
        members=framed(members),
        others=framed(others),
        planted=all_of(folder.planted) if folder else [],
        left_out=all_of(folder.left_out) if folder else [],
    )


def _refuse_little(
    config: AuditConfig, texts: evaluation.Texts, started: Sequence[evaluation.Beginning], reporter: Reporter
) -> None:
    for documents, name in ((texts.members, "data"), (texts.others, "held_out")):
        if len(documents) < 2:
            raise UsageError(f"{len(documents)} documents are too few to tell anything from", field=name)
        if len(documents) < _FEW:
            reporter.warn(f"`{name}`: {len(documents)} documents alone; intervals are wide")
    if not started:
        least = config.prefix_tokens + config.max_new_tokens
        raise UsageError(
            f"no document has {least} tokens", hint="give smaller `prefix_tokens` and `max_new_tokens`", field="data"
        )


def _attack(run: _Run) -> dict[str, Audited]:
    """Return model -> what attacks on it found."""
    config, passes = run.config, run.passes
    effort = evaluation.Effort(
        length=config.max_new_tokens,
        samples=config.draws,
        seq_len=passes.seq_len,
        batch_tokens=config.forward_tokens,
        seed=config.seed,
    )
    trials = {
        name: evaluation.try_model(
            passes.model_as(variant),
            passes.tokenizer,
            run.started,
            run.texts,
            effort,
            name=name,
            reporter=run.reporter,
        )
        for name, variant in run.variants.items()
    }
    delta = run.manifest.privacy.delta if run.manifest.privacy else _DELTA
    anchor = trials.pop(_ANCHOR)
    first = evaluation.audited(anchor, None, delta=delta, indexes=run.indexes)
    if first.found:
        run.reporter.warn("the anchor, which saw neither, tells `data` from `held_out`: they are not of one kind")
    others = {
        name: evaluation.audited(trial, anchor, delta=delta, indexes=run.indexes, are_alike=not first.found)
        for name, trial in trials.items()
    }
    return {_ANCHOR: first, **others}


def _recover(run: _Run) -> Recovery:
    """Train the model without the expert, and the anchor, on a little of the expert's text."""
    config, passes = run.config, run.passes
    variants = run.variants
    hidden = int(passes.runnable.weights.dense_config["hidden_size"])

    def build(variant: evaluation.Variant) -> nn.Module:
        reader = run.machine.build(passes.runnable.weights)
        model.set_top_k(reader, variant.top_k)
        model.exclude(reader, passes.runnable.select(variant.without).left_out)
        return reader

    without = variants[f"without {run.name}"]
    return recover(
        {f"without {run.name}": lambda: build(without), _ANCHOR: lambda: build(variants[_ANCHOR])},
        run.texts.members[:_TRAINED_ON],
        run.texts.others,
        steps=config.recover or 0,
        lr=config.lr or training.default_lr(hidden),
        seq_len=passes.seq_len,
        batch_tokens=config.forward_tokens,
        seed=config.seed,
        reporter=run.reporter,
    )


def _result(run: _Run, **found: Any) -> AuditResult:
    return AuditResult(
        path=run.passes.runnable.path,
        digest=run.passes.runnable.digest,
        name=run.name,
        claimed=run.manifest.privacy,
        **_facts(run),
        **found,
    )


def _facts(run: _Run) -> dict[str, Any]:
    """Return how hard it was tried."""
    config = run.config
    return {
        "members": len(run.texts.members),
        "others": len(run.texts.others),
        "prefix_tokens": config.prefix_tokens,
        "max_new_tokens": config.max_new_tokens,
        "draws": config.draws,
    }
