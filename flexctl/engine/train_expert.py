"""Train one expert against the anchor, at home, and write it as one file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, text, training, workspace
from flexctl.bundle import PUBLIC, Anchor, DataInfo, Expert, RawTensor, RouterInfo, open_expert, write_expert
from flexctl.bundle.checks import prove
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.lowrank import refuse_useless_rank
from flexctl.bundle.manifest import PrivacyInfo
from flexctl.bundle.names import name_an_expert
from flexctl.bundle.store import check_file_target
from flexctl.errors import FlexctlError, UsageError
from flexctl.options import DATA, HARDWARE, PRIVACY, TRAINING, Config, flag, switch
from flexctl.runtime import SILENT, Reporter, note_busy_cores, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.guarantee import Plan, planned
from flexctl.steps.machine import machine_of
from flexctl.steps.outlook import TrainingPlan, plan_training, refuse_what_cannot_fit
from flexctl.steps.private_run import PrivateRun
from flexctl.steps.router_rows import given_rows, measured_rows, names_a_file
from flexctl.steps.terms import data_info, warn_of_expired

if TYPE_CHECKING:
    from torch import Tensor, nn

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
        flag("N", "Sequences in memory at once (default: what fills about 8192 tokens).", HARDWARE, above=0),
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
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False
    plan: TrainingPlan | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be made: the settings, the anchor, the expert's name and its file, and its guarantee if it has one."""

    config: TrainExpertConfig
    base: Anchored
    name: str
    target: Path
    plan: Plan | None

    def result(self, **figures: Any) -> TrainExpertResult:
        """Return a result with what is known before any training, and these figures."""
        return TrainExpertResult(path=self.target, name=self.name, anchor_digest=self.base.anchor.digest, **figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """Everything a run needs, ready."""

    reader: nn.Module
    corpus: text.Corpus
    public: text.PublicSample
    data: training.Mixture
    loop: training.LoopSettings
    rows: Tensor
    router: RouterInfo

    @property
    def own_tokens(self) -> int:
        """Tokens of the owner's that the run trains on."""
        return self.data.own_tokens(self.loop.steps)

    def losses(self, reporter: Reporter) -> dict[str, float]:
        """Return the model's loss on documents kept out of training, the owner's and public ones, nats a token."""
        most = training.held_out_tokens(self.own_tokens)
        parts = {"own": self.corpus.held_out, "public": self.public.held_out}
        held_out = {name: text.leading(documents, most) for name, documents in parts.items() if documents is not None}
        return evaluation.held_out_losses(self.reader, held_out, seq_len=self.data.seq_len, reporter=reporter)


def train_expert(config: TrainExpertConfig, reporter: Reporter = SILENT) -> TrainExpertResult:
    """Train an expert against the anchor and write its file.

    Args:
        config: What to train on and how.
        reporter: Hears of progress.

    Returns:
        What was made and what was gained.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The anchor or the router file is not valid, or they do not belong together.
        FlexctlError: Training failed.
    """
    place = workspace.find()
    name = name_an_expert(config.name, text.source_name(config.data[0]))
    target = config.output or place.experts / f"{name}.st"
    if config.plan:
        return _planned(config, name, target)
    base = open_anchored(config, reporter)
    work_path = target.parent / f".{target.stem}.work"
    ends = config.resume and not config.overwrite and target.is_file()
    _refuse_bad_settings(config, base.anchor, target, exists=ends)
    training.refuse_busy(work_path)
    log = training.log_beside(target, _texts(config)) if config.track else None
    plan = planned(config, base.anchor)
    canaries, made = text.CanaryFolder.beside(target), text.CanaryFolder(work_path / "canaries")
    in_place = ends and not made.left_out.is_file()
    planted = [(canaries if in_place else made).planted] if config.canaries else []
    data = (*text.pinned(config.data), *planted)
    task = _Task(config=replace(config, data=data), base=base, name=name, target=target, plan=plan)
    if ends:
        return _finished(task, work_path, made, reporter)
    model.warn_of_length(config.seq_len, base.anchor.config, reporter)
    warn_of_expired(config, reporter)
    if plan is not None:
        reporter.note(str(plan))
    if config.dry_run:
        return task.result(digest=None, tokens=0, public_tokens=0, steps=0, rank=config.rank, dry_run=True)
    with (
        training.working_folder(work_path, reporter) as work,
        training.tracked(log, name, work, resume=config.resume, reporter=reporter) as track,
    ):
        # Once more, as a run that ended in this moment may have written it.
        check_file_target(target, overwrite=config.overwrite)
        if config.canaries:
            text.plant_canaries(made, config.canaries, config.text_field, keep=config.resume)
        if plan is None:
            result = _run(task, work, track, reporter)
        else:
            result = _run_privately(task, plan, work, track, reporter)
        text.hand_over(made, canaries)
        return result


def _texts(config: TrainExpertConfig) -> list[Path]:
    return [*config.data, *([config.public] if config.public else [])]


def _refuse_bad_settings(config: TrainExpertConfig, anchor: Anchor, target: Path, *, exists: bool) -> None:
    if config.plan_tflops is not None:
        raise UsageError("is for `plan` alone", hint="leave it out", field="plan_tflops")
    check_file_target(target, overwrite=config.overwrite or exists)
    refuse_useless_rank(config.rank, anchor.manifest.architecture)
    machine = machine_of(config, anchor.weights().shared)
    if not exists:  # a finished run needs no memory to give its result
        refuse_what_cannot_fit(config, anchor.manifest.moe_config, machine)
    given_rows(config, anchor)
    if config.public is not None:
        text.text_files([config.public], "public")


def _planned(config: TrainExpertConfig, name: str, target: Path) -> TrainExpertResult:
    plan = plan_training(config)
    nothing: dict[str, Any] = {"digest": None, "anchor_digest": None, "tokens": 0, "public_tokens": 0, "steps": 0}
    return TrainExpertResult(path=target, name=name, rank=config.rank, plan=plan, dry_run=True, **nothing)


def _finished(task: _Task, work_path: Path, made: text.CanaryFolder, reporter: Reporter) -> TrainExpertResult:
    """Return the result of a run that finished before, and clear up what it left."""
    config, target = task.config, task.target
    expert = open_expert(target)
    asked = _asked(task, text.text_digest(config.data, config.text_field, config.seed) if task.plan is None else None)
    training.refuse_other_request(target, target.with_suffix(".run.json"), expert.digest, asked)
    prove(expert, reporter)
    if not config.dry_run:
        text.hand_over(made, text.CanaryFolder.beside(target))
    training.say_done(target, work_path, dry_run=config.dry_run, reporter=reporter)
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
        bytes_written=target.stat().st_size,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
    )


