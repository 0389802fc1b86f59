"""Take a mixture of experts apart that somebody else merged, into an anchor and experts of ours."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flexctl import flags, hub, model, text, training, workspace
from flexctl.bundle import (
    Anchor,
    DataInfo,
    RouterInfo,
    read_checkpoint,
    read_dense_config,
    write_anchor,
    write_expert,
)
from flexctl.bundle.manifest import MANIFEST_FILE
from flexctl.bundle.mixture import hash_mixture, open_mixture, write_dense
from flexctl.bundle.names import name_an_anchor, name_an_expert
from flexctl.bundle.store import check_directory_target, check_file_target, place_of_work, require_space
from flexctl.errors import BundleError, UsageError
from flexctl.families import mixture_families
from flexctl.options import MODEL, OUTPUT, Config, argument, flag
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes, software_versions
from flexctl.steps.calibration import Calibration, calibrate
from flexctl.steps.checkpoint import warn_of_left_behind
from flexctl.steps.machine import machine_of

if TYPE_CHECKING:
    from flexctl.bundle.hashing import Advance
    from flexctl.bundle.mixture import Mixture, MixtureHashes

__all__ = ["AdoptConfig", "AdoptResult", "AdoptedExpert", "adopt"]

_SAMPLE_TOKENS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptConfig(Config):
    """What ``adopt`` is asked to do.

    MOE_DIR is a stock flex_olmo, mixtral or qwen3_moe checkpoint. One of its experts becomes the public one, and with
    all that they share the anchor; each other becomes an expert's file. Merged again they compute what MOE_DIR
    computes, and any of them can be removed. Weights are copied as bytes, in flat memory; what nobody can say any more
    (whose text, how much, under which terms) is left open. `data` is public text: with it the anchor can also be
    trained against.

    Examples:
        flexctl adopt mixtral-8x7b --names code,law,math,news,poems,sums,talk
        flexctl adopt allenai/FlexOlmo-7x7B-1T --names a,b,c,d,e,f --license Apache-2.0 -o flexolmo
    """

    mixture: Annotated[str, argument("MOE_DIR", "Directory or Hub id of a stock mixture-of-experts checkpoint.")]
    names: Annotated[
        tuple[str, ...],
        flag("NAME,...", "Names of its experts in their order, the public one left out; repeatable.", MODEL),
    ] = ()
    public_expert: Annotated[int, flag("K", "Index of the expert that becomes the public one.", MODEL, at_least=0)] = 0
    data: flags.Data = ()
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    license: flags.License = None
    name: Annotated[str | None, flag("NAME", "The anchor's name (default: the folder's of MOE_DIR).", OUTPUT)] = None
    output: Annotated[
        Path | None,
        flags.output("DIR", "Workspace to make, with anchor and experts in it (default: the one you are in)."),
    ] = None
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptedExpert:
    """One expert that was taken out: its file, and the index that it had."""

    name: str
    index: int
    path: Path
    digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptResult:
    """What ``adopt`` made.

    Attributes:
        path: The anchor's directory.
        digest: The anchor's; None after a dry run, as each expert's.
        name: The anchor's.
        model_type: Of the anchor.
        mixture_type: Of the checkpoint.
        mixture_digest: Of all its weights, the same however they are laid out and sharded.
        public_expert: Index of the expert that became the public one.
        experts: The others, by their index.
        num_experts_per_tok: What the checkpoint has; merge must be told to have the same model again.
        sample_tokens: Tokens in the anchor's public sample; 0 without public text.
    """

    path: Path
    digest: str | None
    name: str
    model_type: str
    mixture_type: str
    mixture_digest: str | None
    public_expert: int
    experts: tuple[AdoptedExpert, ...]
    num_experts_per_tok: int
    sample_tokens: int = 0
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The checkpoint, read and checked."""

    found: model.MixtureConfig
    mixture: Mixture


