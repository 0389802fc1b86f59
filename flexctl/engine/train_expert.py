"""Train one expert against the anchor, at home, and write it as one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from flexctl import flags, model, text, training, workspace
from flexctl.bundle import Anchor, RawTensor, open_expert, write_expert
from flexctl.bundle.checks import prove
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.lowrank import refuse_useless_rank
from flexctl.bundle.manifest import PrivacyInfo
from flexctl.bundle.names import name_an_expert
from flexctl.bundle.store import check_file_target
from flexctl.errors import UsageError
from flexctl.options import DATA, HARDWARE, PRIVACY, TRAINING, Config, flag, switch
from flexctl.processes import Joined, World, refuse_many
from flexctl.runtime import SILENT, Reporter, note_busy_cores, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.expert_run import Inputs, Trained, public_sample
from flexctl.steps.guarantee import Plan, planned
from flexctl.steps.machine import machine_of
from flexctl.steps.open_run import train_openly
from flexctl.steps.outlook import TrainingPlan, plan_training, refuse_what_cannot_fit
from flexctl.steps.private_run import PrivateRun
from flexctl.steps.router_rows import given_rows, names_a_file
from flexctl.steps.terms import data_info, warn_of_expired

__all__ = ["TrainExpertConfig", "TrainExpertResult", "train_expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExpertConfig(Config):
    """What ``train_expert`` is asked to do. Defaults were chosen by measurement: docs/results.md.

    Trains against the frozen anchor and writes one file, experts/NAME.st: what you share. Router rows
    are measured on your text and only feed-forward weights train; everything else is checked afterwards
    to be the anchor's, bit for bit.

    Examples:
        flexctl train-expert --data law/
        flexctl train-expert --data law.jsonl --name law --max-tokens 2000000 --license CC-BY-4.0
        flexctl train-expert --data law/ --rank 16 --plan
    """

    data: flags.Data
    name: flags.Name = None
    anchor: flags.Anchor = None
    max_tokens: Annotated[
        int | None, flag("N", "Stop after this many tokens of `data`, to the nearest step.", TRAINING, above=0)
    ] = None
    output: Annotated[
        Path | None, flags.output("FILE.st", "File to write (default: NAME.st among the workspace's experts).")
    ] = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    decontaminate: flags.Decontaminate = ()
    near_duplicates: flags.NearDuplicates = False
    token_cache: Annotated[
        Path | None, flag("DIR", "Keep the tokens of `data` here, for other runs on the same text.", DATA)
    ] = None
    public_mix: Annotated[
        float, flag("SHARE", "Share of public text in each step, from 0 to below 1.", DATA, at_least=0, below=1)
    ] = 0.3
    public: flags.Public = None
    canaries: Annotated[
        int | None,
        flag("N", "Plant about half of so many made-up documents, for audit; NAME.canaries has them.", DATA, above=1),
    ] = None
    rank: Annotated[
        int | None,
        flag("R", "Train low-rank differences to the public expert: a smaller file, less memory.", TRAINING, above=0),
    ] = None
    max_steps: flags.MaxSteps = None
    epochs: Annotated[
        float | None, flag("N", "Passes over `data` (default: 1, and 20 with `dp_epsilon`).", TRAINING, above=0)
    ] = None
    lr: flags.Lr = None
    warmup_steps: Annotated[
        int | None,
        flag("N", "Steps until the peak learning rate (default: a twentieth of them).", TRAINING, at_least=0),
    ] = None
    seq_len: flags.SeqLen = None
    batch_tokens: flags.BatchTokens = None
    micro_batch: Annotated[
        int | None,
        flag(
            "N",
            "Sequences at once, of all processes together (default: what fills about 8192 tokens).",
            HARDWARE,
            above=0,
        ),
    ] = None
    recompute: Annotated[
        bool,
        switch("Compute layers' inner values again on the way back: less memory, more time, the same file.", HARDWARE),
    ] = False
    plan: Annotated[
        bool,
        switch("Tell memory and time on 1 to 8 devices, from the anchor's config.json alone; do nothing.", HARDWARE),
    ] = False
    plan_tflops: Annotated[
        float | None,
        flag(
            "X",
            "Rate of a device for `plan`, in 10^12 operations a second (default: measured here).",
            HARDWARE,
            above=0,
        ),
    ] = None
    public_match: Annotated[
        float,
        flag("X", "How strongly the expert is held to the public one on public text.", TRAINING, at_least=0),
    ] = 1.0
    dp_epsilon: Annotated[
        float | None,
        flag("E", "Train with differential privacy: what a document may change is bounded by this.", PRIVACY, above=0),
    ] = None
    dp_delta: Annotated[
        float | None, flag("D", "How likely the bound may fail; below 1 / `dp_documents`.", PRIVACY, above=0, below=1)
    ] = None
    dp_documents: Annotated[
        int | None, flag("N", "About how many documents there are, as anybody may know.", PRIVACY, above=0)
    ] = None
    dp_max_grad_norm: Annotated[
        float | None,
        flag("C", "Clip of a document's gradient (default: measured on public text).", PRIVACY, above=0),
    ] = None
    dp_noise_multiplier: Annotated[
        float | None,
        flag("S", "Noise of a step, in clips (default: the least that keeps `dp_epsilon`).", PRIVACY, above=0),
    ] = None
    dp_row_epsilon: Annotated[
        float | None,
        flag("E", "Epsilon of router rows by themselves (default: a quarter of `dp_epsilon`).", PRIVACY, above=0),
    ] = None
    router: flags.Router = "discriminant"
    encoder: flags.Encoder = None
    own_covariance: flags.OwnCovariance = flags.OWN_COVARIANCE
    resume: flags.Resume = False
    checkpoint_steps: flags.CheckpointSteps = None
    license: flags.License = None
    purpose: flags.Purpose = ()
    expires: flags.Expires = None
    label: flags.Label = None
    contact: flags.Contact = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    track: flags.Track = False
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExpertResult:
    """What ``train_expert`` made.

    Attributes:
        tokens: The owner's tokens trained on; ``public_tokens`` came on top. None under a guarantee, as all figures
            of the owner's text are.
        final_loss: Mean training loss over the last steps, nats a token.
        held_out: ``{"own" and "public": {"before", "after"}}``, nats a token on text that was not trained on, of the
            anchor and of the finished pair after rounding. None where nothing was held out.
        privacy: The guarantee, where there is one.
        tokens_per_s: Own and public tokens a second; None when the run only finished what was there.
        frozen_verified: Every frozen tensor equals the anchor's, bit for bit.
        bias: The router bias of each layer.
        duplicates: Documents whose text had come before; None under a guarantee, as are the next two.
        near_duplicates: Others that are nearly the same as one before; None where nobody asked.
        contaminated: Documents left out as they share words with ``decontaminate``; None where there is none.
        rank: Of a low-rank expert; None of a full one.
        bytes_written: Size of the expert's file.
        peak_rss_bytes: Most memory that was in use; 0 under a guarantee, as it depends on the owner's text.
        plan: What it would take, where only that was asked for; the anchor's digest is then not known.
    """

    path: Path
    digest: str | None
    name: str
    anchor_digest: str | None
    tokens: int | None
    public_tokens: int
    steps: int
    final_loss: float | None = None
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens_per_s: float | None = None
    frozen_verified: bool | None = None
    privacy: PrivacyInfo | None = None
    bias: list[float] = field(default_factory=list)
    rank: int | None = None
    duplicates: int | None = None
    near_duplicates: int | None = None
    contaminated: int | None = None
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False
    plan: TrainingPlan | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be made: settings, anchor, name and file, its guarantee, and what it must not be trained on.

    Attributes:
        work: The working folder.
        world: The processes that make it.
    """

    config: TrainExpertConfig
    base: Anchored
    name: str
    target: Path
    work: Path
    plan: Plan | None
    decontamination: text.Decontamination
    world: World

    @property
    def canaries(self) -> tuple[text.CanaryFolder, text.CanaryFolder]:
        """Where canaries are made, and where they go when the expert is written."""
        return text.CanaryFolder(self.work / "canaries"), text.CanaryFolder.beside(self.target)

    def result(self, **figures: Any) -> TrainExpertResult:
        """Return a result with what is known before any training, and these figures."""
        return TrainExpertResult(path=self.target, name=self.name, anchor_digest=self.base.anchor.digest, **figures)


