"""Writing a merged model from what it is made of: weights, router, then everything that follows from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from flexctl.bundle.card import merged_card
from flexctl.bundle.codec import indented_json, read_bytes
from flexctl.bundle.composition import Composition
from flexctl.bundle.hashing import Advance, hash_file, locked, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import (
    ROUTER_TENSOR,
    feed_forward_keys,
    index_json,
    merged_expert_head,
    shared_order,
    stock_head,
)
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
    UNTUNED_ROUTER_FILE,
    Merged,
    expert_file,
    open_merged,
    router_layout,
)
from flexctl.bundle.placing import Placed, Site, WeightFile, place
from flexctl.bundle.seals import known, remember, seal
from flexctl.bundle.signatures import kept_signature_file
from flexctl.bundle.store import new_directory, require_space
from flexctl.bundle.tensors import TensorType, check_agreement, is_finite, size_of
from flexctl.errors import BundleError

__all__ = ["planned_bytes", "write_merged"]


def planned_bytes(composition: Composition) -> int:
    """Return how many bytes the merged model's weights have."""
    weights = sum(file.size for file in _weight_files(composition))
    routers = 1 if composition.tuned is None else 2
    return weights + routers * sum(map(size_of, _router_layout(composition).values()))


def write_merged(
    path: Path,
    composition: Composition,
    *,
    overwrite: bool,
    trust_cache: bool = False,
    advance: Advance = silent,
    ready: Callable[[Merged], object] = lambda _: None,
) -> tuple[Merged, int]:
    """Write a merged model; the same composition always gives the same bytes.

    Args:
        path: Directory to write.
        composition: What it is made of.
        overwrite: Whether a merged model that exists may be replaced. Files of it that the new one has too are
            linked over instead of copied, as the old one goes.
        trust_cache: Whether files that were hashed before and did not change since need no hashing now.
        advance: Told the bytes done, of ``planned_bytes`` in all.
        ready: Told the finished model before it takes its place; writes what must not be missing in it or beside it.

    Returns:
        The model as opened again from disk, and how many bytes of it were written rather than linked or shared.

    Raises:
        BundleError: A tensor is not what its bundle's manifest promises, or not finite. The message names the
            source's file and tensor; nothing is written.
        UsageError: The target exists and may not be replaced.
        FlexctlError: The disk has no room, or cannot swap directories.
    """
    files = _weight_files(composition)
    require_space(path, planned_bytes(composition))
    with new_directory(path, kind="merged", overwrite=overwrite) as folder:
        site = Site(
            folder=folder,
            old=Path(os.path.realpath(path)),
            trusted=known() if trust_cache else frozenset(),
            advance=locked(advance),
        )
        placed = _place_all(composition, files, site)
        tensors = {key: info for item in placed for key, info in item.tensors.items()}
        tensors |= _write_routers(composition, site)
        _write_small_files(composition, tensors, site)
        ready(open_merged(folder))
        written = sum(file.stat().st_size for file in folder.iterdir()) - sum(item.spared for item in placed)
    # Only now do times and link counts stand still: what was linked has lost its old name.
    remember([seal(path / item.name, item.tensors) for item in placed])
    remember([item.source_seal for item in placed if item.source_seal])
    return open_merged(path), written


def _weight_files(composition: Composition) -> list[WeightFile]:
    """Return every file to write but the router's, the public expert's before the others."""
    shared = shared_order({name: piece.info for name, piece in composition.shared.items()})
    files = [
        WeightFile(
            name=SHARED_FILE,
            head=stock_head(shared),
            tensors={name: composition.shared[name] for name in shared},
        )
    ]
    for index, part in enumerate(composition.parts):
        keys = feed_forward_keys(composition.family, composition.architecture.num_hidden_layers, index)
        files.append(
            WeightFile(
                name=expert_file(part.entry.name),
                head=merged_expert_head(composition.family, composition.architecture, index, part.manifest),
                tensors={keys[name]: source for name, source in part.feed_forward.items()},
            )
        )
    return files


