"""Make a low-rank expert of a full one: its difference to the public expert, cut to the ranks that pay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flexctl import evaluation, flags, model, text, training
from flexctl.bundle import (
    PUBLIC,
    Anchor,
    Expert,
    RawTensor,
    Weights,
    open_expert,
    pair_weights,
    write_expert,
)
from flexctl.bundle.hashing import check_tensors
from flexctl.bundle.lowrank import most_rank, refuse_useless_rank
from flexctl.bundle.store import check_file_target
from flexctl.errors import BundleError, UsageError
from flexctl.families import feed_forward_names
from flexctl.options import TRAINING, Config, argument, flag
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.machine import machine_of

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = ["CompressConfig", "CompressResult", "compress"]

_SIZE = 0.15
_TOKENS = 65_536
_GAIN_TOKENS = 16_384
_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressConfig(Config):
    """What ``compress`` is asked to do.

    Cuts its difference to the public expert to a rank that is given, or to ranks that are chosen matrix
    by matrix on `data` within a size. `data` is best some that the expert was not trained on; at most 65,536
    tokens of it are used. The copy keeps name and rights and merges as the expert does.

    Examples:
        flexctl compress experts/law.st --data heldout/law
        flexctl compress experts/law.st --data heldout/law --rank 16 -o law-small.st
    """

    expert: Annotated[Path, argument("EXPERT", "The expert's file (.st).")]
    data: flags.Data
    rank: Annotated[
        int | str, flag("R|auto", "Rank of every matrix; auto chooses one for each on `data`.", TRAINING, above=0)
    ] = "auto"
    size: Annotated[
        float | None,
        flag(
            "SHARE", "With auto: share of the full matrices' bytes to take (default: 0.15).", TRAINING, above=0, below=1
        ),
    ] = None
    output: Annotated[
        Path | None, flags.output("FILE.st", "File to write (default: NAME-rR.st or NAME-auto.st beside EXPERT).")
    ] = None
    anchor: flags.Anchor = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressResult:
    """What ``compress`` made.

    Attributes:
        parent: Digest of the expert that it was made from.
        rank: The highest of all matrices.
        ranks: {gate, up, down} of each layer.
        bytes_before: Size of the expert's file.
        bytes_written: Size of the new one.
        held_out: ``{"own" and "public": {"anchor", "before", "after"}}``, nats a token, of the anchor and of the pair
            with the expert as it was and as it is, after rounding. With auto, own is the half of the documents that
            ranks were not chosen on.
    """

    path: Path
    digest: str | None
    name: str
    parent: str
    rank: int | None = None
    ranks: list[dict[str, int]] = field(default_factory=list)
    bytes_before: int = 0
    bytes_written: int = 0
    held_out: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be made smaller, how, and where the result goes."""

    config: CompressConfig
    base: Anchored
    expert: Expert
    target: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """The pair, ready to be scored.

    Attributes:
        choosing: The owner's documents that ranks are chosen on.
        parts: Documents to report on, by name.
        seq_len: Window length.
    """

    model: nn.Module
    weights: Weights
    choosing: Sequence[text.Framed]
    parts: Mapping[str, Sequence[text.Framed]]
    seq_len: int

    def losses(self, reporter: Reporter) -> dict[str, float]:
        """Return the model's loss on every part, nats a token."""
        return evaluation.held_out_losses(self.model, self.parts, seq_len=self.seq_len, reporter=reporter)

    def choosing_loss(self, reporter: Reporter) -> float:
        """Return the model's loss on the documents that ranks are chosen on, nats a token."""
        parts = {"to choose by": self.choosing}
        (loss,) = evaluation.held_out_losses(self.model, parts, seq_len=self.seq_len, reporter=reporter).values()
        return loss


