"""Train one expert against the anchor, at home, and write it as one file."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import flags, workspace
from flexctl.bundle import (
    PUBLIC,
    Anchor,
    DataInfo,
    RawTensor,
    RouterInfo,
    open_anchor,
    open_expert,
    slug,
    write_expert,
)
from flexctl.bundle.checks import prove
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.lowrank import refuse_useless_rank
from flexctl.bundle.manifest import PrivacyInfo, has_expired
from flexctl.bundle.names import check_expert_name
from flexctl.bundle.store import check_file_target
from flexctl.errors import FlexctlError
from flexctl.hub import localise
from flexctl.options import DATA, HARDWARE, TRAINING, Config, flag
from flexctl.runtime import SILENT, Reporter, note_busy_cores, peak_rss_bytes
from flexctl.steps.router_rows import given_rows, measured_rows, names_a_file

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flexctl.text.corpus import Corpus
    from flexctl.text.sample import PublicSample
    from flexctl.text.tokens import Framed
    from flexctl.training.batches import Mixture
    from flexctl.training.loop import LoopSettings, Outcome
    from flexctl.training.pair import Pair

__all__ = ["TrainExpertConfig", "TrainExpertResult", "train_expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExpertConfig(Config):
    """What ``train_expert`` is asked to do. Defaults were chosen by measurement: docs/results.md.

    Trains against the frozen anchor and writes one file, experts/NAME.st: what you share. Only
    feed-forward weights and router rows are trained; everything else is checked afterwards to be the
    anchor's, bit for bit.

    Examples:
        flexctl train-expert --data law/
        flexctl train-expert --data law.jsonl --name law --max-tokens 2000000 --license CC-BY-4.0
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
    public_mix: Annotated[
        float, flag("SHARE", "Share of public text in each step, from 0 to below 1.", DATA, at_least=0, below=1)
    ] = 0.3
    public: flags.Public = None
    rank: Annotated[
        int | None,
        flag("R", "Train low-rank differences to the public expert: a smaller file, less memory.", TRAINING, above=0),
    ] = None
    max_steps: flags.MaxSteps = None
    epochs: Annotated[float, flag("N", "Passes over `data`.", TRAINING, above=0)] = 1.0
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
    public_match: Annotated[
        float,
        flag("X", "How strongly the expert is held to the public one on public text.", TRAINING, at_least=0),
    ] = 1.0
    router: flags.Router = "discriminant"
    encoder: flags.Encoder = None
    own_covariance: flags.OwnCovariance = 0.1
    resume: flags.Resume = False
    checkpoint_steps: flags.CheckpointSteps = 200
    license: flags.License = None
    purpose: flags.Purpose = ()
    expires: flags.Expires = None
    label: flags.Label = None
    contact: flags.Contact = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainExpertResult:
    """What ``train_expert`` made.

    Attributes:
        tokens: The owner's tokens trained on; ``public_tokens`` came on top.
        final_loss: Mean training loss over the last steps, nats a token.
        held_out: ``{"own" and "public": {"before", "after"}}``, nats a token on text that was not trained on, of the
            anchor and of the finished pair after rounding. None where nothing was held out.
        tokens_per_s: Own and public tokens a second; None when the run only finished what was there.
        frozen_verified: Every frozen tensor equals the anchor's, bit for bit.
        bias: The router bias of each layer.
        rank: Of a low-rank expert; None of a full one.
        bytes_written: Size of the expert's file.
    """

    path: Path
    digest: str | None
    name: str
    anchor_digest: str
    tokens: int
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """Everything a run needs, ready."""

    model: nn.Module
    corpus: Corpus
    public: PublicSample
    data: Mixture
    loop: LoopSettings
    rows: Tensor
    router: RouterInfo

    @property
    def held_out(self) -> dict[str, Sequence[Framed]]:
        """Documents kept out of training, the owner's and public ones, as many as a run of this length is scored on."""
        from flexctl.text.sample import leading
        from flexctl.training.budget import held_out_tokens

        most = held_out_tokens(self.data.own_tokens(self.loop.steps))
        parts = {"own": self.corpus.held_out, "public": self.public.held_out}
        return {name: leading(documents, most) for name, documents in parts.items() if documents is not None}


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
    from flexctl.model.configs import warn_of_length
    from flexctl.text.documents import pinned, source_name
    from flexctl.training.work import refuse_busy, working_folder

    place = workspace.find()
    anchor = open_anchor(localise(config.anchor or place.anchor, reporter))
    name = check_expert_name(config.name or slug(source_name(config.data[0])), "`name`")
    target = config.output or place.experts / f"{name}.st"
    work_path = target.parent / f".{name}.work"
    ends = config.resume and not config.overwrite and target.is_file()
    _refuse_bad_settings(config, anchor, target, exists=ends)
    refuse_busy(work_path)
    config = replace(config, data=pinned(config.data))
    if ends:
        return _finished(config, anchor, name, target, work_path, reporter)
    warn_of_length(config.seq_len, anchor.config, reporter)
    if has_expired(config.expires, datetime.date.today()):
        reporter.warn(f"`expires`: {config.expires} is past; merge will refuse the expert")
    if config.dry_run:
        return TrainExpertResult(
            path=target,
            digest=None,
            name=name,
            anchor_digest=anchor.digest,
            tokens=0,
            public_tokens=0,
            steps=0,
            rank=config.rank,
            dry_run=True,
        )
    with working_folder(work_path, reporter) as work:
        # Once more, as a run that ended in this moment may have written it.
        check_file_target(target, overwrite=config.overwrite)
        return _run(config, anchor, name, target, work, reporter)


