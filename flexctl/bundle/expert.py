"""Experts: one owner's feed-forward weights and router rows, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.codec import indented_json
from flexctl.bundle.copying import append_range
from flexctl.bundle.hashing import Advance, StoredTensor, hash_raw, hash_spans, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import LOW_RANK_PARTS, ROUTER_TENSOR, expert_head, expert_layout
from flexctl.bundle.lowrank import expand_bytes
from flexctl.bundle.manifest import (
    MANIFEST_KEY,
    AnchorRef,
    Architecture,
    DataInfo,
    ExpertManifest,
    Manifest,
    PrivacyInfo,
    RouterInfo,
    TensorInfo,
    digest_of,
    write_manifest,
)
from flexctl.bundle.names import PUBLIC, check_expert_name, shown
from flexctl.bundle.store import new_file, require_space
from flexctl.bundle.tensors import RawTensor, Span, TensorType, Typed, check_agreement, is_finite, size_of
from flexctl.bundle.validation import read_manifest, refuse_folder_of_experts
from flexctl.bundle.weights import Weights
from flexctl.errors import BundleError, UsageError
from flexctl.families import family_of, feed_forward_names
from flexctl.runtime import software_versions

__all__ = [
    "Expert",
    "check_fits",
    "embedded_manifest",
    "open_expert",
    "pair_weights",
    "reroute_expert",
    "weights_beside",
    "write_expert",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """An expert on disk, its header read and checked, its bytes not yet.

    Attributes:
        path: File.
        manifest: What it says about itself.
        manifest_text: The same as the text that stands in the file.
        spans: Where every tensor lies, in the order of the format.
    """

    path: Path
    manifest: ExpertManifest
    manifest_text: str
    spans: Mapping[str, Span]

    @property
    def digest(self) -> str:
        """What binds its tensors."""
        return self.manifest.digest

    def tensor(self, name: str) -> RawTensor:
        """Return a tensor by its name in the file, memory-mapped."""
        return self.spans[name].read()

    def router(self) -> RawTensor:
        """Return its router rows, (num_hidden_layers, hidden_size), F32."""
        return self.tensor(ROUTER_TENSOR)

    def feed_forward(self, anchor: Anchor) -> dict[str, RawTensor]:
        """Return its full feed-forward tensors by expert tensor name; a low-rank expert's are computed.

        Args:
            anchor: The one it was made for.
        """
        names = [name for _, _, name in feed_forward_names(self.manifest.architecture.num_hidden_layers)]
        if self.manifest.rank is None:
            return {name: self.tensor(name) for name in names}
        public = anchor.feed_forward()
        return {name: self._expanded(name, public[name]) for name in names}

    def _expanded(self, name: str, base: Span) -> RawTensor:
        blocks = list(expand_bytes(base, self.spans[f"{name}.lora_A"], self.spans[f"{name}.lora_B"]))
        return RawTensor(base.dtype, base.shape, np.concatenate(blocks))


def open_expert(path: Path) -> Expert:
    """Return the expert in a file of any valid layout, after checking header and manifest against each other.

    The tensors' bytes are verify's and merge's to hash.

    Raises:
        UsageError: There is no such file.
        BundleError: It is no expert, or tensors are missing, extra, misshaped or of another dtype than they must be.
    """
    manifest, text, spans = embedded_manifest(path)
    if not isinstance(manifest, ExpertManifest):
        raise BundleError(f"{path}: kind is {manifest.kind!r}; expected 'expert'")
    layout = _checked_layout(spans, manifest.architecture, manifest.rank, path)
    return Expert(path=path, manifest=manifest, manifest_text=text, spans={name: spans[name] for name in layout})


def write_expert(
    path: Path,
    *,
    anchor: Anchor,
    name: str,
    tensors: Mapping[str, RawTensor | StoredTensor],
    data: DataInfo,
    training: Mapping[str, Any],
    router: RouterInfo,
    run: Mapping[str, Any],
    overwrite: bool,
    privacy: PrivacyInfo | None = None,
    rank: int | None = None,
    parents: Sequence[str] = (),
    asked: Mapping[str, Any] | None = None,
    advance: Advance = silent,
) -> Expert:
    """Write an expert's file, and what varies from run to run beside it.

    Args:
        path: File to write, ``NAME.st``; ``NAME.run.json`` goes beside it.
        anchor: The one it was trained against.
        name: The expert's name.
        tensors: All of ``expert_layout``, in any order; dtype of the anchor's, ``router.weight`` F32. One that lies in
            another file is copied from there and never in memory.
        data: What the owner says about the text.
        training: Settings, seed, steps, tokens, losses, frozen_verified. No paths, host names or times.
        router: How the rows came about.
        run: What no digest covers: times, machine, speed.
        overwrite: Whether an expert that exists may be replaced.
        privacy: The guarantee, where there is one.
        rank: Of a low-rank expert, the highest of its matrices.
        parents: Digests of the experts that this one was made from.
        asked: What a run asked for, which stands in run.json with the digest of what came of it.
        advance: Told the bytes that are written and proven.

    Returns:
        The expert as opened again from disk, its bytes compared with the manifest.

    Raises:
        BundleError: A tensor is missing, extra, misshaped, of the wrong dtype, not finite, or not what was promised.
        FlexctlError: The disk has no room.
    """
    architecture = anchor.manifest.architecture
    typed = {
        tensor_name: tensor.info if isinstance(tensor, StoredTensor) else tensor
        for tensor_name, tensor in tensors.items()
    }
    layout = _checked_layout(typed, architecture, rank, path)
    infos = {tensor_name: _info(tensors[tensor_name], f"{path}: tensor {tensor_name}") for tensor_name in layout}
    require_space(path, sum(map(size_of, layout.values())))
    manifest = ExpertManifest(
        name=check_expert_name(name, f"{path}: name"),
        digest=digest_of(infos),
        anchor=anchor.manifest.ref,
        architecture=architecture,
        data=data,
        training=dict(training),
        router=router,
        privacy=privacy,
        rank=rank,
        parents=tuple(parents),
        software=software_versions(),
        tensors=infos,
    )
    text = write_manifest(manifest).decode("utf-8")
    head = expert_head(family_of(anchor.manifest.model_type), layout, text)
    bound = {} if asked is None else {"digest": manifest.digest, "asked": asked}
    account = new_file(path.with_suffix(".run.json"), overwrite=True)
    # All is on the disk before either takes its place.
    with account as account_file, new_file(path, overwrite=overwrite) as temporary:
        account_file.write_bytes(indented_json({**run, **bound}))
        with temporary.open("xb") as file:
            file.write(head)
            for tensor_name in layout:
                _append(tensors[tensor_name], file)
        for tensor_name, found, finite in hash_spans(temporary, open_expert(temporary).spans, advance):
            if found != infos[tensor_name] or not finite:
                raise _broken(tensors[tensor_name], f"{path}: tensor {tensor_name}", finite)
    return open_expert(path)


def reroute_expert(
    path: Path, *, anchor: Anchor, expert: Expert, rows: RawTensor, router: RouterInfo, overwrite: bool
) -> Expert:
    """Write a copy of an expert with other router rows; its privacy guarantee, which did not cover them, is dropped.

    Args:
        path: File to write, ``NAME.st``.
        anchor: The one it was trained against.
        expert: The one to copy, which becomes the copy's parent.
        rows: (num_hidden_layers, hidden_size), F32.
        router: How the rows came about.
        overwrite: Whether an expert that exists may be replaced.

    Raises:
        BundleError: The rows are misshaped, of another dtype, or not finite, or the expert's bytes are not its
            manifest's.
    """
    pieces = {key: StoredTensor(key, span, expert.manifest.tensors[key]) for key, span in expert.spans.items()}
    return write_expert(
        path,
        anchor=anchor,
        name=expert.manifest.name,
        tensors={**pieces, ROUTER_TENSOR: rows},
        data=expert.manifest.data,
        training=expert.manifest.training,
        router=router,
        rank=expert.manifest.rank,
        parents=(expert.digest,),
        run={},
        overwrite=overwrite,
    )


def _info(tensor: RawTensor | StoredTensor, where: str) -> TensorInfo:
    if isinstance(tensor, StoredTensor):
        return tensor.info
    if not is_finite(tensor.dtype, tensor.data):
        raise BundleError(f"{where}: holds NaN or infinity", hint="train with a lower `lr`")
    return hash_raw(tensor)


def _broken(tensor: RawTensor | StoredTensor, where: str, finite: bool) -> BundleError:
    """Return what is wrong with a tensor that was not found in the file as it should be."""
    if isinstance(tensor, StoredTensor):
        where, hint = f"{tensor.span.path}: tensor {tensor.name}", "the file was changed, fetch it again"
    else:
        hint = "the disk did not keep what was written"
    return BundleError(
        f"{where}: {'its bytes are not those promised' if finite else 'holds NaN or infinity'}", hint=hint
    )


def _append(tensor: RawTensor | StoredTensor, output: BinaryIO) -> None:
    if isinstance(tensor, StoredTensor):
        append_range(tensor.span.path, tensor.span.start, output, tensor.span.stop - tensor.span.start)
    else:
        output.write(tensor.view())


def pair_weights(anchor: Anchor, expert: Expert) -> Weights:
    """Return the model of the public expert and one other, both active on every token.

    Args:
        anchor: The one that the expert was made for.
        expert: The other.

    Raises:
        BundleError: The expert was made for another anchor.
    """
    check_fits(expert, anchor.manifest.ref, anchor.manifest.architecture)
    return weights_beside(anchor, expert.manifest.name, expert.feed_forward(anchor), expert.router())


def weights_beside(anchor: Anchor, name: str, feed_forward: Mapping[str, RawTensor], rows: RawTensor) -> Weights:
    """Return the model of the public expert and one that may not be a file yet, both active on every token.

    Args:
        anchor: The one that the other was made for.
        name: The other's.
        feed_forward: Its tensors by expert tensor name.
        rows: Its router rows, (num_hidden_layers, hidden_size), F32.
    """
    alone = anchor.weights()
    router = tuple(
        RawTensor("F32", (2, zeros.shape[1]), np.concatenate([zeros.data, row]))
        for zeros, row in zip(alone.router, rows.data.reshape(len(alone.router), -1), strict=True)
    )
    return Weights(
        dense_config=alone.dense_config,
        shared=alone.shared,
        experts={PUBLIC: alone.experts[PUBLIC], name: feed_forward},
        router=router,
        num_experts_per_tok=2,
    )


def check_fits(expert: Expert, anchor: AnchorRef, architecture: Architecture) -> None:
    """Refuse an expert that was made for another anchor.

    Args:
        expert: The expert.
        anchor: The one it must have been made for.
        architecture: That anchor's sizes.

    Raises:
        BundleError: Its anchor's digest, which covers weights, config and tokenizer, or its sizes differ.
    """
    made_for = expert.manifest.anchor
    if made_for.digest != anchor.digest:
        raise BundleError(
            f"{expert.path}: anchor.digest is {made_for.digest} ({made_for.name}); "
            f"expected {anchor.digest} ({anchor.name})",
            hint="an expert fits only the very anchor it was trained against: same weights, config, tokenizer",
        )
    if expert.manifest.architecture != architecture:
        found = shown(expert.manifest.architecture)
        raise BundleError(f"{expert.path}: architecture is {found}; expected {shown(architecture)}")


def _checked_layout(
    tensors: Mapping[str, Typed], architecture: Architecture, rank: int | None, path: Path
) -> dict[str, TensorType]:
    """Return the layout of an expert's file, whose tensors must be those of its architecture and rank.

    Raises:
        BundleError: They are not; the message names the first.
    """
    layout = expert_layout(architecture, rank, tensors)
    check_agreement(tensors, layout, str(path))
    ranks = [tensor.shape[0] for name, tensor in layout.items() if name.endswith(LOW_RANK_PARTS[0])]
    if rank is not None and rank != max(ranks):
        raise BundleError(f"{path}: rank is {rank}; expected {max(ranks)}, the highest of its matrices")
    return layout


def embedded_manifest(path: Path) -> tuple[Manifest, str, Mapping[str, Span]]:
    """Return (manifest, its text, where the tensors lie) of a file with one metadata key.

    Raises:
        UsageError: There is no such file.
        BundleError: It has other metadata, or tensors other than those of the manifest.
    """
    refuse_folder_of_experts(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="name the .st file of an expert")
    header = read_header(path)
    if set(header.metadata) != {MANIFEST_KEY}:
        keys = shown(sorted(header.metadata))
        raise BundleError(f"{path}: __metadata__ has the keys {keys}; expected {MANIFEST_KEY!r} alone")
    text = header.metadata[MANIFEST_KEY]
    try:
        manifest = read_manifest(text.encode("utf-8"), str(path))
    except UnicodeEncodeError as error:
        raise BundleError(f"{path}: the manifest is not valid Unicode") from error
    check_agreement(header.tensors, manifest.tensors, str(path))
    return manifest, text, header.tensors
