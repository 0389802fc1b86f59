"""Tune a merged model's router on public text that is like each owner's; everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, routing, text, training, workspace
from flexctl.bundle import PUBLIC, Anchor, Merged, RawTensor, open_merged
from flexctl.bundle.codec import indented_json
from flexctl.bundle.composition import compose_merged
from flexctl.bundle.proxy import Proxy, open_proxy
from flexctl.bundle.store import check_directory_target, place_of_work
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.hub import is_remote
from flexctl.options import DATA, TRAINING, Config, argument, flag
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.change import assemble, place_of_change
from flexctl.steps.machine import machine_of
from flexctl.steps.sources import localise

if TYPE_CHECKING:
    from torch import nn


__all__ = ["TuneRouterConfig", "TuneRouterResult", "tune_router"]

_HELD_OUT_EVERY = 10
_HELD_OUT_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRouterConfig(Config):
    """What ``tune_router`` is asked to do. Rate and tether are those of experts: docs/results.md, section 6.

    Trains the router rows, and nothing else, on the public documents that each owner chose. The owners'
    rows stay in the model; merge, remove and replace go back to them. Rows that are no better on held-out
    text are not written.

    Examples:
        flexctl tune-router --proxy law.proxy.json --proxy news.proxy.json
        flexctl tune-router merged --proxy law.proxy.json --public crawl/ -o merged-tuned
    """

    merged: Annotated[
        Path | None,
        argument("MERGED", "Merged model, here or hf://OWNER/NAME; the workspace's merged model by default."),
    ] = None
    proxy: Annotated[
        tuple[Path, ...], flag("FILE", "List that select-proxy made, one for every closed expert; repeatable.", DATA)
    ]
    public: flags.Public = None
    anchor: flags.Anchor = None
    max_tokens: Annotated[
        int | None,
        flag(
            "N", "Stop after this many tokens, public ones counted (default: a pass over the lists).", TRAINING, above=0
        ),
    ] = None
    output: flags.OutputElsewhere = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    max_steps: flags.MaxSteps = None
    lr: flags.Lr = None
    seq_len: flags.SeqLen = None
    batch_tokens: flags.BatchTokens = None
    tether: flags.Tether = 1.0
    resume: flags.Resume = False
    checkpoint_steps: flags.CheckpointSteps = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    track: flags.Track = False
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRouterResult:
    """What ``tune_router`` made.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        tuned_with: Closed experts that were there.
        documents: Documents of each list.
        tokens: Trained on, those of public text counted.
        steps: Optimiser steps.
        final_loss: Mean training loss over the last steps, nats a token.
        held_out: Expert's name or ``public`` -> {"before", "after"}, nats a token on documents of its list, or public
            ones, that were not trained on.
        tokens_per_s: None when the run only finished what was there.
    """

    path: Path
    digest: str | None
    tuned_with: tuple[str, ...]
    documents: dict[str, int]
    tokens: int = 0
    steps: int = 0
    final_loss: float | None = None
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens_per_s: float | None = None
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    """Public documents by expert and ``public``: to train on, and to score before and after."""

    training: Mapping[str, Sequence[text.Framed]]
    held_out: Mapping[str, Sequence[text.Framed]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be tuned, with what, and where the result goes."""

    config: TuneRouterConfig
    merged: Merged
    base: Anchored
    proxies: Sequence[tuple[Path, Proxy]]
    target: Path

    def result(self, **figures: Any) -> TuneRouterResult:
        """Return a result with what is known before any training, and these figures."""
        documents = {proxy.name: len(proxy.documents) for _, proxy in self.proxies}
        return TuneRouterResult(path=self.target, tuned_with=self.merged.names, documents=documents, **figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """Everything a run needs, ready."""

    reader: nn.Module
    tuning: training.RouterTuning
    data: training.EqualShares
    loop: training.LoopSettings
    held_out: Mapping[str, Sequence[text.Framed]]

    def losses(self, reporter: Reporter) -> dict[str, float]:
        """Return the model's loss on every held-out part, nats a token."""
        return evaluation.held_out_losses(self.reader, self.held_out, seq_len=self.data.seq_len, reporter=reporter)


def tune_router(config: TuneRouterConfig, reporter: Reporter = SILENT) -> TuneRouterResult:
    """Train the router rows of a merged model on its proxy lists, and write the model anew.

    Training starts from the owners' own rows, also where the router was tuned before. They stay beside the tuned ones.

    Args:
        config: Which model, which lists, how long.
        reporter: Hears of progress.

    Raises:
        UsageError: A setting is wrong, an expert has no list, or the target exists and may not be replaced.
        BundleError: A bundle or a list is not valid, or they do not belong together.
        FlexctlError: The tuned rows are no better on held-out text; nothing is written.
    """
    place = workspace.find()
    source = localise(config.merged or place.merged, reporter)
    merged = open_merged(source)
    base = open_anchored(config, reporter)
    proxies = _proxies(config, merged, base.anchor)
    if config.merged is not None and is_remote(config.merged):
        target, replaces_own = config.output or place.merged, False
    else:
        target, replaces_own = place_of_change(source, config.output)
    config = replace(config, overwrite=config.overwrite or replaces_own)
    task = _Task(config=config, merged=merged, base=base, proxies=proxies, target=target)
    work_path = place_of_work(target, "tuning")
    _refuse_bad_settings(config)
    training.refuse_busy(work_path)
    log = training.log_beside(target, [config.public] if config.public else []) if config.track else None
    asked = _asked(task)
    if config.resume and (found := _finished(config, target, asked)):
        training.say_done(target, work_path, dry_run=config.dry_run, reporter=reporter)
        return found
    check_directory_target(target, kind="merged", overwrite=config.overwrite)
    model.warn_of_length(config.seq_len, base.anchor.config, reporter)
    texts = _texts(task)
    if config.dry_run:
        return task.result(digest=None, dry_run=True)
    with (
        training.working_folder(work_path, reporter) as work,
        training.tracked(log, target.name, work, resume=config.resume, reporter=reporter) as track,
    ):
        # Once more, as a run that ended in this moment may have written it.
        check_directory_target(target, kind="merged", overwrite=config.overwrite)
        return _run(task, texts, asked, work, track, reporter)


def _asked(task: _Task) -> dict[str, Any]:
    """Return what decides the result."""
    config, manifest = task.config, task.merged.manifest
    return training.asked_for(
        config,
        anchor=task.base.anchor.digest,
        experts=[entry.digest for entry in manifest.experts],
        top_k=manifest.num_experts_per_tok_requested,
        proxies=[proxy.digest for _, proxy in task.proxies],
        public=config.public and text.text_digest([config.public], config.text_field),
    )


def _finished(config: TuneRouterConfig, target: Path, asked: Mapping[str, Any]) -> TuneRouterResult | None:
    """Return the result of a run that finished before; None where there was none, or another that may be replaced."""
    run = target / "run.json"
    if not run.is_file():
        return None
    digest = open_merged(target).manifest.digest
    try:
        about = dict(training.refuse_other_request(target, run, digest, asked)["result"])
    except UsageError:
        if config.overwrite:
            return None
        raise
    about["held_out"] = training.before_after(about["held_out"])
    return TuneRouterResult(
        path=target, digest=digest, tuned_with=tuple(about["documents"]), **about, dry_run=config.dry_run
    )


def _keep(made: Merged, result: TuneRouterResult, asked: Mapping[str, Any]) -> None:
    """Write run.json into a model: what was asked for, and what came of it on any machine."""
    about = {name: getattr(result, name) for name in ("documents", "tokens", "steps", "final_loss", "held_out")}
    (made.path / "run.json").write_bytes(indented_json({"digest": made.digest, "asked": asked, "result": about}))


def _proxies(config: TuneRouterConfig, merged: Merged, anchor: Anchor) -> list[tuple[Path, Proxy]]:
    """Return the lists by expert, one for each: rows would learn to win over an expert whose text is not there."""
    if anchor.digest != merged.manifest.anchor.digest:
        raise BundleError(f"{anchor.path}: digest is {anchor.digest}; {merged.path} was made of another anchor")
    if not merged.names:
        raise UsageError(f"{merged.path}: has no closed expert, so there is nothing to tune")
    found: dict[str, tuple[Path, Proxy]] = {}
    for path in config.proxy:
        proxy = open_proxy(path)
        if proxy.anchor.digest != anchor.digest:
            raise BundleError(
                f"{path}: anchor.digest is {proxy.anchor.digest} ({proxy.anchor.name}); expected {anchor.digest}"
            )
        if proxy.name not in merged.names:
            raise BundleError(f"{path}: name is {proxy.name!r}; {merged.path} has {', '.join(merged.names)}")
        if proxy.name in found:
            raise BundleError(f"{path}: name is {proxy.name!r}, and so is that of {found[proxy.name][0]}")
        if len(proxy.documents) < 2:
            raise BundleError(f"{path}: documents: is {len(proxy.documents)}; expected at least 2, one is held out")
        found[proxy.name] = (path, proxy)
    missing = [name for name in merged.names if name not in found]
    if missing:
        raise UsageError(
            f"none for {', '.join(missing)}; every closed expert needs one",
            hint="ask the owner for one (flexctl select-proxy), or remove the expert first",
            field="proxy",
        )
    return [found[name] for name in merged.names]


def _refuse_bad_settings(config: TuneRouterConfig) -> None:
    machine_of(config)
    if config.public is not None:
        text.refuse_unreadable([config.public], config.text_field, "public")


def _texts(task: _Task) -> _Texts:
    """Return the lists' documents and public ones; what any of them holds out, none of them trains on."""
    config, base, proxies = task.config, task.base, task.proxies
    reader = routing.public_reader(base.sample, base.tokenizer, config.public, config.text_field)
    lists = routing.listed_documents(reader, proxies)
    texts = {proxy.name: documents for (_, proxy), documents in zip(proxies, lists, strict=True)}
    held_out = {name: documents[::_HELD_OUT_EVERY] for name, documents in texts.items()}
    # The experts' own training held these out, too.
    held_out[PUBLIC] = base.sample.held_out
    kept_back = {document.tokens.tobytes() for documents in held_out.values() for document in documents}
    return _Texts(
        training={
            name: [document for document in documents if document.tokens.tobytes() not in kept_back]
            for name, documents in (texts | {PUBLIC: list(base.sample.documents)}).items()
        },
        held_out={
            name: text.draw_sample(documents, _HELD_OUT_TOKENS, config.seed).documents
            for name, documents in held_out.items()
        },
    )


def _run(
    task: _Task, texts: _Texts, asked: Mapping[str, Any], work: Path, track: training.Track, reporter: Reporter
) -> TuneRouterResult:
    setup = _set_up(task, texts)
    before = setup.losses(reporter)
    track.held_out(0, before)
    outcome = _train(task, setup, work, track, reporter)
    after = setup.losses(reporter)
    track.held_out(setup.loop.steps, after)
    held_out = {name: {"before": before[name], "after": after[name]} for name in before}
    _refuse_worse(held_out, reporter)
    tuned = tuple(RawTensor(*model.to_bytes(rows)) for rows in setup.tuning.rows)
    result = task.result(
        digest=None,
        tokens=setup.loop.steps * setup.data.batch_size * setup.data.seq_len,
        steps=setup.loop.steps,
        final_loss=outcome.final_loss,
        held_out=held_out,
        tokens_per_s=outcome.tokens_per_s,
    )
    digest, written = assemble(
        task.target,
        replace(compose_merged(task.merged), tuned=tuned),
        overwrite=task.config.overwrite,
        trust_cache=False,
        dry_run=False,
        reporter=reporter,
        ready=lambda made: _keep(made, result, asked),
    )
    return replace(result, digest=digest, bytes_written=written, peak_rss_bytes=peak_rss_bytes())


def _set_up(task: _Task, texts: _Texts) -> _Setup:
    config, merged = task.config, task.merged
    machine = machine_of(config, merged.weights().shared)
    streams = {
        name: text.PublicSample(documents).stream() if documents else text.TokenStream.empty()
        for name, documents in texts.training.items()
    }
    budget = _budget(task, streams)
    data = training.EqualShares(streams, seq_len=budget.seq_len, batch_size=budget.batch_size, seed=config.seed)
    most = max(1, round(budget.own_tokens / (data.batch_size * data.seq_len)))
    steps = min(most, config.max_steps or most)
    reader = machine.build(replace(merged.weights(), router=tuple(span.read() for span in merged.untuned_router())))
    return _Setup(
        reader=reader,
        tuning=training.RouterTuning(reader, task.base.space, tether=config.tether),
        data=data,
        loop=training.LoopSettings(
            steps=steps,
            lr=budget.lr,
            warmup_steps=training.warmup_steps(steps, None),
            micro_batch=budget.micro_batch,
            autocast=machine.autocast,
        ),
        held_out=texts.held_out,
    )


def _budget(task: _Task, streams: Mapping[str, text.TokenStream]) -> training.Budget:
    """Return how long to train by default: once through the lists, and as much public text as one of them has."""
    config, anchor = task.config, task.base.anchor
    listed = sum(len(stream) for name, stream in streams.items() if name != PUBLIC)
    return training.resolve_budget(
        available_tokens=round(listed * len(streams) / (len(streams) - 1)),
        epochs=1.0,
        max_tokens=config.max_tokens,
        public_mix=0.0,
        seq_len=config.seq_len,
        batch_tokens=config.batch_tokens,
        micro_batch=None,
        lr=config.lr,
        hidden_size=anchor.manifest.architecture.hidden_size,
        max_position_embeddings=anchor.config.get("max_position_embeddings"),
    )


def _train(task: _Task, setup: _Setup, work: Path, track: training.Track, reporter: Reporter) -> training.Outcome:
    config, manifest = task.config, task.merged.manifest
    identity: dict[str, Any] = {
        "experts": [entry.digest for entry in manifest.experts],
        "top_k": manifest.num_experts_per_tok_requested,
        "proxies": [proxy.digest for _, proxy in task.proxies],
        "lr": setup.loop.lr,
        "steps": setup.loop.steps,
        "seq_len": setup.data.seq_len,
        "batch_size": setup.data.batch_size,
        "tether": config.tether,
        "seed": config.seed,
        "dtype": setup.loop.dtype,
    }
    checkpoints = training.Checkpoints(
        work / "checkpoints",
        identity,
        every_steps=config.checkpoint_steps,
        resume=config.resume,
        reporter=reporter,
    )
    return training.train(
        setup.reader,
        setup.tuning.groups(),
        setup.data,
        setup.loop,
        reporter=reporter,
        penalty=setup.tuning.penalty if config.tether else None,
        checkpoints=checkpoints,
        track=track,
    )


def _refuse_worse(held_out: Mapping[str, Mapping[str, float]], reporter: Reporter) -> None:
    """Refuse rows that are no better on held-out text, every part weighing the same; warn where one part lost."""
    gains = {name: losses["before"] - losses["after"] for name, losses in held_out.items()}
    gain = sum(gains.values()) / len(gains)
    if not gain > 0:
        raise FlexctlError(
            f"the tuned router is no better on held-out text ({-gain:+.4f} nats a token); nothing was written",
            hint="give more documents, a smaller `lr`, or stay with the owners' rows",
        )
    for name, lost in gains.items():
        if lost < 0:
            reporter.warn(f"{name}: held-out loss went up by {-lost:.4f} nats a token")