def _asked(task: _Task, digest: str | None) -> dict[str, Any]:
    """Return what decides the result; ``digest`` is that of the owner's text, None where a guarantee keeps it."""
    config = task.config
    return training.asked_for(
        config,
        name=task.name,
        anchor=task.base.anchor.digest,
        text=digest,
        public=config.public and text.text_digest([config.public], config.text_field, config.seed),
        router=hash_file(Path(config.router)) if names_a_file(config.router) else config.router,
    )


def _run(task: _Task, work: Path, track: training.Track, reporter: Reporter) -> TrainExpertResult:
    config, setup = task.config, _set_up(task, work, reporter)
    asked = _asked(task, setup.corpus.survey.digest)
    before = setup.losses(reporter)
    track.held_out(0, before)
    tensors, outcome = _train(task, setup, work, track, reporter)
    after = setup.losses(reporter)
    track.held_out(setup.loop.steps, after)
    _refuse_moved(setup.reader, task.base.anchor)
    result = task.result(
        digest=None,
        tokens=setup.own_tokens,
        public_tokens=setup.data.public_before(setup.loop.steps) * setup.data.seq_len,
        steps=setup.loop.steps,
        final_loss=outcome.final_loss,
        held_out={part: {"before": before[part], "after": after[part]} for part in before},
        tokens_per_s=outcome.tokens_per_s,
        frozen_verified=True,
        bias=list(setup.router.bias),
        rank=config.rank,
    )
    survey = setup.corpus.survey
    expert = _write(
        task,
        {**tensors, "router.weight": setup.rows},
        data_info(config, documents=survey.documents, tokens=len(setup.corpus.stream), num_bytes=survey.num_bytes),
        result,
        asked,
        settings=_identity(config, setup),
        router=setup.router,
        run={
            "tokens_per_s": result.tokens_per_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "duplicates": survey.duplicates,
        },
    )
    size = task.target.stat().st_size
    return replace(result, digest=expert.digest, bytes_written=size, peak_rss_bytes=peak_rss_bytes())


