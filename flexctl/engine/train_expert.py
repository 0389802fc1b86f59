"""Train one expert against the anchor, at home, and write it as one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, text, training, workspace
from flexctl.bundle import PUBLIC, Anchor, DataInfo, RawTensor, RouterInfo, open_expert, write_expert
from flexctl.bundle.checks import prove
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.lowrank import refuse_useless_rank
from flexctl.bundle.manifest import PrivacyInfo
from flexctl.bundle.names import name_an_expert
from flexctl.bundle.store import check_file_target
from flexctl.errors import FlexctlError, UsageError
from flexctl.options import DATA, HARDWARE, PRIVACY, TRAINING, Config, flag, switch
from flexctl.processes import Joined, World, refuse_many
from flexctl.runtime import SILENT, Reporter, note_busy_cores, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.guarantee import Plan, planned
from flexctl.steps.machine import Machine, machine_of
from flexctl.steps.outlook import TrainingPlan, plan_training, refuse_what_cannot_fit
from flexctl.steps.private_run import PrivateRun
from flexctl.steps.router_rows import given_rows, measured_rows, names_a_file
from flexctl.steps.terms import data_info, warn_of_expired

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["TrainExpertConfig", "TrainExpertResult", "train_expert"]

_COUNTS = ("duplicates", "near_duplicates", "contaminated")


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
        world: The processes that make it.
    """

    config: TrainExpertConfig
    base: Anchored
    name: str
    target: Path
    plan: Plan | None
    decontamination: text.Decontamination
    world: World

    def result(self, **figures: Any) -> TrainExpertResult:
        """Return a result with what is known before any training, and these figures."""
        return TrainExpertResult(path=self.target, name=self.name, anchor_digest=self.base.anchor.digest, **figures)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """Everything a run needs, ready."""

    machine: Machine
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

    def losses(self, reader: nn.Module, world: World, reporter: Reporter) -> dict[str, float]:
        """Return a model's loss on documents kept out of training, the owner's and public ones, nats a token."""
        most = training.held_out_tokens(self.own_tokens)
        parts = {"own": self.corpus.held_out, "public": self.public.held_out}
        held_out = {name: text.leading(documents, most) for name, documents in parts.items() if documents is not None}
        return evaluation.held_out_losses(reader, held_out, seq_len=self.data.seq_len, reporter=reporter, world=world)


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
        return _planned(config, name, target)
    base = open_anchored(config, reporter)
    work_path = target.parent / f".{target.stem}.work"
    ends = config.resume and not config.overwrite and target.is_file()
    _refuse_bad_settings(config, base.anchor, target, exists=ends)
    if world.is_writer:
        training.refuse_busy(work_path)
    log = training.log_beside(target, _texts(config)) if config.track else None
    plan = planned(config, base.anchor)
    canaries, made = text.CanaryFolder.beside(target), text.CanaryFolder(work_path / "canaries")
    in_place = ends and not made.left_out.is_file()
    planted = [(canaries if in_place else made).planted] if config.canaries else []
    data = (*text.pinned(config.data), *planted)
    task = _Task(
        config=replace(config, data=data),
        base=base,
        name=name,
        target=target,
        plan=plan,
        decontamination=text.Decontamination.read(config.decontaminate, config.text_field),
        world=world,
    )
    if ends:
        return world.by_writer(lambda: _finished(task, work_path, made, reporter))
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
        if config.canaries:
            count = config.canaries
            world.by_writer(lambda: text.plant_canaries(made, count, config.text_field, keep=config.resume))
        if plan is None:
            result = _run(task, work, track, reporter)
        else:
            result = _run_privately(task, plan, work, track, reporter)
        world.by_writer(lambda: text.hand_over(made, canaries))
        return result


def _texts(config: TrainExpertConfig) -> list[Path]:
    return [*config.data, *([config.public] if config.public else [])]