def _place_all(composition: Composition, files: list[WeightFile], site: Site) -> list[Placed]:
    """Put every file in its place and prove it."""
    keys = feed_forward_keys(composition.family, composition.architecture.num_hidden_layers, 0)
    # Shared and public first: low-rank experts are expanded from the public expert's file.
    placed = place(files[:2], site, {})
    tensors = read_header(site.folder / files[1].name).tensors
    public = {name: tensors[key] for name, key in keys.items()}
    return placed + place(files[2:], site, public)


def _router_layout(composition: Composition) -> dict[str, TensorType]:
    return router_layout(composition.family, composition.architecture, len(composition.parts))


def _write_routers(composition: Composition, site: Site) -> dict[str, TensorInfo]:
    """Write the owners' rows and, where the router was tuned, the tuned ones in their place; return the tensors."""
    if composition.tuned is None:
        return _write_owners_rows(composition, site, ROUTER_FILE)
    _write_owners_rows(composition, site, UNTUNED_ROUTER_FILE)
    layout = _router_layout(composition)
    tuned = dict(zip(layout, composition.tuned, strict=True))
    check_agreement(tuned, layout, ROUTER_FILE)
    with (site.folder / ROUTER_FILE).open("xb") as output:
        output.write(stock_head(layout))
        for tensor in tuned.values():
            output.write(tensor.view())
    return _checked_router(site, ROUTER_FILE)


def _write_owners_rows(composition: Composition, site: Site, file: str) -> dict[str, TensorInfo]:
    """Write every layer's rows and prove that each expert's are its owner's; return the tensors."""
    layout = _router_layout(composition)
    row_bytes = 4 * composition.architecture.hidden_size
    with (site.folder / file).open("xb") as output:
        output.write(stock_head(layout))
        for layer in range(len(layout)):
            for part in composition.parts:
                output.write(part.rows[layer].load() if part.rows else bytes(row_bytes))
    spans = read_header(site.folder / file).tensors.values()
    for index, part in enumerate(composition.parts):
        rows = b"".join(span.rows(index, index + 1).load() for span in spans)
        if part.rows_sha256 is not None and hashlib.sha256(rows).hexdigest() != part.rows_sha256:
            where = f"{part.source}: expert {part.entry.name}: tensor {ROUTER_TENSOR}"
            raise BundleError(f"{where}: its bytes are not those of the manifest", hint="fetch the file again")
    return _checked_router(site, file)


def _checked_router(site: Site, file: str) -> dict[str, TensorInfo]:
    """Return the tensors of a router's file as they are on disk, all finite."""
    tensors = {}
    for key, span in read_header(site.folder / file).tensors.items():
        data = span.load()
        if not is_finite("F32", data):
            raise BundleError(f"{file}: tensor {key}: holds NaN or infinity", hint="flexctl verify says whose it is")
        tensors[key] = TensorInfo(span.dtype, span.shape, hashlib.sha256(data).hexdigest())
        site.advance(len(data))
    return tensors


def _write_small_files(composition: Composition, tensors: Mapping[str, TensorInfo], site: Site) -> None:
    """Write stock files, config, index, card and manifest beside the weights."""
    folder = site.folder
    weights = [item for item in sorted(folder.iterdir()) if item.name != UNTUNED_ROUTER_FILE]
    files = {item.name: hash_file(item, len(read_header(item).head)) for item in weights}
    weight_map = {key: item for item in files for key in read_header(folder / item).tensors}
    tuned_with = None
    if composition.tuned is not None:
        files[UNTUNED_ROUTER_FILE] = hash_file(folder / UNTUNED_ROUTER_FILE)
        tuned_with = tuple(part.entry.name for part in composition.parts[1:])
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
        router=RouterState(tuned_with=tuned_with),
        removed=composition.removed,
        files={},
        tensors=tensors,
    )
    for part in composition.parts:
        if part.signature is not None:
            (folder / kept_signature_file(part.entry.name)).write_bytes(part.signature.data)
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
