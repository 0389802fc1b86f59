"""Make an expert of a dense checkpoint that was fine-tuned elsewhere from the same anchor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from flexctl import evaluation, flags, model, routing, text, workspace
from flexctl.bundle import (
    Anchor,
    DataInfo,
    RawTensor,
    RouterInfo,
    Weights,
    compare_dense,
    open_dense,
    read_dense_config,
    unread_weights,
    weights_beside,
    write_expert,
)
from flexctl.bundle.names import name_an_expert
from flexctl.bundle.store import check_file_target
from flexctl.errors import BundleError
from flexctl.hub import fetch_checkpoint
from flexctl.options import MODEL, Config, argument, switch
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes
from flexctl.steps.anchored import Anchored, open_anchored
from flexctl.steps.machine import machine_of
from flexctl.steps.router_rows import given_rows, measured_rows
from flexctl.steps.terms import data_info, warn_of_expired

if TYPE_CHECKING:
    from torch import nn

    from flexctl.bundle.fine_tuned import DenseChanges, DenseCheckpoint

__all__ = ["ImportExpertConfig", "ImportExpertResult", "import_expert"]

_SCORED_PASSAGES = 128
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportExpertConfig(Config):
    """What ``import_expert`` is asked to do.

    DENSE_DIR must have been fine-tuned from the anchor, and in its feed-forward weights alone. Where others
    moved too it is refused; `ffn_only` leaves those behind, and the losses shown say what that costs.
    Router rows come from `data`, the text that it was fine-tuned on or like it. Weights are copied as bytes;
    with `router` FILE.st no model is built at all, so nothing is scored and memory stays flat however large
    the checkpoint is.

    Examples:
        flexctl import-expert OLMo-2-1B-law --data law/
        flexctl import-expert acme/OLMo-2-1B-law --name law --data law.jsonl --ffn-only
    """

    dense: Annotated[
        str, argument("DENSE_DIR", "Directory or Hub id of a dense checkpoint fine-tuned from the anchor.")
    ]
    data: flags.Data
    name: flags.Name = None
    anchor: flags.Anchor = None
    ffn_only: Annotated[
        bool, switch("Take feed-forward weights although others moved; what those learned is lost.", MODEL)
    ] = False
    output: Annotated[
        Path | None, flags.output("FILE.st", "File to write (default: NAME.st among the workspace's experts).")
    ] = None
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    router: flags.Router = "discriminant"
    encoder: flags.Encoder = None
    own_covariance: flags.OwnCovariance = flags.OWN_COVARIANCE
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
class ImportExpertResult:
    """What ``import_expert`` made.

    Attributes:
        dense_digest: Of all weights of the checkpoint.
        changed: Feed-forward tensors that differ from the anchor's.
        moved: Other tensors that differ, which were left behind.
        frozen_verified: Nothing but the expert differs from the anchor, bit for bit.
        documents: Documents of ``data``.
        tokens: Tokens of ``data``.
        loss: Nats a token on passages of ``data`` that the rows were not made from, of the ``anchor``, of the
            checkpoint as it was (``dense``) and of the expert beside the public one (``pair``). The checkpoint may
            have trained on them. None when rows came from a file.
        bias: The router bias of each layer.
        warnings: What a person should look at, also told to the reporter.
    """

    path: Path
    digest: str | None
    name: str
    anchor_digest: str
    dense_digest: str
    changed: int
    moved: list[str]
    frozen_verified: bool
    documents: int = 0
    tokens: int = 0
    loss: dict[str, float] | None = None
    bias: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_written: int = 0
    peak_rss_bytes: int = 0
    dry_run: bool = False


def import_expert(config: ImportExpertConfig, reporter: Reporter = SILENT) -> ImportExpertResult:
    """Make an expert of a dense checkpoint's feed-forward weights and write its file.

    Weights are read and copied as bytes; models are built for router rows and losses alone, one at a time.

    Args:
        config: Which checkpoint, which text, where to.
        reporter: Hears of progress and of what is lost.

    Returns:
        What was made, and what is lost where other weights had moved too.

    Raises:
        UsageError: A setting or the data is wrong, or the target exists.
        BundleError: The anchor, the checkpoint or the router file is not valid, they do not belong together, or other
            weights than the feed-forward ones moved.
    """
    place = workspace.find()
    base = open_anchored(config, reporter)
    anchor = base.anchor
    name = name_an_expert(config.name, text.source_name(config.data[0]))
    target = config.output or place.experts / f"{name}.st"
    _refuse_bad_settings(config, anchor, target)
    warn_of_expired(config, reporter)
    config = replace(config, data=text.pinned(config.data))
    checkpoint = _open_checkpoint(config, anchor)
    if names := unread_weights(checkpoint.path):
        reporter.warn(f"{checkpoint.path}: {', '.join(names)}: not read, as Transformers does not load it")
    with reporter.progress("comparing with the anchor", checkpoint.size, "bytes") as bar:
        found = compare_dense(checkpoint, anchor, bar.advance)
    _refuse_misfit(config, checkpoint, found)
    result = ImportExpertResult(
        path=target,
        digest=None,
        name=name,
        anchor_digest=anchor.digest,
        dense_digest=found.digest,
        changed=len(found.changed),
        moved=list(found.moved),
        frozen_verified=not found.moved,
        dry_run=config.dry_run,
    )
    return result if config.dry_run else _make(config, base, checkpoint, found, result, reporter)


def _refuse_bad_settings(config: ImportExpertConfig, anchor: Anchor, target: Path) -> None:
    check_file_target(target, overwrite=config.overwrite)
    machine_of(config)
    given_rows(config, anchor)
    text.refuse_unreadable(config.data, config.text_field)


def _open_checkpoint(config: ImportExpertConfig, anchor: Anchor) -> DenseCheckpoint:
    path = Path(config.dense)
    if not path.is_dir():
        path = fetch_checkpoint(config.dense)
    model.refuse_other_architecture(read_dense_config(path), anchor.config, str(path / "config.json"))
    text.refuse_other_tokenizer(path, anchor.path)
    return open_dense(path, anchor)


def _refuse_misfit(config: ImportExpertConfig, checkpoint: DenseCheckpoint, found: DenseChanges) -> None:
    if found.moved and not config.ffn_only:
        raise BundleError(
            f"{checkpoint.path}: not only feed-forward weights moved from the anchor's: {_moved(found.moved)} too",
            hint="fine-tune the feed-forward weights alone, or give `ffn_only`, which loses what the others learned",
        )
    if not found.changed:
        raise BundleError(
            f"{checkpoint.path}: its feed-forward weights are all the anchor's own", hint="there is nothing to import"
        )


def _moved(names: Sequence[str]) -> str:
    """Return how many weights outside the feed-forward networks moved, and the first few."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} other weight{'s' if len(names) != 1 else ''} ({', '.join(names[:_SHOWN])}{more})"