def adopt(config: AdoptConfig, reporter: Reporter = SILENT) -> AdoptResult:
    """Take a stock mixture of experts apart: write its anchor, and an expert's file for each of the others.

    Args:
        config: Which checkpoint, who is who, where to.
        reporter: Hears of progress, and of what the parts cannot do.

    Returns:
        What was made.

    Raises:
        UsageError: A name or setting is wrong, or a target exists.
        BundleError: The checkpoint is none that can be taken apart; the message names the field or tensor.
        FlexctlError: The disk has no room.
    """
    path = Path(config.mixture)
    if not path.is_dir():
        path = hub.fetch_checkpoint(config.mixture)
    source = _open(path)
    plan = _plan(config, source)
    _refuse_bad_settings(config, source, plan)
    warn_of_left_behind(path, reporter)
    if len(mixture_families(plan.mixture_type)) > 1:
        window = source.found.dense.get("sliding_window")
        reporter.note(f"the anchor is a {plan.model_type}, as sliding_window of this {plan.mixture_type} is {window}")
    if not config.data:
        reporter.note("no `data`: the parts can be merged, removed and run; nothing can be trained against the anchor")
    if config.dry_run:
        return plan
    sample = _sample(config, path, reporter) if config.data else None
    # A number that is none is found here, before anything is written.
    with reporter.progress("hashing", source.mixture.size, "bytes") as bar:
        hashes = hash_mixture(source.mixture, bar.advance)
    with training.working_folder(place_of_work(plan.path, "work"), reporter) as work:
        result = _make(config, source, plan, sample, hashes, work, reporter)
    _say_how_to_merge(config, result, reporter)
    return result


def _open(path: Path) -> _Source:
    if (path / MANIFEST_FILE).exists():
        raise BundleError(
            f"{path / MANIFEST_FILE}: is a bundle's manifest; adopt takes mixtures that flexctl did not merge",
            hint="flexctl remove takes experts out of a merged model",
        )
    found = model.read_mixture(read_dense_config(path), str(path / "config.json"))
    mixture = open_mixture(
        path,
        family=found.family,
        config=found.dense,
        num_experts=found.num_experts,
        shapes=model.dense_shapes(found.dense),
    )
    return _Source(found=found, mixture=mixture)


def _plan(config: AdoptConfig, source: _Source) -> AdoptResult:
    """Return what will be made, after checking who is who."""
    names = tuple(part.strip() for given in config.names for part in given.split(","))
    count = source.found.num_experts
    if config.public_expert >= count:
        raise UsageError(
            f"{config.public_expert} is no expert of {source.mixture.path}: it has {count}, from 0 to {count - 1}",
            field="public_expert",
        )
    closed = [index for index in range(count) if index != config.public_expert]
    if len(names) != len(closed):
        raise UsageError(
            f"{len(names)} for {len(closed)} experts: {source.mixture.path} has {count}, and expert "
            f"{config.public_expert} becomes the public one",
            hint="give one name for each other expert, in their order, with commas between",
            field="names",
        )
    for name in names:
        name_an_expert(name, "", field="names")
        if names.count(name) > 1:
            raise UsageError(f"{name!r} is there twice; each expert needs a name of its own", field="names")
    place = _place(config)
    experts = (
        AdoptedExpert(name=name, index=index, path=place.experts / f"{name}.st")
        for name, index in zip(names, closed, strict=True)
    )
    return AdoptResult(
        path=place.anchor,
        digest=None,
        name=name_an_anchor(config.name, Path(config.mixture).resolve().name),
        model_type=source.found.family.dense_type,
        mixture_type=source.found.family.moe_type,
        mixture_digest=None,
        public_expert=config.public_expert,
        experts=tuple(experts),
        num_experts_per_tok=min(source.found.num_experts_per_tok, count),
        dry_run=config.dry_run,
    )


def _place(config: AdoptConfig) -> workspace.Workspace:
    """Return where anchor and experts go."""
    if config.output is None:
        return workspace.find()
    root = config.output
    return workspace.Workspace(root=root, anchor=root / "anchor", experts=root / "experts", merged=root / "merged")


def _refuse_bad_settings(config: AdoptConfig, source: _Source, plan: AdoptResult) -> None:
    check_directory_target(plan.path, kind="anchor", overwrite=config.overwrite)
    for expert in plan.experts:
        check_file_target(expert.path, overwrite=config.overwrite)
    if source.found.num_experts == 1:
        raise BundleError(f"{source.mixture.path}: has one expert; there is nothing to take apart")
    training.refuse_busy(place_of_work(plan.path, "work"))
    machine_of(config)
    if config.data:
        text.refuse_unreadable(config.data, config.text_field)
    if config.data or any(source.mixture.path.glob("tokenizer*")):
        text.refuse_tokens_beyond(source.mixture.path, source.mixture.architecture.vocab_size)
    # The anchor is there twice for a while: as a checkpoint that runs, and as a bundle.
    require_space(plan.path, source.mixture.size + source.mixture.size_of_dense(config.public_expert))


