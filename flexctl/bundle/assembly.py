"""Writing a merged model: copy in the kernel, hash what was written, link what may be linked, swap.

Every byte is hashed once, in the target: that proves source and copy together. Low-rank experts are expanded on the
way, from the public expert's file that has just been proven.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from flexctl.bundle.cache import known, remember, seal
from flexctl.bundle.card import merged_card
from flexctl.bundle.codec import indented_json, read_bytes
from flexctl.bundle.composition import Composition, LowRank, Piece
from flexctl.bundle.hashing import Advance, hash_file, hash_spans, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import (
    ROUTER_TENSOR,
    feed_forward_keys,
    merged_expert_head,
    shared_order,
    stock_head,
)
from flexctl.bundle.lowrank import expand
from flexctl.bundle.manifest import (
    MANIFEST_FILE,
    MergedManifest,
    RouterState,
    TensorInfo,
    digest_of,
    write_manifest,
)
from flexctl.bundle.merged import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    ROUTER_FILE,
    SHARED_FILE,
    Merged,
    expert_file,
    open_merged,
    router_layout,
)
from flexctl.bundle.store import check_directory_target, copy_range, new_directory, require_space
from flexctl.bundle.tensors import ITEM_SIZES, Span, TensorType, Typed, is_finite, size_of
from flexctl.errors import BundleError
from flexctl.runtime import Reporter

__all__ = ["assemble", "index_json", "planned_bytes", "write_merged"]

WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _WeightFile:
    """One file to write: its name, its head, and where the tensors come from, by key, in order."""

    name: str
    head: bytes
    tensors: Mapping[str, Piece | LowRank]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Placed:
    """One file in its place: its tensors as they were found there, and what stands for it and its source."""

    name: str
    tensors: Mapping[str, TensorInfo]
    linked: bool
    source_seal: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Site:
    """Where a merged model is being built.

    Attributes:
        folder: The temporary sibling.
        old: What it will replace, if that exists.
        trusted: Seals of files that need no hashing.
        advance: Told the bytes done.
    """

    folder: Path
    old: Path
    trusted: frozenset[str]
    advance: Advance


def planned_bytes(composition: Composition) -> int:
    """Return how many bytes the merged model's weights have."""
    weights = sum(sum(_sizes(file)) for file in _weight_files(composition))
    return weights + sum(map(size_of, _router_layout(composition).values()))


def assemble(
    path: Path,
    composition: Composition,
    *,
    overwrite: bool,
    trust_cache: bool,
    dry_run: bool,
    reporter: Reporter,
) -> tuple[str | None, int]:
    """Write a merged model with a progress bar, or only check that it could be written.

    Args:
        path: Directory to write.
        composition: What it is made of.
        overwrite: As for ``write_merged``.
        trust_cache: As for ``write_merged``.
        dry_run: Write nothing.
        reporter: Where progress goes.

    Returns:
        Digest and bytes written; None and what the weights would take after a dry run.

    Raises:
        FlexctlError: As for ``write_merged``.
    """
    total = planned_bytes(composition)
    if dry_run:
        check_directory_target(path, kind="merged", overwrite=overwrite)
        return None, total
    with reporter.progress("writing", total, "bytes") as progress:
        model, written = write_merged(
            path, composition, overwrite=overwrite, trust_cache=trust_cache, advance=progress.advance
        )
    return model.digest, written


def write_merged(
    path: Path,
    composition: Composition,
    *,
    overwrite: bool,
    trust_cache: bool = False,
    advance: Advance = silent,
) -> tuple[Merged, int]:
    """Write a merged model; the same composition always gives the same bytes.

    Args:
        path: Directory to write.
        composition: What it is made of.
        overwrite: Whether a merged model that exists may be replaced. Files of it that the new one has too are
            linked over instead of copied, as the old one goes.
        trust_cache: Whether files that were hashed before and did not change since need no hashing now.
        advance: Told the bytes done, of ``planned_bytes`` in all.

    Returns:
        The model as opened again from disk, and how many bytes of it were written rather than linked.

    Raises:
        BundleError: A tensor is not what its bundle's manifest promises, or not finite. The message names the
            source's file and tensor; nothing is written.
        UsageError: The target exists and may not be replaced.
        FlexctlError: The disk has no room, or cannot swap directories.
    """
    files = _weight_files(composition)
    require_space(path, planned_bytes(composition))
    with new_directory(path, kind="merged", overwrite=overwrite) as folder:
        site = _Site(
            folder=folder,
            old=Path(os.path.realpath(path)),
            trusted=known() if trust_cache else frozenset(),
            advance=_locked(advance),
        )
        placed = _place_all(composition, files, site)
        tensors = {key: info for item in placed for key, info in item.tensors.items()}
        tensors |= _write_router(composition, site)
        _write_small_files(composition, tensors, site)
        open_merged(folder)
        linked = {item.name for item in placed if item.linked}
        written = sum(file.stat().st_size for file in folder.iterdir() if file.name not in linked)
    # Only now do times and link counts stand still: what was linked has lost its old name.
    remember([seal(path / item.name, item.tensors) for item in placed])
    remember([item.source_seal for item in placed if item.source_seal])
    return open_merged(path), written


