"""Make an anchor: take or train a dense model, measure its router space on public text, write the bundle."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from flexctl import flags, hub, model, text, training, workspace
from flexctl.bundle import (
    RawTensor,
    TensorType,
    check_agreement,
    dense_tensors,
    head_differs,
    open_anchor,
    read_checkpoint,
    read_dense_config,
    write_anchor,
)
from flexctl.bundle.checks import prove
from flexctl.bundle.manifest import MANIFEST_FILE
from flexctl.bundle.names import name_an_anchor
from flexctl.bundle.store import check_directory_target, place_of_work
from flexctl.errors import Saving, UsageError
from flexctl.families import family_of
from flexctl.options import DATA, OUTPUT, TRAINING, Config, argument, flag
from flexctl.processes import Joined, World
from flexctl.runtime import SILENT, Reporter, note_busy_cores, software_versions
from flexctl.steps.calibration import Calibration, calibrate, read_kind
from flexctl.steps.checkpoint import warn_of_left_behind
from flexctl.steps.machine import machine_of

__all__ = ["InitAnchorConfig", "InitAnchorResult", "init_anchor"]

_GENERATION = "generation_config.json"
_ANNEAL: dict[str, Any] = {"seq_len": 1024, "batch_tokens": 8192, "lr": 1e-4}


@dataclass(frozen=True, kw_only=True, slots=True)
class InitAnchorConfig(Config):
    """What ``init_anchor`` is asked to do.

    SOURCE is a stock checkpoint. Without it, a tokenizer and a small model of OLMo-2's shape are
    trained on `data`. `data` is public text; it also calibrates the routers, and a sample of it goes
    along with the anchor, for owners to mix into their training. Writes flexctl.toml where there is none.

    Examples:
        flexctl init-anchor --data public.jsonl --preset micro
        flexctl init-anchor allenai/OLMo-2-0425-1B --data public.jsonl
    """

    source: Annotated[
        str | None, argument("SOURCE", "Checkpoint directory or Hub id; without it a small model is trained.")
    ] = None
    data: flags.Data
    preset: Annotated[
        Literal["nano", "micro", "small"],
        flag("SIZE", "Size of a model trained from scratch: nano, micro or small.", TRAINING),
    ] = "micro"
    output: Annotated[Path | None, flags.output("DIR", "Where to write (default: the workspace's anchor).")] = None
    license: flags.License = None
    max_tokens: Annotated[
        int | None, flag("N", "Stop after this many tokens of `data` (default: the preset's).", TRAINING, above=0)
    ] = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    decontaminate: flags.Decontaminate = ()
    near_duplicates: flags.NearDuplicates = False
    name: Annotated[
        str | None, flag("NAME", "The anchor's name (default: the folder's of SOURCE, or the preset).", OUTPUT)
    ] = None
    anneal_tokens: Annotated[
        int, flag("N", "First train SOURCE on this many tokens of `data`.", TRAINING, at_least=0)
    ] = 0
    sample_tokens: Annotated[int, flag("N", "Tokens of public text kept with the anchor.", DATA, above=0)] = 1_000_000
    calibrate: Annotated[
        tuple[Path, ...],
        flag(
            "PATH",
            "Text of another kind than `data` (code, a language): measured only, so that routers know how text varies; "
            "repeatable, one kind each.",
            DATA,
        ),
    ] = ()
    seq_len: Annotated[
        int | None, flag("N", "Tokens a sequence (default: the preset's, or 1024 for annealing).", DATA, above=0)
    ] = None
    batch_tokens: Annotated[
        int | None,
        flag("N", "Tokens an optimiser step (default: the preset's, or 8192 for annealing).", TRAINING, above=0),
    ] = None
    lr: Annotated[
        float | None, flag("X", "Peak learning rate (default: the preset's, or 1e-4 for annealing).", TRAINING, above=0)
    ] = None
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
class InitAnchorResult:
    """What ``init_anchor`` made.

    Attributes:
        tokens: Training tokens; 0 when the source was taken as it is.
        loss: Mean training loss over the last steps, nats a token; None when nothing was trained.
        constant_std: Standard deviation of u . x on public text in each layer; its mean is 1. Where it is small the
            router bias holds for every token; where it is not, rows are scaled down (docs/how-it-works.md, section 5).
        sample_tokens: Tokens in the public sample.
        duplicates: Documents of ``data`` whose text had come before.
        near_duplicates: Others that are nearly the same as one before; None where nobody asked.
        contaminated: Documents left out as they share words with ``decontaminate``; None where there is none.
    """

    path: Path
    digest: str | None
    name: str
    model_type: str
    num_parameters: int | None
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    tokens: int
    loss: float | None = None
    constant_std: list[float] = field(default_factory=list)
    sample_tokens: int = 0
    duplicates: int | None = None
    near_duplicates: int | None = None
    contaminated: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Public:
    """Public text, counted and tokenised.

    Attributes:
        digest: Of all documents.
        counts: Of documents by ``text.COUNTS``.
        tokenizer: The anchor's.
        sample: What goes along with the anchor.
        stream: All of it, to train on; None where nothing is trained.
    """

    digest: str
    counts: dict[str, Any]
    tokenizer: Any
    sample: text.PublicSample
    stream: text.TokenStream | None


def init_anchor(config: InitAnchorConfig, reporter: Reporter = SILENT) -> InitAnchorResult:
    """Make an anchor and, in a workspace's place, the workspace around it.

    Args:
        config: What to make.
        reporter: Hears of progress.

    Returns:
        What was made.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The source is no checkpoint of a supported family.
    """
    with Joined(config.device) as world:
        return _init_anchor(config, world, reporter)


def _init_anchor(config: InitAnchorConfig, world: World, reporter: Reporter) -> InitAnchorResult:
    target = config.output or workspace.find().anchor
    work_path = place_of_work(target, "work")
    ends = config.resume and not config.overwrite and (target / MANIFEST_FILE).is_file()
    _refuse_bad_settings(config, target, exists=ends)
    if world.is_writer:
        training.refuse_busy(work_path)
    log = training.log_beside(target, [*config.data, *config.calibrate]) if config.track else None
    config = replace(config, data=text.pinned(config.data))
    # What the writer has fetched, the others find.
    source = world.writer_first(lambda: _source_directory(config))
    decontamination = text.Decontamination.read(config.decontaminate, config.text_field)
    if ends:
        return world.by_writer(lambda: _finished(config, source, decontamination, target, work_path, reporter))
    note_busy_cores(config.threads, reporter)
    if source is not None:
        _warn_of_source(source, config, reporter)
    kinds = [(str(path), read_kind(path, config.text_field, config.seed)) for path in config.calibrate]
    if config.dry_run:
        return _planned(config, target, source)
    with (
        training.working_folder(work_path, reporter, world) as work,
        training.tracked(log, _name(config), work, resume=config.resume, reporter=reporter, world=world) as track,
    ):
        # Once more, as a run that ended in this moment may have written it.
        check_directory_target(target, kind="anchor", overwrite=config.overwrite)
        public = world.by_writer(lambda: _read_public(config, source, decontamination, work, reporter))
        asked = _asked(config, source, public.digest, decontamination)
        checkpoint, trained = _checkpoint(config, source, public, work, track, world, reporter)
        found = _calibrate(config, checkpoint, public, kinds, world, reporter)
        return world.by_writer(lambda: _written(config, checkpoint, public, target, trained, found, asked))


def _finished(
    config: InitAnchorConfig,
    source: Path | None,
    decontamination: text.Decontamination,
    target: Path,
    work_path: Path,
    reporter: Reporter,
) -> InitAnchorResult:
    """Return the result of a run that finished before, and clear up what it left."""
    anchor = open_anchor(target)
    asked = _asked(config, source, text.text_digest(config.data, config.text_field), decontamination)
    run = training.refuse_other_request(target, target / "run.json", anchor.digest, asked)
    prove(anchor, reporter)
    training.say_done(target, work_path, dry_run=config.dry_run, reporter=reporter)
    sizes = anchor.manifest.architecture
    return InitAnchorResult(
        path=target,
        digest=anchor.digest,
        name=anchor.manifest.name,
        model_type=anchor.manifest.model_type,
        num_parameters=run["num_parameters"],
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        tokens=run["tokens"],
        loss=run["loss"],
        constant_std=run["constant_std"],
        sample_tokens=anchor.public_sample()["tokens"].shape[0],
        **{name: run.get(name) for name in text.COUNTS},
        dry_run=config.dry_run,
    )


def _asked(
    config: InitAnchorConfig, source: Path | None, digest: str, decontamination: text.Decontamination
) -> dict[str, Any]:
    """Return what decides the result; ``digest`` is that of the public text."""
    return training.asked_for(
        config,
        name=_name(config),
        text=digest,
        decontaminate=decontamination.digest,
        calibrate=[text.text_digest([path], config.text_field) for path in config.calibrate],
        source=source and training.folder_digest(source),
    )


def _refuse_bad_settings(config: InitAnchorConfig, target: Path, *, exists: bool) -> None:
    check_directory_target(target, kind="anchor", overwrite=config.overwrite or exists)
    text.refuse_among(target, [*config.data, *config.calibrate], "output")
    _name(config)
    machine_of(config)
    if config.track and config.source is not None and not config.anneal_tokens:
        raise UsageError("SOURCE is not trained", hint="use `anneal_tokens` to train it further", field="track")
    text.refuse_unreadable(config.data, config.text_field)
    for path in config.calibrate:
        text.refuse_unreadable([path], config.text_field, "calibrate")
    if config.near_duplicates:
        text.require_datasketch()


def _source_directory(config: InitAnchorConfig) -> Path | None:
    if config.source is None:
        if config.anneal_tokens:
            raise UsageError(
                "there is no SOURCE to anneal", hint="use `max_tokens` from scratch", field="anneal_tokens"
            )
        return None
    if config.max_tokens is not None:
        raise UsageError(
            "SOURCE is trained already", hint="use `anneal_tokens` to train it further", field="max_tokens"
        )
    path = Path(config.source)
    if not path.is_dir():
        path = hub.fetch_checkpoint(config.source)
    dense = read_dense_config(path)
    model.resolve_moe_config(dense)
    _refuse_other_tensors(path)
    text.refuse_tokens_beyond(path, dense["vocab_size"])
    return path


def _refuse_other_tensors(checkpoint: Path) -> None:
    """Refuse a checkpoint whose weights are not those of its class, which Transformers would make up or leave out."""
    config, found = read_dense_config(checkpoint), read_checkpoint(checkpoint)
    expected = {
        name: TensorType(found[name].dtype if name in found else "F32", shape)
        for name, shape in model.dense_shapes(config).items()
    }
    # What the class leaves out on purpose: a tied head, and buffers that old checkpoints have.
    spare = {"lm_head.weight"} if config.get("tie_word_embeddings") else set()
    spare |= {name for name in found if name.endswith(".rotary_emb.inv_freq")}
    check_agreement({name: span for name, span in found.items() if name not in spare}, expected, str(checkpoint))


def _warn_of_source(source: Path, config: InitAnchorConfig, reporter: Reporter) -> None:
    """Say what of a checkpoint is not taken, and what other software will take otherwise."""
    dense = read_dense_config(source)
    warn_of_left_behind(source, reporter)
    if dense.get("tie_word_embeddings"):
        _warn_of_tied_head(source, dense, reporter)
    if config.anneal_tokens:
        model.warn_of_length(config.seq_len or _ANNEAL["seq_len"], dense, reporter)


def _warn_of_tied_head(source: Path, dense: Mapping[str, Any], reporter: Reporter) -> None:
    if head_differs(read_checkpoint(source)):
        reporter.warn(
            f"{source}: tie_word_embeddings is true and lm_head.weight is not the embedding: Transformers keeps both, "
            "software that ties them computes something else; set tie_word_embeddings to false"
        )
    if family_of(dense["model_type"]).moe_type == "flex_olmo":
        reporter.warn(
            f"{source}: tie_word_embeddings is true; vLLM's flex_olmo class ties no head, so merged models will run in "
            "Transformers and not in vLLM (docs/serving.md)"
        )


def _name(config: InitAnchorConfig) -> str:
    return name_an_anchor(config.name, Path(config.source).name if config.source else f"{config.preset}-anchor")


def _planned(config: InitAnchorConfig, target: Path, source: Path | None) -> InitAnchorResult:
    preset = model.PRESETS[config.preset]
    sizes: Any = {"model_type": "olmo2"} if source is None else read_dense_config(source)
    return InitAnchorResult(
        path=target,
        digest=None,
        name=_name(config),
        model_type=sizes["model_type"],
        num_parameters=None,
        vocab_size=sizes.get("vocab_size", preset.vocab_size),
        hidden_size=sizes.get("hidden_size", preset.hidden_size),
        num_hidden_layers=sizes.get("num_hidden_layers", preset.num_hidden_layers),
        tokens=config.anneal_tokens if source else config.max_tokens or preset.max_tokens,
        dry_run=True,
    )


def _read_public(
    config: InitAnchorConfig,
    source: Path | None,
    decontamination: text.Decontamination,
    work: Path,
    reporter: Reporter,
) -> _Public:
    """Return public text, after two passes over it: it is counted, and then tokenised."""
    with text.NearDuplicates.within(work) if config.near_duplicates else nullcontext() as near:
        stocktaking = text.Stocktaking(
            config.data,
            config.text_field,
            config.seed,
            decontamination=decontamination,
            near_duplicates=near,
            reporter=reporter,
        )
        tokenizer = _tokenizer(config, source, stocktaking, reporter)
        inventory = text.take_inventory(stocktaking)
    # No file that is saved of the tokenizer holds this.
    tokenizer.split_special_tokens = config.special_as_text
    sampler = text.Sampler(config.sample_tokens, config.seed)

    def documents() -> Iterator[text.Framed]:
        pace = text.Pace(bar)
        kept = inventory.kept(text.read_documents(config.data, config.text_field))
        for framed in text.frame_documents(tokenizer, kept):
            pace.add(framed.num_bytes)
            sampler.add(framed)
            yield framed

    with reporter.progress("tokenising", inventory.num_bytes, "bytes") as bar:
        if source is None or config.anneal_tokens:
            stream = text.pack(work / "public.tokens", documents())
        else:
            stream = None
            deque(documents(), maxlen=0)
    return _Public(
        digest=inventory.digest,
        counts={name: getattr(inventory, name) for name in text.COUNTS},
        tokenizer=tokenizer,
        sample=sampler.drawn(),
        stream=stream,
    )


def _tokenizer(config: InitAnchorConfig, source: Path | None, stocktaking: text.Stocktaking, reporter: Reporter) -> Any:
    """Return the source's tokenizer, or one that is trained on the text while it is counted."""
    if source is not None:
        return model.load_tokenizer(source)
    preset = model.PRESETS[config.preset]
    reporter.note(f"training a tokenizer of {preset.vocab_size} entries")
    return text.train_tokenizer(stocktaking.documents(), preset.vocab_size, preset.seq_len)