def _make(
    config: ImportExpertConfig,
    base: Anchored,
    checkpoint: DenseCheckpoint,
    found: DenseChanges,
    result: ImportExpertResult,
    reporter: Reporter,
) -> ImportExpertResult:
    data = _data_info(config, base, reporter)
    rows, router, loss = _rows(config, base, checkpoint, reporter)
    warnings = _warnings(found.moved, loss)
    for warning in warnings:
        reporter.warn(warning)
    size = sum(piece.span.stop - piece.span.start for piece in found.feed_forward.values())
    with reporter.progress("writing", size + rows.data.nbytes, "bytes") as bar:
        expert = write_expert(
            result.path,
            anchor=base.anchor,
            name=result.name,
            tensors={**found.feed_forward, "router.weight": rows},
            data=data,
            training={
                "imported": {"digest": found.digest, "changed": len(found.changed), "moved": len(found.moved)},
                "seed": config.seed,
                "losses": loss,
                "frozen_verified": result.frozen_verified,
                **({"special_as_text": True} if config.special_as_text else {}),
            },
            router=router,
            run={"peak_rss_bytes": peak_rss_bytes()},
            overwrite=config.overwrite,
            advance=bar.advance,
        )
    return replace(
        result,
        digest=expert.digest,
        documents=data.documents or 0,
        tokens=data.tokens or 0,
        loss=loss,
        bias=list(router.bias),
        warnings=warnings,
        bytes_written=result.path.stat().st_size,
        peak_rss_bytes=peak_rss_bytes(),
    )