def train_expert(config: TrainExpertConfig, reporter: Reporter = SILENT) -> TrainExpertResult:
    """Train an expert against the anchor and write its file.

    Args:
        config: What to train on and how.
        reporter: Hears of progress.

    Returns:
        What was made and what was gained; in every process that torchrun started, of which one writes.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The anchor or the router file is not valid, or they do not belong together.
        FlexctlError: Training failed.
    """
    with Joined(config.device) as world:
        return _train_expert(config, world, reporter)


def _train_expert(config: TrainExpertConfig, world: World, reporter: Reporter) -> TrainExpertResult:
    place = workspace.find()
    name = name_an_expert(config.name, text.source_name(config.data[0]))
    target = config.output or place.experts / f"{name}.st"
    if config.plan:
        return _planned(config, name, target, reporter)
    base = open_anchored(config, reporter)
    work_path = target.parent / f".{target.stem}.work"
    ends = config.resume and not config.overwrite and target.is_file()
    _refuse_bad_settings(config, base.anchor, target, exists=ends)
    if world.is_writer:
        training.refuse_busy(work_path)
    log = training.log_beside(target, _texts(config)) if config.track else None
    plan = planned(config, base.anchor)
    task = _Task(
        config=replace(config, data=(*text.pinned(config.data), *_planted(config, target, work_path, ends=ends))),
        base=base,
        name=name,
        target=target,
        work=work_path,
        plan=plan,
        decontamination=text.Decontamination.read(config.decontaminate, config.text_field),
        world=world,
    )
    if ends:
        return world.by_writer(lambda: _finished(task, reporter))
    model.warn_of_length(config.seq_len, base.anchor.config, reporter)
    warn_of_expired(config, reporter)
    if plan is not None:
        reporter.note(str(plan))
    if config.dry_run:
        return task.result(digest=None, tokens=0, public_tokens=0, steps=0, rank=config.rank, dry_run=True)
    with (
        training.working_folder(work_path, reporter, world) as work,
        training.tracked(log, name, work, resume=config.resume, reporter=reporter, world=world) as track,
    ):
        # Once more, as a run that ended in this moment may have written it.
        check_file_target(target, overwrite=config.overwrite)
        return _made(task, track, reporter)