def _checkpoint(
    config: InitAnchorConfig,
    source: Path | None,
    public: _Public,
    work: Path,
    track: training.Track,
    world: World,
    reporter: Reporter,
) -> tuple[Path, tuple[int, float | None]]:
    """Return a dense checkpoint directory and the (tokens, loss) of what was trained for it."""
    if public.stream is None:
        assert source is not None
        return world.by_writer(lambda: _readable(source, work)), (0, None)
    machine = machine_of(config)
    dense_config, tensors = _start(config, source, public.tokenizer)
    dense = model.build_dense(dense_config, tensors, device=machine.device, runs_in=machine.autocast, world=world)
    trained = training.train_whole(
        dense,
        public.stream,
        _training_settings(config),
        work=work,
        resume=config.resume,
        checkpoint_steps=config.checkpoint_steps,
        autocast=machine.autocast,
        reporter=reporter,
        track=track,
        world=world,
    )
    folder = work / "checkpoint"
    if world.is_writer:
        shutil.rmtree(folder, ignore_errors=True)
    model.save_dense(dense, folder, world)
    world.by_writer(lambda: _complete(folder, source, public.tokenizer))
    return folder, trained


def _complete(folder: Path, source: Path | None, tokenizer: Any) -> None:
    """Put beside weights that were trained what does not train."""
    with Saving(folder):
        tokenizer.save_pretrained(folder)
    if source is not None and (source / _GENERATION).is_file():
        shutil.copyfile(source / _GENERATION, folder / _GENERATION)