def index_json(weight_map: Mapping[str, str], tensors: Mapping[str, Typed]) -> bytes:
    """Return model.safetensors.index.json.

    Args:
        weight_map: Key -> file.
        tensors: Key -> dtype and shape, by the same keys.
    """
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "total_size": sum(map(size_of, tensors.values())),
    }
    return indented_json({"metadata": metadata, "weight_map": dict(weight_map)})


def _weight_files(composition: Composition) -> list[_WeightFile]:
    """Return every file to write but the router's, the public expert's before the others."""
    shared = shared_order({name: piece.info for name, piece in composition.shared.items()})
    files = [
        _WeightFile(
            name=SHARED_FILE,
            head=stock_head(shared),
            tensors={name: composition.shared[name] for name in shared},
        )
    ]
    for index, part in enumerate(composition.parts):
        keys = feed_forward_keys(composition.family, composition.architecture.num_hidden_layers, index)
        files.append(
            _WeightFile(
                name=expert_file(part.entry.name),
                head=merged_expert_head(composition.family, composition.architecture, index, part.manifest),
                tensors={keys[name]: source for name, source in part.feed_forward.items()},
            )
        )
    return files


def _place_all(composition: Composition, files: list[_WeightFile], site: _Site) -> list[_Placed]:
    """Write or link every file and prove it, several at a time."""
    keys = feed_forward_keys(composition.family, composition.architecture.num_hidden_layers, 0)
    with ThreadPoolExecutor(WORKERS) as pool:

        def place(batch: list[_WeightFile], public: Mapping[str, Span]) -> list[_Placed]:
            futures = [pool.submit(_place, file, site, public) for file in batch]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

        # Shared and public first: low-rank experts are expanded from the public expert's file.
        placed = place(files[:2], {})
        tensors = read_header(site.folder / files[1].name).tensors
        return placed + place(files[2:], {name: tensors[key] for name, key in keys.items()})


def _place(file: _WeightFile, site: _Site, public: Mapping[str, Span]) -> _Placed:
    """Put one file in its place and prove it.

    Args:
        file: What to write.
        site: Where.
        public: Expert tensor name -> the public expert's, in the file that was proven before.
    """
    target = site.folder / file.name
    source_seal = _source_seal(file)
    linked = _link(file, site.old / file.name, target)
    if not linked:
        _write(file, target, public)
    if source_seal is not None and source_seal in site.trusted:
        tensors = {key: source.info for key, source in file.tensors.items() if isinstance(source, Piece)}
        site.advance(sum(_sizes(file)))
    else:
        spans = read_header(target).tensors
        tensors = _prove(target, spans, file.tensors, site.advance)
    return _Placed(name=file.name, tensors=tensors, linked=linked, source_seal=source_seal)


def _link(file: _WeightFile, old: Path, target: Path) -> bool:
    """Link a file of the model that will be replaced, if it has these very bytes and no other name."""
    if not old.is_file() or any(
        isinstance(source, LowRank) or Path(os.path.realpath(source.span.path)) != old
        for source in file.tensors.values()
    ):
        return False
    status = old.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or read_header(old).head != file.head:
        return False
    try:
        os.link(old, target)
    except OSError:
        return False  # a file system without hard links: copy
    return True


def _write(file: _WeightFile, target: Path, public: Mapping[str, Span]) -> None:
    with target.open("xb", buffering=0) as output:
        output.write(file.head)
        offset = len(file.head)
        for source in _joined(file.tensors.values()):
            if isinstance(source, Span):
                count = source.stop - source.start
                copy_range(source.path, source.start, output.fileno(), offset, count)
                offset += count
                continue
            parts = {part.name: part for part in (source.a, source.b)}
            for part in parts.values():
                _prove(part.span.path, {part.name: part.span}, {part.name: part}, silent)
            for block in expand(public[source.name], source.a.span, source.b.span):
                offset += os.pwrite(output.fileno(), block.data, offset)


def _joined(sources: Iterable[Piece | LowRank]) -> Iterator[Span | LowRank]:
    """Yield spans of one file that follow each other as one, so that the kernel copies them in one go."""
    pending: Span | None = None
    for source in sources:
        span = source.span if isinstance(source, Piece) else None
        if pending and span and pending.path == span.path and pending.stop == span.start:
            pending = replace(pending, stop=span.stop)
            continue
        if pending:
            yield pending
        pending = span
        if isinstance(source, LowRank):
            yield source
    if pending:
        yield pending


