"""Reading manifests that somebody else wrote: every field is checked before anything believes it.

Law: ``read_manifest(write_manifest(m), where) == m``, and no other bytes are read as ``m``.
"""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import NoReturn

from flexctl.bundle.codec import canonical_json, decode, encode, parse_json, read_bytes
from flexctl.bundle.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    AnchorManifest,
    Architecture,
    ExpertManifest,
    Manifest,
    MergedManifest,
    RouterManifest,
    TensorInfo,
    digest_of,
)
from flexctl.bundle.names import PUBLIC, check_anchor_name, check_expert_name, check_file_name, shown
from flexctl.bundle.stock import CONFIG_FILE, is_data_file, is_stock_mixture
from flexctl.bundle.tensors import ITEM_SIZES
from flexctl.errors import BundleError, UsageError

__all__ = ["read_directory_manifest", "read_manifest", "refuse_folder_of_experts"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

_CLASSES: dict[str, type[Manifest]] = {
    "anchor": AnchorManifest,
    "expert": ExpertManifest,
    "merged": MergedManifest,
    "router": RouterManifest,
}


def read_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that ``data`` holds, every field checked and the digest recomputed.

    Args:
        data: Bytes as from ``write_manifest``.
        where: File, for messages.

    Raises:
        BundleError: It is not canonical JSON, of an unknown schema version or kind, a field is missing, unknown,
            or has a value that it may not have, or the digest is not that of ``tensors`` and ``files``.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise BundleError(f"{where}: the manifest is {shown(value)}; expected an object")
    version, kind = value.get("schema_version"), value.get("kind")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: schema_version is {shown(version)}; this flexctl reads {SCHEMA_VERSION}", hint="update flexctl"
        )
    if kind == "index":
        raise UsageError(
            f"{where}: is the index of an owner's text, which stays with its owner",
            hint="flexctl trace-find looks in it, flexctl verify checks it",
        )
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise BundleError(f"{where}: kind is {shown(kind)}; expected one of {', '.join(_CLASSES)}")
    manifest: Manifest = decode(_CLASSES[kind], value, where)
    _check(manifest, where)
    if canonical_json(value) != data:
        raise BundleError(f"{where}: the manifest is not canonical JSON (sorted keys, no spaces)")
    return manifest


def read_directory_manifest(path: Path) -> Manifest:
    """Return the manifest of a directory bundle; nothing else of it is read.

    Raises:
        UsageError: There is no such directory, or it is a folder of experts.
        BundleError: There is no manifest, or it is not valid.
    """
    if not path.is_dir():
        hint = "name the directory of a bundle; flexctl init-anchor makes an anchor, flexctl merge a merged model"
        raise UsageError(f"{path}: no such directory", hint=hint)
    refuse_folder_of_experts(path)
    if not (path / MANIFEST_FILE).exists() and (path / CONFIG_FILE).is_file():
        _refuse_stock(path)
    return read_manifest(read_bytes(path / MANIFEST_FILE), str(path / MANIFEST_FILE))


def _refuse_stock(path: Path) -> NoReturn:
    """Refuse a stock checkpoint in the place of a bundle; the hint says how one becomes a bundle."""
    if is_stock_mixture(path):
        kind, hint = "a mixture of experts", f"flexctl adopt {path} takes one apart that others merged"
    else:
        kind, hint = "a stock checkpoint", f"flexctl init-anchor {path} --data PUBLIC_TEXT makes an anchor of one"
    raise BundleError(f"{path / MANIFEST_FILE}: is missing; config.json is that of {kind}", hint=hint)


def refuse_folder_of_experts(path: Path) -> None:
    """Refuse a folder with experts' files in the place of one bundle.

    Raises:
        UsageError: It is such a folder.
    """
    if path.is_dir() and not (path / MANIFEST_FILE).exists() and any(path.glob("*.st")):
        raise UsageError(f"{path}: is a folder with experts in it and no bundle", hint=f"name its files: {path}/*.st")