def _start(
    config: InitAnchorConfig, source: Path | None, tokenizer: Any
) -> tuple[Mapping[str, Any], dict[str, RawTensor]]:
    """Return config.json and weights of what is to be trained."""
    if source is not None:
        return read_dense_config(source), dense_tensors(source)
    new = model.new_model(model.PRESETS[config.preset], tokenizer, config.seed)
    return new.config.to_dict(), {name: RawTensor(*model.to_bytes(each)) for name, each in new.named_parameters()}


def _readable(source: Path, work: Path) -> Path:
    """Return the source, or where its tokenizer is a SentencePiece model alone, the same with a tokenizer.json.

    So what reads such a model is needed once, and by none of those who use the anchor.
    """
    if not model.is_bare_sentencepiece(source):
        return source
    folder = work / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with Saving(folder):
        model.load_tokenizer(source).save_pretrained(folder)
    for file in source.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    return folder


def _training_settings(config: InitAnchorConfig) -> training.WholeSettings:
    preset = model.PRESETS[config.preset]
    scratch = {"seq_len": preset.seq_len, "batch_tokens": preset.batch_tokens, "lr": preset.lr}
    defaults: Any = scratch if config.source is None else _ANNEAL
    return training.WholeSettings(
        max_tokens=config.anneal_tokens or config.max_tokens or preset.max_tokens,
        seq_len=config.seq_len or defaults["seq_len"],
        batch_tokens=config.batch_tokens or defaults["batch_tokens"],
        lr=config.lr or defaults["lr"],
        seed=config.seed,
    )