def _finished(
    config: TrainExpertConfig, anchor: Anchor, name: str, target: Path, work_path: Path, reporter: Reporter
) -> TrainExpertResult:
    """Return the result of a run that finished before, and clear up what it left."""
    from flexctl.text.corpus import text_digest
    from flexctl.training.finished import refuse_other_request, say_done

    expert = open_expert(target)
    text = text_digest(config.data, config.text_field, config.seed)
    refuse_other_request(target, target.with_suffix(".run.json"), expert.digest, _asked(config, anchor, name, text))
    prove(expert, reporter)
    say_done(target, work_path, dry_run=config.dry_run, reporter=reporter)
    about = expert.manifest.training
    return TrainExpertResult(
        path=target,
        digest=expert.digest,
        name=name,
        anchor_digest=anchor.digest,
        tokens=about["tokens"],
        public_tokens=about["public_tokens"],
        steps=about["steps"],
        final_loss=about["losses"]["final"],
        held_out=about["losses"]["held_out"],
        frozen_verified=about["frozen_verified"],
        bias=list(expert.manifest.router.bias),
        rank=expert.manifest.rank,
        bytes_written=target.stat().st_size,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
    )


def _asked(config: TrainExpertConfig, anchor: Anchor, name: str, text: str) -> dict[str, Any]:
    """Return what decides the result; ``text`` is the digest of the owner's."""
    from flexctl.text.corpus import text_digest
    from flexctl.training.finished import asked_for

    return asked_for(
        config,
        name=name,
        anchor=anchor.digest,
        text=text,
        public=config.public and text_digest([config.public], config.text_field, config.seed),
        router=hash_file(Path(config.router)) if names_a_file(config.router) else config.router,
    )