def _run_privately(task: _Task, plan: Plan, work: Path, track: training.Track, reporter: Reporter) -> TrainExpertResult:
    config, base = task.config, task.base
    note_busy_cores(config.threads, reporter)
    public = _public_sample(config, base)
    machine = machine_of(config, base.anchor.weights().shared)
    run = PrivateRun(config, plan, base, public, machine, work, track, reporter)
    released = run.train()
    _refuse_moved(run.reader, base.anchor)
    result = task.result(
        digest=None,
        tokens=None,
        public_tokens=run.public_tokens,
        steps=plan.mechanism.steps,
        held_out=released.held_out,
        frozen_verified=True,
        privacy=released.privacy,
        bias=list(released.router.bias),
        rank=config.rank,
    )
    told = data_info(config, documents=None, tokens=None, num_bytes=None)
    expert = _write(
        task,
        released.tensors,
        told,
        result,
        _asked(task, None),
        settings=released.settings,
        router=released.router,
        run={},
    )
    return replace(result, digest=expert.digest, bytes_written=task.target.stat().st_size)


def _set_up(task: _Task, work: Path, reporter: Reporter) -> _Setup:
    config, base = task.config, task.base
    machine = machine_of(config, base.anchor.weights().shared)
    note_busy_cores(config.threads, reporter)
    corpus = text.prepare_corpus(
        config.data, base.tokenizer, work, text_field=config.text_field, seed=config.seed, reporter=reporter
    )
    public = _public_sample(config, base)
    budget = _budget(config, base.anchor, corpus)
    data = training.Mixture(
        corpus.stream,
        text.PublicSample(public.to_train_on).stream() if public.to_train_on else None,
        seq_len=budget.seq_len,
        batch_size=budget.batch_size,
        public_share=config.public_mix,
        seed=config.seed,
    )
    most = data.steps_for(budget.own_tokens)
    steps = min(most, config.max_steps or most)
    reader = machine.build(base.anchor.weights())
    reporter.note(f"router rows: {config.router}")
    passages = training.passages(data.own_tokens(steps))
    rows, router = _start_rows(task, reader, corpus, public, passages, reporter)
    return _Setup(
        reader=reader,
        corpus=corpus,
        public=public,
        data=data,
        loop=training.LoopSettings(
            steps=steps,
            lr=budget.lr,
            warmup_steps=training.warmup_steps(steps, config.warmup_steps),
            micro_batch=budget.micro_batch,
            autocast=machine.autocast,
        ),
        rows=rows,
        router=router,
    )


def _public_sample(config: TrainExpertConfig, base: Anchored) -> text.PublicSample:
    if config.public is None:
        return base.sample
    documents = text.frame_documents(base.tokenizer, text.read_documents([config.public], config.text_field))
    return text.draw_sample(documents, base.anchor.public_sample()["tokens"].shape[0], config.seed)


def _budget(config: TrainExpertConfig, anchor: Anchor, corpus: text.Corpus) -> training.Budget:
    return training.resolve_budget(
        available_tokens=len(corpus.stream),
        epochs=config.epochs or 1.0,
        max_tokens=config.max_tokens,
        public_mix=config.public_mix,
        seq_len=config.seq_len,
        batch_tokens=config.batch_tokens,
        micro_batch=config.micro_batch,
        lr=config.lr,
        hidden_size=anchor.manifest.architecture.hidden_size,
        max_position_embeddings=anchor.config.get("max_position_embeddings"),
    )