def _refuse_bad_settings(config: TrainExpertConfig, anchor: Anchor, target: Path, *, exists: bool) -> None:
    if config.plan_tflops is not None:
        raise UsageError("is for `plan` alone", hint="leave it out", field="plan_tflops")
    check_file_target(target, overwrite=config.overwrite or exists)
    refuse_useless_rank(config.rank, anchor.manifest.architecture)
    if config.dp_epsilon is not None:
        refuse_many("training under a guarantee (`dp_epsilon`)")
    machine = machine_of(config, anchor.weights().shared)
    if not exists:  # a finished run needs no memory to give its result
        refuse_what_cannot_fit(config, anchor.manifest.moe_config, machine)
    given_rows(config, anchor)
    if config.public is not None:
        text.text_files([config.public], "public")
    if config.near_duplicates:
        text.require_datasketch()
    if config.token_cache is not None:
        _refuse_bad_cache(config.token_cache, config.data)


def _refuse_bad_cache(folder: Path, data: Sequence[Path]) -> None:
    place = folder.resolve()
    if place.exists() and not place.is_dir():
        raise UsageError(f"{folder}: is no folder", field="token_cache")
    for path in data:
        if path.resolve() in (place, *place.parents):
            raise UsageError(
                f"{folder}: lies inside {path}, and would be read as text", hint="elsewhere", field="token_cache"
            )


def _planned(config: TrainExpertConfig, name: str, target: Path) -> TrainExpertResult:
    plan = plan_training(config)
    nothing: dict[str, Any] = {"digest": None, "anchor_digest": None, "tokens": 0, "public_tokens": 0, "steps": 0}
    return TrainExpertResult(path=target, name=name, rank=config.rank, plan=plan, dry_run=True, **nothing)


def _finished(task: _Task, work_path: Path, made: text.CanaryFolder, reporter: Reporter) -> TrainExpertResult:
    """Return the result of a run that finished before, and clear up what it left."""
    config, target = task.config, task.target
    expert = open_expert(target)
    asked = _asked(task, text.text_digest(config.data, config.text_field) if task.plan is None else None)
    run = training.refuse_other_request(target, target.with_suffix(".run.json"), expert.digest, asked)
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
        **{name: run.get(name) for name in _COUNTS},
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
        public=config.public and text.text_digest([config.public], config.text_field),
        decontaminate=task.decontamination.digest,
        router=hash_file(Path(config.router)) if names_a_file(config.router) else config.router,
    )


def _run(task: _Task, work: Path, track: training.Track, reporter: Reporter) -> TrainExpertResult:
    config, (setup, reader) = task.config, _set_up(task, work, reporter)
    survey = setup.corpus.survey
    counts = {name: getattr(survey, name) for name in _COUNTS}
    asked = _asked(task, survey.digest)
    before = setup.losses(reader, task.world, reporter)
    track.held_out(0, before)
    if task.world.size > 1:
        del reader  # FSDP takes no module after the first pass, so that the expert goes into a new one
        reader = setup.machine.build(task.base.anchor.weights(), task.world)
    tensors, outcome = _train(task, setup, reader, work, track, reporter)
    after = setup.losses(reader, task.world, reporter)
    track.held_out(setup.loop.steps, after)
    _refuse_moved(reader, task.base.anchor, task.world)
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
        **counts,
    )
    digest, size = task.world.by_writer(
        lambda: _written(
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
                **counts,
            },
        )
    )
    return replace(result, digest=digest, bytes_written=size, peak_rss_bytes=peak_rss_bytes())


def _run_privately(task: _Task, plan: Plan, work: Path, track: training.Track, reporter: Reporter) -> TrainExpertResult:
    config, base = task.config, task.base
    note_busy_cores(config.threads, reporter)
    public = _public_sample(task, reporter)
    machine = machine_of(config, base.anchor.weights().shared)
    run = PrivateRun(config, plan, base, public, task.decontamination, machine, work, track, reporter)
    released = run.train()
    _refuse_moved(run.reader, base.anchor, task.world)
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
    digest, size = _written(
        task,
        released.tensors,
        told,
        result,
        _asked(task, None),
        settings=released.settings,
        router=released.router,
        run={},
    )
    return replace(result, digest=digest, bytes_written=size)