def _run(
    config: TrainExpertConfig, anchor: Anchor, name: str, target: Path, work: Path, reporter: Reporter
) -> TrainExpertResult:
    from flexctl.model.building import moved_tensors
    from flexctl.model.tensors import to_bytes
    from flexctl.training.pair import Pair

    setup = _set_up(config, anchor, work, reporter)
    asked = _asked(config, anchor, name, setup.corpus.survey.digest)
    before = _held_out_losses(setup, reporter)
    pair = Pair(setup.model, setup.rows, public_match=config.public_match, rank=config.rank, seed=config.seed)
    outcome = _train(config, anchor, setup, pair, work, reporter)
    pair.close()
    public = anchor.weights().experts[PUBLIC]
    tensors = pair.round_weights(anchor.manifest.architecture.dtype, public) | {"router.weight": setup.rows}
    after = _held_out_losses(setup, reporter)
    moved = moved_tensors(setup.model, anchor.weights())
    if moved:
        raise FlexctlError(f"{len(moved)} frozen tensors moved in training, {moved[0]} first; nothing was written")
    held_out = {part: {"before": before[part], "after": after[part]} for part in before}
    own_tokens = setup.data.own_tokens(setup.loop.steps)
    public_tokens = setup.data.public_before(setup.loop.steps) * setup.data.seq_len
    recent = outcome.losses[-20:]
    final_loss = sum(recent) / len(recent)
    survey = setup.corpus.survey
    expert = write_expert(
        target,
        anchor=anchor,
        name=name,
        tensors={key: RawTensor(*to_bytes(tensor)) for key, tensor in tensors.items()},
        data=DataInfo(
            documents=survey.documents,
            tokens=len(setup.corpus.stream),
            bytes=survey.num_bytes,
            label=config.label,
            license=config.license,
            purposes=config.purpose,
            expires=config.expires,
            contact=config.contact,
        ),
        training={
            **_identity(config, setup),
            "seed": config.seed,
            "steps": setup.loop.steps,
            "tokens": own_tokens,
            "public_tokens": public_tokens,
            "losses": {"final": final_loss, "held_out": held_out},
            "frozen_verified": True,
        },
        router=setup.router,
        run={
            "tokens_per_s": outcome.tokens_per_s,
            "peak_rss_bytes": peak_rss_bytes(),
            "duplicates": survey.duplicates,
        },
        asked=asked,
        overwrite=config.overwrite,
        rank=config.rank,
    )
    return TrainExpertResult(
        path=target,
        digest=expert.digest,
        name=name,
        anchor_digest=anchor.digest,
        tokens=own_tokens,
        public_tokens=public_tokens,
        steps=setup.loop.steps,
        final_loss=final_loss,
        held_out=held_out,
        tokens_per_s=outcome.tokens_per_s,
        frozen_verified=True,
        bias=list(setup.router.bias),
        rank=config.rank,
        bytes_written=target.stat().st_size,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _set_up(config: TrainExpertConfig, anchor: Anchor, work: Path, reporter: Reporter) -> _Setup:
    from flexctl.model.building import autocast_dtype, build_model, load_tokenizer, pick_device, pick_dtype, set_threads
    from flexctl.text.corpus import prepare_corpus
    from flexctl.text.sample import PublicSample
    from flexctl.training.batches import Mixture
    from flexctl.training.budget import passages, resolve_budget, warmup_steps
    from flexctl.training.loop import LoopSettings

    set_threads(config.threads)
    note_busy_cores(config.threads, reporter)
    tokenizer = load_tokenizer(anchor.path)
    corpus = prepare_corpus(
        config.data, tokenizer, work, text_field=config.text_field, seed=config.seed, reporter=reporter
    )
    public = _public_sample(config, anchor, tokenizer)
    kept = public.to_train_on
    budget = resolve_budget(
        available_tokens=len(corpus.stream),
        epochs=config.epochs,
        max_tokens=config.max_tokens,
        public_mix=config.public_mix,
        seq_len=config.seq_len,
        batch_tokens=config.batch_tokens,
        micro_batch=config.micro_batch,
        lr=config.lr,
        hidden_size=anchor.manifest.architecture.hidden_size,
        max_position_embeddings=anchor.config.get("max_position_embeddings"),
    )
    data = Mixture(
        corpus.stream,
        PublicSample(kept).stream() if kept else None,
        seq_len=budget.seq_len,
        batch_size=budget.batch_size,
        public_share=config.public_mix,
        seed=config.seed,
    )
    most = data.steps_for(budget.own_tokens)
    steps = min(most, config.max_steps or most)
    device = pick_device(config.device)
    model = build_model(anchor.weights(), device=device, dtype=pick_dtype(config.dtype, device))
    reporter.note(f"router rows: {config.router}")
    count = passages(data.own_tokens(steps))
    rows, router = _start_rows(config, anchor, model, corpus, public, tokenizer, count, reporter)
    return _Setup(
        model=model,
        corpus=corpus,
        public=public,
        data=data,
        loop=LoopSettings(
            steps=steps,
            lr=budget.lr,
            warmup_steps=warmup_steps(steps, config.warmup_steps),
            micro_batch=budget.micro_batch,
            autocast=autocast_dtype(config.dtype, device),
        ),
        rows=rows,
        router=router,
    )


def _public_sample(config: TrainExpertConfig, anchor: Anchor, tokenizer: Any) -> PublicSample:
    from flexctl.text.documents import read_documents
    from flexctl.text.sample import PublicSample, draw_sample
    from flexctl.text.tokens import frame_documents

    kept = anchor.public_sample()
    if config.public is None:
        return PublicSample.from_tensors(kept)
    documents = frame_documents(tokenizer, read_documents([config.public], config.text_field))
    return draw_sample(documents, kept["tokens"].shape[0], config.seed)


def _refuse_bad_settings(config: TrainExpertConfig, anchor: Anchor, target: Path, *, exists: bool) -> None:
    from flexctl.model.building import autocast_dtype, pick_device
    from flexctl.text.documents import text_files

    check_file_target(target, overwrite=config.overwrite or exists)
    refuse_useless_rank(config.rank, anchor.manifest.architecture)
    autocast_dtype(config.dtype, pick_device(config.device))
    given_rows(config, anchor)
    if config.public is not None:
        text_files([config.public], "public")


def _start_rows(
    config: TrainExpertConfig,
    anchor: Anchor,
    model: nn.Module,
    corpus: Corpus,
    public: PublicSample,
    tokenizer: Any,
    count: int,
    reporter: Reporter,
) -> tuple[Tensor, RouterInfo]:
    from flexctl.model.tensors import to_torch
    from flexctl.text.documents import sample_passages

    if (given := given_rows(config, anchor)) is not None:
        return to_torch(given.rows), given.info
    own = sample_passages(corpus.documents(), count, config.seed)
    theirs = sample_passages(public.texts(tokenizer), count, config.seed)
    rows, info = measured_rows(config, anchor, model, tokenizer, own, theirs, reporter)
    return rows.rows, info


def _train(
    config: TrainExpertConfig, anchor: Anchor, setup: _Setup, pair: Pair, work: Path, reporter: Reporter
) -> Outcome:
    from flexctl.training.checkpoints import Checkpoints
    from flexctl.training.loop import train

    identity = {
        **_identity(config, setup),
        "anchor": anchor.digest,
        "data": setup.corpus.survey.digest,
        "public": setup.public.digest,
        "rows": [float(row) for row in setup.rows.sum(dim=1)],
        "rank": config.rank,
    }
    checkpoints = Checkpoints(
        work / "checkpoints",
        identity,
        every_steps=config.checkpoint_steps,
        resume=config.resume,
        reporter=reporter,
    )
    return train(
        setup.model,
        pair.groups(),
        setup.data,
        setup.loop,
        reporter=reporter,
        match=pair.match if config.public_match and config.public_mix else None,
        checkpoints=checkpoints,
    )


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
        "dtype": config.dtype,
    }


def _held_out_losses(setup: _Setup, reporter: Reporter) -> dict[str, float]:
    from flexctl.evaluation.scoring import held_out_losses

    return held_out_losses(setup.model, setup.held_out, seq_len=setup.data.seq_len, reporter=reporter)
