"""Audit what a model gives away of an owner's text: extraction, membership, canaries, and what removal leaves."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, tracing, training, workspace
from flexctl.bundle import Expert, Merged
from flexctl.bundle.checks import prove
from flexctl.bundle.index import Index, open_index
from flexctl.bundle.manifest import ExpertManifest, PrivacyInfo
from flexctl.bundle.runnable import Runnable
from flexctl.bundle.store import check_file_target, new_file, own_file
from flexctl.errors import UsageError
from flexctl.evaluation.attacks.findings import Answers, Audited, Recovery
from flexctl.evaluation.lineage import lineage
from flexctl.options import DATA, OUTPUT, TRAINING, TRUST, Config, flag
from flexctl.runtime import SILENT, Parts, Reporter
from flexctl.steps import sources
from flexctl.steps.absence import refuse_unproven, show_absence
from flexctl.steps.audit_texts import audit_texts, refuse_little_text, refuse_missing_text
from flexctl.steps.claims import bound_of
from flexctl.steps.machine import Machine, machine_of
from flexctl.steps.recovery import recover
from flexctl.trust.records import Absence

if TYPE_CHECKING:
    from torch import nn

__all__ = ["AuditConfig", "AuditResult", "audit"]

_DELTA = 1e-5
"""Of the guarantee that canaries are held against where the expert claims none."""
_TRAINED_ON = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig(Config):
    """What ``audit`` is asked to do.

    Attacks the anchor, the model, and the model without the expert, with text that the expert was trained on and text
    of the same kind that it was not. Runs at the owner's, who has the text; the result holds figures and no text.

    Answers what the expert gives away at most, by its guarantee; at least, by the strongest attack; and
    whether it is gone, by the signed record that remove left.

    Examples:
        flexctl audit merged --name law --data corpus/law
        flexctl audit experts/law.st --data corpus/law --planted experts/law.canaries --report audit.html
        flexctl audit experts/law.st --data corpus/law --removed-from merged --trust trust.toml --report audit.html
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
    removed_from: Annotated[
        Path | None,
        flag(
            "DIR", "The model that it was removed from: NAME.removed.json beside it must prove that it is gone.", TRUST
        ),
    ] = None
    trust: flags.Trust = None
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
        answers: At most, at least, gone; None after a dry run.
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
    answers: Answers | None = None
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
    gone: Absence | None

    @property
    def variants(self) -> dict[str, evaluation.Variant]:
        """Model -> how the bundle runs as it, the anchor first."""
        whole = evaluation.Variant.of(self.passes.runnable)
        alone = evaluation.public_alone(self.passes)
        without = evaluation.one_left_out(self.passes, whole)[self.name]
        kind = self.passes.runnable.bundles[0].manifest.kind
        found = {evaluation.ANCHOR: alone, kind: whole}
        return found if without == alone else {**found, f"without {self.name}": without}


def audit(config: AuditConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> AuditResult:
    """Attack a model with an owner's text, and say what that finds.

    Args:
        config: Which model, whose text, how hard to try.
        reporter: Hears of progress, and of too little text.
        today: The day that trust is asked on; the real one if None.

    Raises:
        UsageError: A setting or the data is wrong, or there is too little text.
        BundleError: The bundle or the index is not valid, or the expert is not shown to be gone.
    """
    _refuse_bad_settings(config)
    run = _set_up(config, reporter, today)
    if config.dry_run:
        return _result(run, dry_run=True)
    models = _attack(run)
    run.passes.free()
    answers = Answers(at_most=bound_of(run.manifest.privacy), at_least=evaluation.strongest(models), gone=run.gone)
    recovery = _recover(run) if config.recover else None
    result = _result(run, answers=answers, models=models, recovery=recovery, report=config.report)
    if config.report:
        page = evaluation.render_audit(
            run.name,
            answers,
            models,
            recovery,
            lineage=lineage(run.passes.runnable.bundles, ()),
            digest=result.digest,
            facts=_facts(run),
        )
        with new_file(config.report, overwrite=config.overwrite) as temporary, own_file(temporary) as file:
            file.write(page.encode())
    return result


def _refuse_bad_settings(config: AuditConfig) -> None:
    tracing.require_rapidfuzz()
    refuse_missing_text(config)
    refuse_unproven(config)
    if config.report:
        check_file_target(config.report, overwrite=config.overwrite)
        evaluation.require_jinja()
        evaluation.require_matplotlib()


def _set_up(config: AuditConfig, reporter: Reporter, today: datetime.date | None) -> _Run:
    place, machine = workspace.find(), machine_of(config)
    runnable = sources.runnable(config.bundle or place.merged, config.anchor or place.anchor, reporter)
    name, digest, manifest = _expert(runnable, config.name)
    if config.recover and len(runnable.experts) < 3:
        raise UsageError(f"without {name} this model is the anchor, and comes back as it does", field="recover")
    indexes = [open_index(path) for path in config.index]
    for bundle in runnable.bundles:
        prove(bundle, reporter)
    first = runnable.bundles[0]
    gone = show_absence(config, name, digest, first if isinstance(first, Expert) else None, reporter, today=today)
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
    texts = audit_texts(config, manifest, passes.tokenizer)
    started = evaluation.beginnings(passes.tokenizer, texts.members, config.prefix_tokens, config.max_new_tokens)
    refuse_little_text(config, texts, started, reporter)
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
        gone=gone,
    )


def _expert(runnable: Runnable, name: str | None) -> tuple[str, str, ExpertManifest]:
    """Return the expert that an audit is about, its digest, and its owner's manifest."""
    bundle, closed = runnable.bundles[0], runnable.experts[1:]
    if not closed:
        raise UsageError(f"{runnable.path}: has no closed expert", hint="audit an expert or a merged model")
    if name is None and len(closed) > 1:
        raise UsageError(f"say which of {', '.join(closed)}", field="name")
    name = name or closed[0]
    if name not in closed:
        raise UsageError(f"{name!r} is not in {runnable.path}, which holds {', '.join(closed)}", field="name")
    if isinstance(bundle, Merged):
        index = closed.index(name) + 1
        return name, bundle.manifest.experts[index].digest, bundle.owner_manifest(index)[0]
    assert isinstance(bundle, Expert)
    return name, bundle.digest, bundle.manifest


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
    found: dict[str, Audited] = evaluation.attack(
        passes,
        run.variants,
        run.started,
        run.texts,
        effort,
        delta=run.manifest.privacy.delta if run.manifest.privacy else _DELTA,
        indexes=run.indexes,
        reporter=run.reporter,
    )
    return found


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
        {f"without {run.name}": lambda: build(without), evaluation.ANCHOR: lambda: build(variants[evaluation.ANCHOR])},
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