def _calibrate(
    config: InitAnchorConfig,
    checkpoint: Path,
    public: _Public,
    kinds: list[tuple[str, list[str]]],
    world: World,
    reporter: Reporter,
) -> Calibration:
    return calibrate(
        checkpoint,
        sample=public.sample,
        kinds=kinds,
        special_as_text=config.special_as_text,
        seed=config.seed,
        machine=machine_of(config, read_checkpoint(checkpoint)),
        reporter=reporter,
        world=world,
    )


def _written(
    config: InitAnchorConfig,
    checkpoint: Path,
    public: _Public,
    target: Path,
    trained: tuple[int, float | None],
    found: Calibration,
    asked: Mapping[str, Any],
) -> InitAnchorResult:
    """Write the anchor, and the workspace around it where it is in a workspace's place."""
    dense = read_dense_config(checkpoint)
    anchor = write_anchor(
        target,
        checkpoint=checkpoint,
        name=_name(config),
        moe_config=model.resolve_moe_config(dense),
        router_space=found.space,
        public_sample=found.sample,
        run={
            "asked": asked,
            "num_parameters": found.num_parameters,
            "constant_std": found.spread,
            "tokens": trained[0],
            "loss": trained[1],
            **public.counts,
            "software": software_versions(),
        },
        license=config.license,
        overwrite=config.overwrite,
    )
    if config.output is None:
        workspace.ensure(target.parent)
    return InitAnchorResult(
        path=target,
        digest=anchor.digest,
        name=_name(config),
        model_type=dense["model_type"],
        num_parameters=found.num_parameters,
        vocab_size=dense["vocab_size"],
        hidden_size=dense["hidden_size"],
        num_hidden_layers=dense["num_hidden_layers"],
        tokens=trained[0],
        loss=trained[1],
        constant_std=found.spread,
        sample_tokens=found.sample["tokens"].shape[0],
        **public.counts,
    )