def _data_info(config: ImportExpertConfig, base: Anchored, reporter: Reporter) -> DataInfo:
    """Return the manifest's account of the text, after one pass over it."""
    documents = tokens = num_bytes = 0
    with reporter.progress("counting tokens", text.size_bytes(config.data), "bytes") as bar:
        for document in text.frame_documents(base.tokenizer, text.read_documents(config.data, config.text_field)):
            documents += 1
            tokens += len(document.tokens) - 1
            num_bytes += document.num_bytes
            bar.advance(document.num_bytes)
    return data_info(config, documents=documents, tokens=tokens, num_bytes=num_bytes)


def _rows(
    config: ImportExpertConfig, base: Anchored, checkpoint: DenseCheckpoint, reporter: Reporter
) -> tuple[RawTensor, RouterInfo, dict[str, float] | None]:
    """Return router rows, how they came about, and the losses where models were built for them."""
    if (given := given_rows(config, base.anchor)) is not None:
        return given.rows, given.info, None
    own, unseen = text.sample_halves(text.read_documents(config.data, config.text_field), routing.PASSAGES, config.seed)
    reporter.note(f"measuring router inputs for {config.router} rows")
    weights = base.anchor.weights()
    machine = machine_of(config, weights.shared)
    reader = machine.build(weights)
    found, info = measured_rows(
        config,
        base,
        reader,
        own,
        lambda: text.sample_halves(base.sample.texts(base.tokenizer), routing.PASSAGES, config.seed)[0],
        reporter,
    )
    documents = list(text.frame_documents(base.tokenizer, unseen[:_SCORED_PASSAGES]))
    losses = _loss(reader, "anchor", base, documents, reporter)
    del reader
    rows = RawTensor(*model.to_bytes(found.rows))
    for name, others in _imported(base.anchor, checkpoint, rows):
        losses |= _loss(machine.build(others), name, base, documents, reporter)
    return rows, info, losses


def _imported(anchor: Anchor, checkpoint: DenseCheckpoint, rows: RawTensor) -> Iterator[tuple[str, Weights]]:
    """Yield the checkpoint as it was, and its networks beside the public ones."""
    yield "dense", checkpoint.weights(anchor)
    tensors = {name: span.read() for name, span in checkpoint.feed_forward(anchor).items()}
    yield "pair", weights_beside(anchor, "imported", tensors, rows)


def _loss(
    net: nn.Module, name: str, base: Anchored, documents: Sequence[text.Framed], reporter: Reporter
) -> dict[str, float]:
    """Return a model's nats a token, by its name."""
    seq_len = evaluation.window_length(base.anchor.config, None)
    return evaluation.held_out_losses(net, {name: documents}, seq_len=seq_len, reporter=reporter)


def _warnings(moved: Sequence[str], loss: dict[str, float] | None) -> list[str]:
    found = []
    if moved:
        lost = f"{_moved(moved)} moved and stayed behind, and what they learned is lost"
        if loss is None:
            found.append(f"{lost}; how much was not measured, as its rows came from a file: see flexctl evaluate")
        else:
            found.append(f"{lost}: loss {loss['dense']:.3f} as it was, {loss['pair']:.3f} beside the anchor's weights")
    if loss is not None and loss["pair"] >= loss["anchor"]:
        found.append(f"the expert is no help on its own text: loss {loss['pair']:.3f}, anchor {loss['anchor']:.3f}")
    return found