def compress(config: CompressConfig, reporter: Reporter = SILENT) -> CompressResult:
    """Write a low-rank copy of an expert. Name, rows, rights and training stay; ``parents`` names the original.

    Args:
        config: Which expert, how small, on which text.
        reporter: Hears of progress.

    Returns:
        What was made, and the losses before and after.

    Raises:
        UsageError: A setting or the data is wrong, the target exists, or the result would not be smaller.
        BundleError: Anchor or expert is not valid, or they do not belong together.
    """
    base = open_anchored(config, reporter)
    anchor = base.anchor
    expert = open_expert(config.expert)
    target = config.output or config.expert.with_name(f"{config.expert.stem}-{_way(config)}.st")
    weights = _checked(config, anchor, expert, target)
    if config.dry_run:
        return CompressResult(path=target, digest=None, name=expert.manifest.name, parent=expert.digest, dry_run=True)
    task = _Task(config=config, base=base, expert=expert, target=target)
    setup = _set_up(config, base, weights)
    held_out = _before(setup, reporter)
    factors = _factors(task, setup, reporter)
    ranks = _ranks(task, setup, factors, reporter)
    tensors = _cut(anchor, setup, factors, ranks)
    for part, loss in setup.losses(reporter).items():
        held_out[part]["after"] = loss
    written = _write(task, tensors, ranks, held_out, reporter)
    return CompressResult(
        path=target,
        digest=written.digest,
        name=expert.manifest.name,
        parent=expert.digest,
        rank=written.manifest.rank,
        ranks=_by_layer(ranks),
        bytes_before=config.expert.stat().st_size,
        bytes_written=target.stat().st_size,
        held_out=held_out,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _way(config: CompressConfig) -> str:
    return "auto" if config.rank == "auto" else f"r{config.rank}"


def _checked(config: CompressConfig, anchor: Anchor, expert: Expert, target: Path) -> Weights:
    """Return the weights of the pair after refusing what cannot be done."""
    check_file_target(target, overwrite=config.overwrite)
    machine_of(config)
    if config.size is not None and config.rank != "auto":
        raise UsageError(f"rank {config.rank} decides the size", hint="give one of `rank` and `size`", field="size")
    if isinstance(config.rank, int):
        refuse_useless_rank(config.rank, anchor.manifest.architecture)
    elif config.rank != "auto":
        raise UsageError(f"{config.rank!r} is neither a number nor auto", field="rank")
    else:
        _components(config, anchor)
    weights = pair_weights(anchor, expert)
    if expert.manifest.rank is not None:
        raise UsageError(
            f"{expert.path}: is low-rank already, of rank {expert.manifest.rank}",
            hint="compress the full expert that it was made from, or train one with a lower `rank`",
        )
    text.refuse_unreadable(config.data, config.text_field)
    for problem in check_tensors(expert.path, expert.spans, expert.manifest.tensors):
        raise BundleError(problem, hint="fetch the file again")
    return weights


def _components(config: CompressConfig, anchor: Anchor) -> int:
    """Return how many rows all A together may have within ``size``; each costs the same, whatever its matrix."""
    size = config.size or _SIZE
    sizes = anchor.manifest.architecture
    full = sizes.hidden_size * sizes.intermediate_size / (sizes.hidden_size + sizes.intermediate_size)
    matrices = 3 * sizes.num_hidden_layers
    components = int(size * full * matrices)
    if components < matrices:
        raise UsageError(
            f"{size} is too small for rank 1 in every matrix, which takes {1 / full:.4f}",
            hint="give a larger share",
            field="size",
        )
    return components


def _set_up(config: CompressConfig, base: Anchored, weights: Weights) -> _Setup:
    framed = text.frame_documents(base.tokenizer, text.read_documents(config.data, config.text_field))
    own = text.draw_sample(framed, _TOKENS, config.seed).documents
    apart = config.rank == "auto" and len(own) > 1
    return _Setup(
        model=machine_of(config, weights.shared).build(weights),
        weights=weights,
        choosing=own[::2] if apart else own,
        parts={
            "own": own[1::2] if apart else own,
            "public": text.draw_sample(base.sample.held_out, _TOKENS, config.seed).documents,
        },
        seq_len=evaluation.window_length(weights.dense_config, None),
    )


def _before(setup: _Setup, reporter: Reporter) -> dict[str, dict[str, float]]:
    model.exclude(setup.model, [1])
    anchor = setup.losses(reporter)
    model.exclude(setup.model, [])
    pair = setup.losses(reporter)
    return {part: {"anchor": anchor[part], "before": pair[part]} for part in anchor}


def _factors(task: _Task, setup: _Setup, reporter: Reporter) -> training.Factors:
    """Return A and B of every difference, as many components as any rank may keep, one matrix after the other."""
    rank = task.config.rank
    most = rank if isinstance(rank, int) else most_rank(task.base.anchor.manifest.architecture)
    public, own = setup.weights.experts.values()
    factors = {}
    with reporter.progress("decomposing", len(own), "matrices") as bar:
        for name, matrix in own.items():
            a, b = model.decompose(model.to_torch(matrix).float() - model.to_torch(public[name]).float())
            factors[name] = a[:most].clone(), b[:, :most].clone()
            bar.advance(1)
    return factors


def _ranks(task: _Task, setup: _Setup, factors: training.Factors, reporter: Reporter) -> dict[str, int]:
    if isinstance(task.config.rank, int):
        return dict.fromkeys(factors, task.config.rank)
    return training.choose_ranks(
        setup.model,
        factors,
        _components(task.config, task.base.anchor),
        list(_sequences(setup)),
        partial(setup.choosing_loss, reporter),
        reporter,
    )


def _sequences(setup: _Setup) -> Iterator[Tensor]:
    """Yield batches of token ids to measure gains on, (B, S + 1)."""
    import numpy as np
    import torch

    stream = text.PublicSample(setup.choosing).stream()
    seq_len = min(setup.seq_len, len(stream) - 1)
    count = max(1, min(stream.num_sequences(seq_len), _GAIN_TOKENS // seq_len))
    sequences = torch.from_numpy(np.stack([stream.sequence(i, seq_len) for i in range(count)]))
    yield from sequences.to(next(setup.model.parameters()).device).split(max(1, _BATCH_TOKENS // seq_len))


def _cut(anchor: Anchor, setup: _Setup, factors: training.Factors, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the tensors of the new file, and give the model the matrices that they stand for."""
    import torch

    dtype = model.DTYPES[anchor.manifest.architecture.dtype]
    public, matrices = setup.weights.experts[PUBLIC], training.expert_matrices(setup.model, 1)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        a, b = (part.to(dtype).contiguous() for part in (a[: ranks[name]], b[:, : ranks[name]]))
        tensors |= {f"{name}.lora_A": a, f"{name}.lora_B": b}
        with torch.no_grad():
            matrices[name].copy_(model.expand(model.to_torch(public[name]), a, b))
    return tensors


def _write(
    task: _Task,
    tensors: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    held_out: Mapping[str, Any],
    reporter: Reporter,
) -> Expert:
    """Write the new expert. Ranks that were chosen on the owner's text are no part of a privacy guarantee."""
    config, expert, manifest = task.config, task.expert, task.expert.manifest
    if manifest.privacy is not None and config.rank == "auto":
        reporter.warn("the ranks were chosen on the owner's text, so the new expert claims no privacy guarantee")
    return write_expert(
        task.target,
        anchor=task.base.anchor,
        name=manifest.name,
        tensors={name: RawTensor(*model.to_bytes(tensor)) for name, tensor in tensors.items()}
        | {"router.weight": expert.router()},
        data=manifest.data,
        training=manifest.training,
        router=manifest.router,
        privacy=None if config.rank == "auto" else manifest.privacy,
        rank=max(ranks.values()),
        parents=(expert.digest,),
        run={"held_out": held_out, "peak_rss_bytes": peak_rss_bytes()},
        overwrite=config.overwrite,
    )


def _by_layer(ranks: Mapping[str, int]) -> list[dict[str, int]]:
    layers: list[dict[str, int]] = [{} for _ in range(len(ranks) // 3)]
    for layer, projection, name in feed_forward_names(len(layers)):
        layers[layer][projection.removesuffix("_proj")] = ranks[name]
    return layers