def _check(manifest: Manifest, where: str) -> None:
    for name, info in manifest.tensors.items():
        _check_tensor(info, f"{where}: tensors.{shown(name)}")
    files = manifest.files if isinstance(manifest, (AnchorManifest, MergedManifest)) else None
    for name, sha256 in (files or {}).items():
        check_file_name(name, f"{where}: files")
        _check_pattern(sha256, _SHA256, f"{where}: files.{name}")
        if not is_data_file(name):
            raise BundleError(f"{where}: files lists {shown(name)}; expected data files alone, no code and no pickles")
    if digest_of(manifest.tensors, files) != manifest.digest:
        raise BundleError(
            f"{where}: digest is {shown(manifest.digest)}, but its content has another", hint="the file was changed"
        )
    if isinstance(manifest, AnchorManifest):
        check_anchor_name(manifest.name, f"{where}: name")
        _check_architecture(manifest.architecture, where)
        return
    _check_pattern(manifest.anchor.digest, _DIGEST, f"{where}: anchor.digest")
    check_anchor_name(manifest.anchor.name, f"{where}: anchor.name")
    if isinstance(manifest, MergedManifest):
        _check_architecture(manifest.architecture, where)
        _check_merged(manifest, where)
        return
    check_expert_name(manifest.name, f"{where}: name")
    if isinstance(manifest, ExpertManifest):
        _check_architecture(manifest.architecture, where)
        _check_date(manifest.data.expires, f"{where}: data.expires")
        for index, parent in enumerate(manifest.parents):
            _check_pattern(parent, _DIGEST, f"{where}: parents.{index}")
        if manifest.rank is not None and manifest.rank < 1:
            raise BundleError(f"{where}: rank is {manifest.rank}; expected null or at least 1")
        if len(manifest.router.bias) != manifest.architecture.num_hidden_layers:
            raise BundleError(f"{where}: router.bias has {len(manifest.router.bias)} entries; expected one a layer")
    _check_own_covariance(manifest.router.own_covariance, where)


def _check_own_covariance(share: float | None, where: str) -> None:
    if share is not None and not 0 <= share < 1:
        raise BundleError(f"{where}: router.own_covariance is {share}; expected from 0 to below 1")


def _check_merged(manifest: MergedManifest, where: str) -> None:
    names = [entry.name for entry in manifest.experts]
    if names[:1] != [PUBLIC] or names[1:] != sorted(set(names[1:])):
        raise BundleError(f"{where}: experts is {shown(names)}; expected public first, then each once, by name")
    for index, entry in enumerate(manifest.experts):
        field = f"{where}: experts.{index}"
        if entry.index != index:
            raise BundleError(f"{field}.index is {entry.index}; expected {index}")
        if index:
            check_expert_name(entry.name, f"{field}.name")
        _check_pattern(entry.digest, _DIGEST, f"{field}.digest")
        _check_pattern(entry.manifest_sha256, _SHA256, f"{field}.manifest_sha256")
        _check_date(entry.expires, f"{field}.expires")
    if manifest.num_experts_per_tok_requested < 1:
        raise BundleError(
            f"{where}: num_experts_per_tok_requested is {manifest.num_experts_per_tok_requested}; expected at least 1"
        )
    for index, tombstone in enumerate(manifest.removed):
        check_expert_name(tombstone.name, f"{where}: removed.{index}.name")
        _check_pattern(tombstone.digest, _DIGEST, f"{where}: removed.{index}.digest")


def _check_tensor(info: TensorInfo, where: str) -> None:
    if info.dtype not in ITEM_SIZES:
        raise BundleError(f"{where}.dtype is {shown(info.dtype)}; expected one of {', '.join(ITEM_SIZES)}")
    if any(size < 0 for size in info.shape):
        raise BundleError(f"{where}.shape is {shown(info.shape)}; expected sizes of at least 0")
    _check_pattern(info.sha256, _SHA256, f"{where}.sha256")


def _check_architecture(architecture: Architecture, where: str) -> None:
    for name, size in encode(architecture).items():
        if name != "dtype" and not 0 < size < 2**32:
            raise BundleError(f"{where}: architecture.{name} is {size}; expected at least 1")
    if architecture.num_hidden_layers > 9999:
        raise BundleError(f"{where}: architecture.num_hidden_layers is {architecture.num_hidden_layers}; at most 9999")


def _check_pattern(text: str, pattern: re.Pattern[str], where: str) -> None:
    if not pattern.fullmatch(text):
        raise BundleError(f"{where} is {shown(text)}; expected {pattern.pattern}")


def _check_date(text: str | None, where: str) -> None:
    if text is None:
        return
    try:
        datetime.date.fromisoformat(text if _DATE.fullmatch(text) else "")
    except ValueError:
        raise BundleError(f"{where} is {shown(text)}; expected a date as YYYY-MM-DD") from None