def _texts(config: TrainExpertConfig) -> list[Path]:
    return [*config.data, *([config.public] if config.public else [])]


def _planted(config: TrainExpertConfig, target: Path, work: Path, *, ends: bool) -> list[Path]:
    """Return the file of canaries to train on, if there is to be one: at its final place where a run has finished."""
    made = text.CanaryFolder(work / "canaries")
    in_place = ends and not made.left_out.is_file()
    return [(text.CanaryFolder.beside(target) if in_place else made).planted] if config.canaries else []


def _refuse_bad_settings(config: TrainExpertConfig, anchor: Anchor, target: Path, *, exists: bool) -> None:
    if config.plan_tflops is not None:
        raise UsageError("is for `plan` alone", hint="leave it out", field="plan_tflops")
    check_file_target(target, overwrite=config.overwrite or exists)
    text.refuse_among(target, _texts(config), "output")
    refuse_useless_rank(config.rank, anchor.manifest.architecture)
    if config.dp_epsilon is not None:
        refuse_many("training under a guarantee (`dp_epsilon`)")
    machine = machine_of(config, anchor.weights().shared)
    if not exists:  # a finished run needs no memory to give its result
        refuse_what_cannot_fit(config, anchor.manifest.moe_config, machine)
    given_rows(config, anchor)
    text.refuse_unreadable(config.data, config.text_field)
    if config.public is not None:
        text.refuse_unreadable([config.public], config.text_field, "public")
    if config.near_duplicates:
        text.require_datasketch()
    if config.token_cache is not None:
        _refuse_bad_cache(config.token_cache, config.data)