def _prove(
    path: Path, spans: Mapping[str, Span], sources: Mapping[str, Piece | LowRank], advance: Advance
) -> dict[str, TensorInfo]:
    """Return what the tensors of a file are, after comparing them with what their sources promise.

    Raises:
        BundleError: One is something else, or not finite; the message names the source.
    """
    found = {}
    for name, info, finite in hash_spans(path, spans, advance):
        source = sources[name]
        piece = source if isinstance(source, Piece) else source.b
        where = f"{piece.span.path}: tensor {piece.name}"
        if isinstance(source, Piece) and info != source.info:
            raise BundleError(f"{where}: its bytes are not those of the manifest", hint="fetch the file again")
        if not finite:
            raise BundleError(f"{where}: holds NaN or infinity", hint="the owner must train it again")
        found[name] = info
    return found


def _source_seal(file: _WeightFile) -> str | None:
    """Return the seal of the one file that everything is copied from; None if it is several, or expanded."""
    pieces = [source for source in file.tensors.values() if isinstance(source, Piece)]
    paths = {piece.span.path for piece in pieces}
    if len(pieces) < len(file.tensors) or len(paths) != 1:
        return None
    return seal(paths.pop(), {piece.name: piece.info for piece in pieces})


def _sizes(file: _WeightFile) -> Iterator[int]:
    for source in file.tensors.values():
        if isinstance(source, Piece):
            yield size_of(source.info)
        else:
            yield ITEM_SIZES[source.a.info.dtype] * source.b.info.shape[0] * source.a.info.shape[1]


def _router_layout(composition: Composition) -> dict[str, TensorType]:
    return router_layout(composition.family, composition.architecture, len(composition.parts))


def _write_router(composition: Composition, site: _Site) -> dict[str, TensorInfo]:
    """Write every layer's rows and prove that each expert's are its owner's; return the tensors."""
    target = site.folder / ROUTER_FILE
    layout = _router_layout(composition)
    row_bytes = 4 * composition.architecture.hidden_size
    with target.open("xb") as output:
        output.write(stock_head(layout))
        for layer in range(len(layout)):
            for part in composition.parts:
                output.write(part.rows[layer].load() if part.rows else bytes(row_bytes))
    hashers = [hashlib.sha256() for _ in composition.parts]
    tensors = {}
    for key, span in read_header(target).tensors.items():
        data = span.load()
        for index, hasher in enumerate(hashers):
            hasher.update(data[index * row_bytes : (index + 1) * row_bytes])
        if not is_finite("F32", data):
            raise BundleError(f"{target.name}: tensor {key}: holds NaN or infinity", hint="see which expert by verify")
        tensors[key] = TensorInfo(span.dtype, span.shape, hashlib.sha256(data).hexdigest())
        site.advance(len(data))
    for part, hasher in zip(composition.parts, hashers, strict=True):
        if part.rows_sha256 is not None and hasher.hexdigest() != part.rows_sha256:
            where = f"{part.source}: expert {part.entry.name}: tensor {ROUTER_TENSOR}"
            raise BundleError(f"{where}: its bytes are not those of the manifest", hint="fetch the file again")
    return tensors


def _write_small_files(composition: Composition, tensors: Mapping[str, TensorInfo], site: _Site) -> None:
    """Write stock files, config, index, card and manifest beside the weights."""
    folder = site.folder
    files = {item.name: hash_file(item, len(read_header(item).head)) for item in sorted(folder.iterdir())}
    weight_map = {key: item for item in files for key in read_header(folder / item).tensors}
    for name, (source, sha256) in composition.stock.items():
        (folder / name).write_bytes(read_bytes(source))
        files[name] = hash_file(folder / name)
        if files[name] != sha256:
            raise BundleError(f"{source}: its bytes are not those of the manifest", hint="fetch the file again")
    config = composition.family.merged_config(composition.moe_config, len(composition.parts), composition.top_k)
    manifest = MergedManifest(
        digest="",
        anchor=composition.anchor,
        architecture=composition.architecture,
        experts=tuple(replace(part.entry, index=index) for index, part in enumerate(composition.parts)),
        license=composition.license,
        num_experts_per_tok_requested=composition.top_k,
        router=RouterState(tuned_with=None),
        removed=composition.removed,
        files={},
        tensors=tensors,
    )
    texts = {
        CONFIG_FILE: indented_json(config),
        INDEX_FILE: index_json(weight_map, tensors),
        CARD_FILE: merged_card(manifest).encode("utf-8"),
    }
    for name, data in texts.items():
        (folder / name).write_bytes(data)
        files[name] = hashlib.sha256(data).hexdigest()
    manifest = replace(manifest, files=files, digest=digest_of(tensors, files))
    (folder / MANIFEST_FILE).write_bytes(write_manifest(manifest))


def _locked(advance: Advance) -> Advance:
    lock = threading.Lock()

    def counted(count: int) -> None:
        with lock:
            advance(count)

    return counted