def _set_up(task: _Task, work: Path, reporter: Reporter) -> tuple[_Setup, nn.Module]:
    """Return what a run needs, and the anchor as a model."""
    config, base = task.config, task.base
    machine = machine_of(config, base.anchor.weights().shared)
    note_busy_cores(config.threads, reporter)
    # What the writer has tokenised, the others find.
    corpus = task.world.writer_first(
        lambda: text.prepare_corpus(
            config.data,
            base.tokenizer,
            work,
            text_field=config.text_field,
            seed=config.seed,
            passages=0 if names_a_file(config.router) else training.MOST_PASSAGES,
            decontamination=task.decontamination,
            near_duplicates=config.near_duplicates and task.world.is_writer,
            cache=config.token_cache,
            reporter=reporter,
        )
    )
    public = _public_sample(task, reporter)
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
    reader = machine.build(base.anchor.weights(), task.world)
    reporter.note(f"router rows: {config.router}")
    passages = training.passages(data.own_tokens(steps))
    rows, router = _start_rows(task, reader, corpus, public, passages, reporter)
    setup = _Setup(
        machine=machine,
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
    return setup, reader


def _public_sample(task: _Task, reporter: Reporter) -> text.PublicSample:
    config, base = task.config, task.base
    sample = base.sample
    if config.public is not None:
        documents = text.frame_documents(base.tokenizer, text.read_documents([config.public], config.text_field))
        sample = text.draw_sample(documents, base.anchor.public_sample()["tokens"].shape[0], config.seed)
    if not task.decontamination:
        return sample
    kept = [
        document
        for document, words in zip(sample.documents, sample.texts(base.tokenizer), strict=True)
        if not task.decontamination.shares(words)
    ]
    if not kept:
        raise UsageError("shares words with every document of public text", field="decontaminate")
    if count := len(sample.documents) - len(kept):
        reporter.note(f"{count} of {len(sample.documents)} public documents share words with `decontaminate`")
    return text.PublicSample(kept)


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
    own = corpus.passages[:passages]
    rows, info = measured_rows(
        config,
        base,
        reader,
        own,
        lambda: text.sample_passages(public.texts(base.tokenizer), passages, config.seed),
        reporter,
        task.world,
    )
    return task.world.by_writer(lambda: (rows.rows, info))


def _train(
    task: _Task, setup: _Setup, reader: nn.Module, work: Path, track: training.Track, reporter: Reporter
) -> tuple[dict[str, Tensor], training.Outcome]:
    """Train the pair; return the expert's tensors, rounded as they are stored, and what the run did."""
    config, anchor = task.config, task.base.anchor
    identity = {
        **_identity(config, setup),
        "anchor": anchor.digest,
        "data": setup.corpus.survey.digest,
        "public": setup.public.digest,
        "rows": [float(row) for row in setup.rows.norm(dim=1)],
        "rank": config.rank,
        "special_as_text": config.special_as_text,
        "decontaminate": task.decontamination.digest,
    }
    checkpoints = training.Checkpoints(
        work / "checkpoints",
        identity,
        every_steps=config.checkpoint_steps,
        resume=config.resume,
        reporter=reporter,
        world=task.world,
    )
    match = config.public_match if config.public_mix else 0.0
    pair = training.Pair(reader, setup.rows, public_match=match, rank=config.rank, seed=config.seed, world=task.world)
    if config.recompute:
        model.recompute_layers(reader)
    outcome = training.train(
        reader,
        pair.groups(),
        setup.data,
        setup.loop,
        reporter=reporter,
        match=pair.match if match else None,
        checkpoints=checkpoints,
        track=track,
        world=task.world,
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


def _refuse_moved(reader: nn.Module, anchor: Anchor, world: World) -> None:
    if moved := model.moved_tensors(reader, anchor.weights(), world):
        raise FlexctlError(f"{len(moved)} frozen tensors moved in training, {moved[0]} first; nothing was written")


def _written(
    task: _Task,
    tensors: Mapping[str, Tensor],
    data: DataInfo,
    result: TrainExpertResult,
    asked: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    router: RouterInfo,
    run: Mapping[str, Any],
) -> tuple[str, int]:
    """Write the expert; return its digest and its size in bytes."""
    expert = write_expert(
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
    return expert.digest, task.target.stat().st_size