def _make(
    config: AdoptConfig,
    source: _Source,
    plan: AdoptResult,
    sample: text.PublicSample | None,
    hashes: MixtureHashes,
    work: Path,
    reporter: Reporter,
) -> AdoptResult:
    mixture = source.mixture
    anchor, calibration = _write_anchor(config, source, plan, sample, work, reporter)
    closed = mixture.size - mixture.size_of_dense(config.public_expert)
    with reporter.progress("writing experts", closed, "bytes") as bar:
        experts = tuple(
            replace(expert, digest=_write_expert(config, source, hashes, anchor, expert, bar.advance))
            for expert in plan.experts
        )
    written = [*plan.path.iterdir(), *(expert.path for expert in experts)]
    return replace(
        plan,
        digest=anchor.digest,
        mixture_digest=hashes.digest,
        experts=experts,
        sample_tokens=calibration.sample["tokens"].shape[0] if calibration else 0,
        bytes_written=sum(item.stat().st_size for item in written),
        peak_rss_bytes=peak_rss_bytes(),
    )


def _write_anchor(
    config: AdoptConfig,
    source: _Source,
    plan: AdoptResult,
    sample: text.PublicSample | None,
    work: Path,
    reporter: Reporter,
) -> tuple[Anchor, Calibration | None]:
    checkpoint = work / "checkpoint"
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    size = source.mixture.size_of_dense(config.public_expert)
    with reporter.progress("writing the anchor", size, "bytes") as bar:
        write_dense(source.mixture, config.public_expert, checkpoint, source.found.dense, bar.advance)
    calibration = None
    if sample is not None:
        calibration = calibrate(
            checkpoint,
            sample=sample,
            special_as_text=config.special_as_text,
            seed=config.seed,
            machine=machine_of(config, read_checkpoint(checkpoint)),
            reporter=reporter,
        )
    anchor = write_anchor(
        plan.path,
        checkpoint=checkpoint,
        name=plan.name,
        moe_config=model.resolve_moe_config(source.found.dense),
        router_space=calibration.space if calibration else None,
        public_sample=calibration.sample if calibration else None,
        license=config.license,
        overwrite=config.overwrite,
    )
    return anchor, calibration


def _sample(config: AdoptConfig, checkpoint: Path, reporter: Reporter) -> text.PublicSample:
    reporter.note("drawing the public sample")
    tokenizer = model.load_tokenizer(checkpoint, special_as_text=config.special_as_text)
    documents = text.frame_documents(tokenizer, text.read_documents(config.data, config.text_field))
    return text.draw_sample(documents, _SAMPLE_TOKENS, config.seed)


def _write_expert(
    config: AdoptConfig,
    source: _Source,
    hashes: MixtureHashes,
    anchor: Anchor,
    expert: AdoptedExpert,
    advance: Advance,
) -> str:
    """Write one expert's file and return its digest."""
    found, rows = source.found, source.mixture.rows(expert.index, config.public_expert)
    written = write_expert(
        expert.path,
        anchor=anchor,
        name=expert.name,
        tensors={**hashes.experts[expert.index], "router.weight": rows},
        data=DataInfo(documents=None, tokens=None, bytes=None, license=config.license),
        training={
            "adopted": {
                "digest": hashes.digest,
                "model_type": found.family.moe_type,
                "expert": expert.index,
                "public_expert": config.public_expert,
                "num_experts": found.num_experts,
                "num_experts_per_tok": found.num_experts_per_tok,
            }
        },
        # Nothing is known of the rows but what they are.
        router=RouterInfo(kind="adopted", samples=0, encoder=None, trained=False, bias=(0.0,) * rows.shape[0]),
        run={"software": software_versions()},
        overwrite=config.overwrite,
        advance=advance,
    )
    return written.digest


def _say_how_to_merge(config: AdoptConfig, result: AdoptResult, reporter: Reporter) -> None:
    """Make the workspace's flexctl.toml, or say what the one that is there would need."""
    root = config.output or workspace.find().root
    if not workspace.start(root, f"\n[merge]\ntop_k = {result.num_experts_per_tok}\n"):
        reporter.note(f"merge with `top_k` {result.num_experts_per_tok}, as the checkpoint has it")
