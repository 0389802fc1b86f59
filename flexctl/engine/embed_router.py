"""Make router rows from an owner's text, alone or into a copy of an expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flexctl import flags, model, routing, text
from flexctl.bundle import (
    Anchor,
    Expert,
    RawTensor,
    RouterInfo,
    open_expert,
    reroute_expert,
    slug,
    write_router_file,
)
from flexctl.bundle.expert import check_fits
from flexctl.bundle.store import check_file_target
from flexctl.errors import UsageError
from flexctl.options import ROUTER, Config, flag
from flexctl.routing.overlap import Routing
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.machine import machine_of
from flexctl.steps.overlap import expected_between, warn_of_overlaps
from flexctl.steps.router_rows import measured_rows, recipe_of
from flexctl.steps.sources import localise

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = ["EmbedRouterConfig", "EmbedRouterResult", "embed_router"]

_CLOSE = 0.5
_WEAK = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedRouterConfig(Config):
    """What ``embed_router`` is asked to do.

    They go to a file, for train-expert's `router`; with `expert`, into a copy of that expert.
    Warns where the text cannot be told from public text, or where the noise of the rows is large.

    Examples:
        flexctl embed-router --data law/ -o law-rows.st
        flexctl embed-router --data law/ --expert experts/law.st -o law-2.st
    """

    data: flags.Data
    output: Annotated[
        Path | None, flags.output("FILE.st", "File to write; router.st unless `expert` asks for one.")
    ] = None
    expert: Annotated[
        Path | None,
        flag("FILE.st", "Write a copy of this expert, here or hf://OWNER/NAME, with the new rows.", ROUTER),
    ] = None
    against: Annotated[
        tuple[Path, ...],
        flag("FILE.st", "Report the overlap with this expert's rows; may be hf://OWNER/NAME; repeatable.", ROUTER),
    ] = ()
    anchor: flags.Anchor = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    router: Annotated[str, flag("KIND", "How rows are made: discriminant, hidden or encoder.", ROUTER)] = "discriminant"
    encoder: flags.Encoder = None
    own_covariance: flags.OwnCovariance = flags.OWN_COVARIANCE
    seed: flags.Seed = 0
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """How one layer's row does.

    Attributes:
        layer: Index.
        bias: Mean logit on public text, at most 0.
        distance: Squared Mahalanobis distance of the owner's mean from public, sample noise taken off.
        noise: Standard deviation that the logit gets from the constant direction not being constant.
        accuracy: Share of held-out tokens that the sign of the logit puts right, owner's and public counted equally.
        overlap: Expert -> share of the owner's held-out tokens on which that expert's logit is above the new row's.
    """

    layer: int
    bias: float
    distance: float
    noise: float
    accuracy: float
    overlap: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedRouterResult:
    """What ``embed_router`` made.

    Attributes:
        documents: Passages that the rows were made from.
        router: Kind of row.
        layers: A report a layer.
        expected_routing: Text of whom -> expert -> share of the router's probability that is expected, from the rows
            of ``against`` and the new ones alone. Beside an expert of their name, the new ones are
            called ``NAME (new)``.
        warnings: What a person should look at, also told to the reporter.
    """

    path: Path
    digest: str | None
    name: str
    documents: int
    router: str
    encoder: str | None
    hidden_size: int
    layers: list[LayerReport] = field(default_factory=list)
    expected_routing: Routing = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    dry_run: bool = False


def embed_router(config: EmbedRouterConfig, reporter: Reporter = SILENT) -> EmbedRouterResult:
    """Make router rows from sample texts and write them.

    Args:
        config: Which texts, which kind, where to.
        reporter: Hears of progress.

    Returns:
        What was made and how well it tells the owner's text from public text.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The anchor or an expert is not valid, or they do not belong together.
    """
    base = open_anchored(config, reporter)
    anchor = base.anchor
    expert = None if config.expert is None else _expert_of(localise(config.expert, reporter), anchor)
    rivals = _rivals(config, anchor, reporter)
    target = _target(config)
    text.refuse_unreadable(config.data, config.text_field)
    name = expert.manifest.name if expert is not None else slug(target.stem)
    rows, info, layers = _measure(config, base, rivals, reporter)
    raw = RawTensor(*model.to_bytes(rows.rows))
    warnings = _warnings(layers)
    for warning in warnings:
        reporter.warn(warning)
    called = f"{name} (new)" if name in rivals else name
    routing = expected_between(anchor, {rival: expert.router() for rival, expert in rivals.items()} | {called: raw})
    warnings += warn_of_overlaps(routing, reporter)
    digest = None if config.dry_run else _write(config, anchor, expert, name, target, raw, info)
    return EmbedRouterResult(
        path=target,
        digest=digest,
        name=name,
        documents=info.samples,
        router=config.router,
        encoder=info.encoder,
        hidden_size=rows.rows.shape[1],
        layers=layers,
        expected_routing=routing,
        warnings=warnings,
        dry_run=config.dry_run,
    )


def _write(
    config: EmbedRouterConfig,
    anchor: Anchor,
    expert: Expert | None,
    name: str,
    target: Path,
    rows: RawTensor,
    info: RouterInfo,
) -> str:
    """Write a router file, or a copy of the expert with these rows."""
    if expert is None:
        written = write_router_file(
            target, anchor=anchor, name=name, rows=rows, router=info, overwrite=config.overwrite
        )
        return written.digest
    copy = reroute_expert(target, anchor=anchor, expert=expert, rows=rows, router=info, overwrite=config.overwrite)
    return copy.digest


def _target(config: EmbedRouterConfig) -> Path:
    if config.expert is not None and config.output is None:
        raise UsageError("no `output` given for the copy", hint="add `output`", field="expert")
    target = config.output or Path("router.st")
    check_file_target(target, overwrite=config.overwrite)
    return target


def _expert_of(path: Path, anchor: Anchor) -> Expert:
    expert = open_expert(path)
    check_fits(expert, anchor.manifest.ref, anchor.manifest.architecture)
    return expert


def _rivals(config: EmbedRouterConfig, anchor: Anchor, reporter: Reporter) -> dict[str, Expert]:
    """Return the experts of ``against`` by name."""
    found: dict[str, Expert] = {}
    for path in config.against:
        expert = _expert_of(localise(path, reporter), anchor)
        if (name := expert.manifest.name) in found:
            raise UsageError(
                f"{path}: name is {name!r}, and so is that of {found[name].path}",
                hint="give one of them at a time",
                field="against",
            )
        found[name] = expert
    return found


def _measure(
    config: EmbedRouterConfig, base: Anchored, rivals: Mapping[str, Expert], reporter: Reporter
) -> tuple[routing.Rows, RouterInfo, list[LayerReport]]:
    recipe_of(config)
    weights = base.anchor.weights()
    reader = machine_of(config, weights.shared).build(weights)
    reporter.note(f"measuring router inputs for {config.router} rows")
    own, own_unseen = text.sample_halves(
        text.read_documents(config.data, config.text_field), routing.PASSAGES, config.seed
    )
    public, public_unseen = text.sample_halves(base.sample.texts(base.tokenizer), routing.PASSAGES, config.seed)
    rows, info = measured_rows(config, base, reader, own, lambda: public, reporter)
    ours, theirs = (text.frame_passages(base.tokenizer, passages) for passages in (own_unseen, public_unseen))
    others = {name: model.to_torch(expert.router()) for name, expert in rivals.items()}
    return rows, info, _report(reader, rows, ours, theirs, others)


def _report(
    model: nn.Module, rows: routing.Rows, own: Sequence[Tensor], public: Sequence[Tensor], rivals: dict[str, Tensor]
) -> list[LayerReport]:
    names = list(rivals)
    stacked = [rows.rows, *rivals.values()]
    ours, theirs = routing.row_logits(model, stacked, own), routing.row_logits(model, stacked, public)
    layers = []
    for layer, (mine, publics) in enumerate(zip(ours, theirs, strict=True)):
        right = float((mine[:, 0] > 0).float().mean() + (publics[:, 0] <= 0).float().mean()) / 2
        above = (mine[:, 1:] > mine[:, :1]).float().mean(dim=0).tolist()
        layers.append(
            LayerReport(
                layer=layer,
                bias=float(rows.bias[layer]),
                distance=float(rows.distance[layer]),
                noise=float(rows.noise[layer]),
                accuracy=right,
                overlap=dict(zip(names, above, strict=True)),
            )
        )
    return layers


def _warnings(layers: Sequence[LayerReport]) -> list[str]:
    found = []
    best = max(layer.accuracy for layer in layers)
    if best < _WEAK:
        found.append(f"the rows hardly tell this text from public text (best layer: {best:.2f} of tokens right)")
    for name in layers[0].overlap:
        share = sum(layer.overlap[name] for layer in layers) / len(layers)
        if share > _CLOSE:
            found.append(f"overlap: {name} would take {share:.0%} of this text's tokens from the new expert")
    return found