def _start_rows(
    task: _Task, reader: nn.Module, corpus: text.Corpus, public: text.PublicSample, passages: int, reporter: Reporter
) -> tuple[Tensor, RouterInfo]:
    config, base = task.config, task.base
    if (given := given_rows(config, base.anchor)) is not None:
        return model.to_torch(given.rows), given.info
    own = text.sample_passages(corpus.documents(), passages, config.seed)
    rows, info = measured_rows(
        config,
        base,
        reader,
        own,
        lambda: text.sample_passages(public.texts(base.tokenizer), passages, config.seed),
        reporter,
    )
    return rows.rows, info


def _train(
    task: _Task, setup: _Setup, work: Path, track: training.Track, reporter: Reporter
) -> tuple[dict[str, Tensor], training.Outcome]:
    """Train the pair; return the expert's tensors, rounded as they are stored, and what the run did."""
    config, anchor = task.config, task.base.anchor
    identity = {
        **_identity(config, setup),
        "anchor": anchor.digest,
        "data": setup.corpus.survey.digest,
        "public": setup.public.digest,
        "rows": [float(row) for row in setup.rows.sum(dim=1)],
        "rank": config.rank,
        "special_as_text": config.special_as_text,
    }
    checkpoints = training.Checkpoints(
        work / "checkpoints",
        identity,
        every_steps=config.checkpoint_steps,
        resume=config.resume,
        reporter=reporter,
    )
    match = config.public_match if config.public_mix else 0.0
    pair = training.Pair(setup.reader, setup.rows, public_match=match, rank=config.rank, seed=config.seed)
    if config.recompute:
        model.recompute_layers(setup.reader)
    outcome = training.train(
        setup.reader,
        pair.groups(),
        setup.data,
        setup.loop,
        reporter=reporter,
        match=pair.match if match else None,
        checkpoints=checkpoints,
        track=track,
    )
    pair.close()
    public = anchor.weights().experts[PUBLIC]
    return pair.round_weights(anchor.manifest.architecture.dtype, public), outcome


def _identity(config: TrainExpertConfig, setup: _Setup) -> dict[str, Any]:
    """Return every resolved setting that decides the result."""
    return {
        "lr": setup.loop.lr,
        "steps": setup.loop.steps,
        "warmup_steps": setup.loop.warmup_steps,
        "seq_len": setup.data.seq_len,
        "batch_size": setup.data.batch_size,
        "micro_batch": setup.loop.micro_batch,
        "public_mix": config.public_mix,
        "public_match": config.public_match,
        "seed": config.seed,
        "dtype": setup.loop.dtype,
    }


def _refuse_moved(reader: nn.Module, anchor: Anchor) -> None:
    if moved := model.moved_tensors(reader, anchor.weights()):
        raise FlexctlError(f"{len(moved)} frozen tensors moved in training, {moved[0]} first; nothing was written")


def _write(
    task: _Task,
    tensors: Mapping[str, Tensor],
    data: DataInfo,
    result: TrainExpertResult,
    asked: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    router: RouterInfo,
    run: Mapping[str, Any],
) -> Expert:
    return write_expert(
        task.target,
        anchor=task.base.anchor,
        name=task.name,
        tensors={key: RawTensor(*model.to_bytes(tensor)) for key, tensor in tensors.items()},
        data=data,
        training={
            **settings,
            "steps": result.steps,
            "tokens": result.tokens,
            "public_tokens": result.public_tokens,
            "losses": {"final": result.final_loss, "held_out": result.held_out},
            "frozen_verified": True,
            **({"special_as_text": True} if task.config.special_as_text else {}),
        },
        router=router,
        run=run,
        privacy=result.privacy,
        asked=asked,
        overwrite=task.config.overwrite,
        rank=task.config.rank,
    )