def _refuse_bad_cache(folder: Path, data: Sequence[Path]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: is no folder", field="token_cache")
    text.refuse_among(folder, data, "token_cache")


def _planned(config: TrainExpertConfig, name: str, target: Path, reporter: Reporter) -> TrainExpertResult:
    plan = plan_training(config)
    if plan.way_out is not None:
        reporter.note(f"one device is too small: {plan.way_out}")
    nothing: dict[str, Any] = {"digest": None, "anchor_digest": None, "tokens": 0, "public_tokens": 0, "steps": 0}
    return TrainExpertResult(path=target, name=name, rank=config.rank, plan=plan, dry_run=True, **nothing)


def _finished(task: _Task, reporter: Reporter) -> TrainExpertResult:
    """Return the result of a run that finished before, and clear up what it left."""
    config, target = task.config, task.target
    expert = open_expert(target)
    digest = text.text_digest(config.data, config.text_field) if task.plan is None else None
    asked = {**_asked(task), "text": digest}
    run = training.refuse_other_request(target, target.with_suffix(".run.json"), expert.digest, asked)
    prove(expert, reporter)
    if not config.dry_run:
        text.hand_over(*task.canaries)
    training.say_done(target, task.work, dry_run=config.dry_run, reporter=reporter)
    about = expert.manifest.training
    return task.result(
        digest=expert.digest,
        tokens=about["tokens"],
        public_tokens=about["public_tokens"],
        steps=about["steps"],
        final_loss=about["losses"]["final"],
        held_out=training.before_after(about["losses"]["held_out"]),
        frozen_verified=about["frozen_verified"],
        privacy=expert.manifest.privacy,
        bias=list(expert.manifest.router.bias),
        rank=expert.manifest.rank,
        **{name: run.get(name) for name in text.COUNTS},
        bytes_written=target.stat().st_size,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
    )


def _asked(task: _Task) -> dict[str, Any]:
    """Return what decides the result, beside the digest of the owner's text; a guarantee keeps that."""
    config = task.config
    return training.asked_for(
        config,
        name=task.name,
        anchor=task.base.anchor.digest,
        text=None,
        public=config.public and text.text_digest([config.public], config.text_field),
        decontaminate=task.decontamination.digest,
        router=hash_file(Path(config.router)) if names_a_file(config.router) else config.router,
    )


def _made(task: _Task, track: training.Track, reporter: Reporter) -> TrainExpertResult:
    config, world = task.config, task.world
    made, canaries = task.canaries
    if config.canaries:
        count = config.canaries
        world.by_writer(lambda: text.plant_canaries(made, count, config.text_field, keep=config.resume))
    asked = _asked(task)
    trained = _trained(task, track, reporter)
    result = world.by_writer(lambda: _written(task, trained, {**asked, "text": trained.told.digest}))
    world.by_writer(lambda: text.hand_over(made, canaries))
    return result


def _trained(task: _Task, track: training.Track, reporter: Reporter) -> Trained:
    config, base = task.config, task.base
    machine = machine_of(config, base.anchor.weights().shared)
    note_busy_cores(config.threads, reporter)
    given = Inputs(
        base=base,
        public=public_sample(config, base, task.decontamination, reporter),
        decontamination=task.decontamination,
        machine=machine,
        work=task.work,
        track=track,
        reporter=reporter,
        world=task.world,
    )
    return train_openly(config, given) if task.plan is None else PrivateRun(config, task.plan, given).train()


def _written(task: _Task, trained: Trained, asked: Mapping[str, Any]) -> TrainExpertResult:
    """Write the expert; nothing that depends on the owner's text is told of a run under a guarantee."""
    config, told = task.config, trained.told
    is_open = trained.privacy is None
    expert = write_expert(
        task.target,
        anchor=task.base.anchor,
        name=task.name,
        tensors={key: RawTensor(*model.to_bytes(tensor)) for key, tensor in trained.tensors.items()},
        data=data_info(config, documents=told.documents, tokens=told.num_tokens, num_bytes=told.num_bytes),
        training={
            **trained.settings,
            "steps": trained.steps,
            "tokens": told.tokens,
            "public_tokens": trained.public_tokens,
            "losses": {"final": told.final_loss, "held_out": trained.held_out},
            "frozen_verified": True,
            **({"special_as_text": True} if config.special_as_text else {}),
        },
        router=trained.router,
        run={
            "tokens_per_s": told.tokens_per_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "kernels": trained.kernels,
            **told.counts,
        }
        if is_open
        else {},
        privacy=trained.privacy,
        asked=asked,
        overwrite=config.overwrite,
        rank=config.rank,
    )
    return task.result(
        digest=expert.digest,
        tokens=told.tokens,
        public_tokens=trained.public_tokens,
        steps=trained.steps,
        final_loss=told.final_loss,
        held_out=trained.held_out,
        tokens_per_s=told.tokens_per_s,
        frozen_verified=True,
        privacy=trained.privacy,
        bias=list(trained.router.bias),
        rank=config.rank,
        **told.counts,
        bytes_written=task.target.stat().st_size,
        peak_rss_bytes=peak_rss_bytes() if is_open else 0,
    )
