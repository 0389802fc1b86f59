"""Anchors: a stock dense checkpoint with a manifest, its router space and its public sample beside it."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import indented_json, parse_json, read_bytes
from flexctl.bundle.hashing import Advance, hash_file, hash_spans, in_parallel, locked, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import expert_layout, index_json, stock_head
from flexctl.bundle.manifest import (
    MANIFEST_FILE,
    AnchorManifest,
    Architecture,
    TensorInfo,
    digest_of,
    write_manifest,
)
from flexctl.bundle.names import check_anchor_name, check_file_name, shown
from flexctl.bundle.store import copy_range, new_directory
from flexctl.bundle.tensors import FLOAT_DTYPES, RawTensor, Span, TensorType, check_agreement
from flexctl.bundle.validation import read_manifest
from flexctl.bundle.weights import Weights, dense_weights
from flexctl.errors import BundleError, UsageError
from flexctl.families import family_of, feed_forward_names

__all__ = [
    "ROUTER_SPACE_PREFIX",
    "Anchor",
    "checkpoint_spans",
    "hash_weights",
    "is_stock_file",
    "open_anchor",
    "read_checkpoint",
    "read_dense_config",
    "write_anchor",
    "write_tensors",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ROUTER_SPACE_FILE = "router-space.safetensors"
ROUTER_SPACE_PREFIX = "router_space."
PUBLIC_SAMPLE_FILE = "public-sample.safetensors"
DENSE_PREFIX = "model."
"""Before an expert tensor's name, the name of the same matrix in a dense checkpoint; true of every family."""

_STOCK_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """An anchor on disk, its headers read and checked, its bytes not yet.

    Attributes:
        path: Directory.
        manifest: What it says about itself.
        config: config.json of the dense class.
        spans: Where every tensor of ``manifest.tensors`` lies, by the same names.
    """

    path: Path
    manifest: AnchorManifest
    config: Mapping[str, Any]
    spans: Mapping[str, Span]

    @property
    def digest(self) -> str:
        """What binds its weights, config, tokenizer, router space and public sample."""
        return self.manifest.digest

    def tensor(self, name: str) -> RawTensor:
        """Return a tensor by its name in the checkpoint, memory-mapped."""
        return self.spans[name].read()

    def feed_forward(self) -> dict[str, Span]:
        """Return {expert tensor name: where it lies} of the public expert, in the order of expert files."""
        layers = self.manifest.architecture.num_hidden_layers
        return {name: self.spans[DENSE_PREFIX + name] for _, _, name in feed_forward_names(layers)}

    def shared(self) -> dict[str, Span]:
        """Return {dense name: where it lies} of every weight outside the feed-forward networks."""
        owned = {DENSE_PREFIX + name for name in self.feed_forward()}
        return {
            name: span
            for name, span in self.spans.items()
            if name not in owned and not name.startswith(ROUTER_SPACE_PREFIX)
        }

    def weights(self) -> Weights:
        """Return the anchor as a model of one expert, whose router rows are zero."""
        return dense_weights(self.config, self.manifest.architecture, self.shared(), self.feed_forward())

    def router_space(self) -> dict[str, RawTensor]:
        """Return the tensors of router-space.safetensors by their names there."""
        prefix = ROUTER_SPACE_PREFIX
        return {n.removeprefix(prefix): span.read() for n, span in self.spans.items() if n.startswith(prefix)}

    def public_sample(self) -> dict[str, RawTensor]:
        """Return the tensors of public-sample.safetensors."""
        header = read_header(self.path / PUBLIC_SAMPLE_FILE)
        return {name: span.read() for name, span in header.tensors.items()}


def open_anchor(path: Path) -> Anchor:
    """Return the anchor in a directory, after checking manifest, headers and config.json.

    The tensors' bytes and the other files are verify's and merge's to hash.

    Raises:
        UsageError: There is no such directory.
        BundleError: It is no anchor, or manifest, headers and config.json do not agree.
    """
    manifest = read_manifest(_manifest_bytes(path), str(path / MANIFEST_FILE))
    if not isinstance(manifest, AnchorManifest):
        raise BundleError(f"{path / MANIFEST_FILE}: kind is {manifest.kind!r}; expected 'anchor'")
    config_bytes = read_bytes(path / "config.json")
    if hashlib.sha256(config_bytes).hexdigest() != manifest.files.get("config.json"):
        raise BundleError(f"{path / 'config.json'}: its bytes are not those of the manifest", hint="fetch it again")
    spans = checkpoint_spans(path) | _router_space_spans(path)
    check_agreement(spans, manifest.tensors, str(path))
    _check_feed_forward(spans, manifest.architecture, path)
    _check_router_space(spans, manifest.architecture, path)
    config = parse_json(config_bytes, str(path / "config.json"))
    return Anchor(path=path, manifest=manifest, config=config, spans=spans)


def write_anchor(
    path: Path,
    *,
    checkpoint: Path,
    name: str,
    moe_config: Mapping[str, Any],
    router_space: Mapping[str, RawTensor],
    public_sample: Mapping[str, RawTensor],
    overwrite: bool,
    license: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Anchor:
    """Make an anchor of a stock dense checkpoint. Files are copied, never linked or changed.

    Args:
        path: Directory to write.
        checkpoint: Directory with config.json, weights as safetensors, tokenizer files.
        name: How people call it; letters, digits, '.', '_' and '-'.
        moe_config: Finished config of the mixture class; counts in it are of no account.
        router_space: ``layers.{i}.mean``, ``.covariance_factor``, ``.covariance_diagonal``, F32.
        public_sample: Tensors of the public sample, written as they are.
        overwrite: Whether an anchor that exists may be replaced.
        license: SPDX id or text of the checkpoint; None is unknown.
        run: What no digest covers, for run.json: times, machine, losses. The anchor's digest is added.

    Returns:
        The anchor as opened again from disk.

    Raises:
        BundleError: The checkpoint has no safetensors, tensors are missing, misshaped, of another dtype than F32,
            BF16 and F16, or not finite.
    """
    check_anchor_name(name, "the anchor's name")
    config = read_dense_config(checkpoint)
    spans = checkpoint_spans(checkpoint)
    architecture = _architecture(config, spans, checkpoint)
    with new_directory(path, kind="anchor", overwrite=overwrite) as folder:
        for file in sorted({span.path.name for span in spans.values()}):
            _copy(checkpoint / file, folder / file)
        if (checkpoint / INDEX_FILE).is_file():
            _copy(checkpoint / INDEX_FILE, folder / INDEX_FILE)
        else:
            # Servers that load every safetensors file of a directory keep to an index where there is one.
            (folder / INDEX_FILE).write_bytes(index_json(dict.fromkeys(sorted(spans), SINGLE_FILE), spans))
        stock = sorted(item.name for item in checkpoint.iterdir() if item.is_file() and is_stock_file(item.name))
        for file in stock:
            _copy(checkpoint / file, folder / file)
        write_tensors(folder / ROUTER_SPACE_FILE, router_space)
        write_tensors(folder / PUBLIC_SAMPLE_FILE, public_sample)
        copied = checkpoint_spans(folder) | _router_space_spans(folder)
        tensors = hash_weights(copied)
        files = {file: hash_file(folder / file) for file in sorted([*stock, PUBLIC_SAMPLE_FILE])}
        manifest = AnchorManifest(
            name=name,
            model_type=str(config["model_type"]),
            digest=digest_of(tensors, files),
            license=license,
            architecture=architecture,
            moe_config=dict(moe_config),
            files=files,
            tensors=tensors,
        )
        (folder / MANIFEST_FILE).write_bytes(write_manifest(manifest))
        if run is not None:
            (folder / "run.json").write_bytes(indented_json({"digest": manifest.digest, **run}))
        open_anchor(folder)
    return open_anchor(path)


def read_checkpoint(checkpoint: Path) -> dict[str, Span]:
    """Return where each weight of a stock checkpoint lies; nothing but headers is read.

    Raises:
        BundleError: There is no safetensors file, a header is not valid, a dtype is none of F32, BF16 and F16, or sizes
            and feed-forward matrices are not those of config.json.
    """
    spans = checkpoint_spans(checkpoint)
    _architecture(read_dense_config(checkpoint), spans, checkpoint)
    return spans


def read_dense_config(checkpoint: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint's directory.

    Raises:
        BundleError: It is missing or no JSON object.
    """
    config = parse_json(read_bytes(checkpoint / "config.json"), str(checkpoint / "config.json"))
    if not isinstance(config, dict):
        raise BundleError(f"{checkpoint / 'config.json'} is {shown(config)}; expected an object")
    return config


def is_stock_file(name: str) -> bool:
    """Return whether a checkpoint's file belongs to the anchor: config, generation config, tokenizer, template."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _STOCK_FILES)


def checkpoint_spans(path: Path) -> dict[str, Span]:
    """Return where the weights of a stock checkpoint lie, read through its index where it has one.

    Raises:
        BundleError: There are no safetensors, or index and files do not agree.
    """
    if not (path / INDEX_FILE).is_file():
        if not (path / SINGLE_FILE).is_file():
            raise BundleError(f"{path / SINGLE_FILE}: is missing", hint="save the checkpoint as safetensors")
        return dict(read_header(path / SINGLE_FILE).tensors)
    index = parse_json(read_bytes(path / INDEX_FILE), str(path / INDEX_FILE))
    where = f"{path / INDEX_FILE}: weight_map"
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise BundleError(f"{where} is {shown(weight_map)}; expected an object of file names")
    spans: dict[str, Span] = {}
    for file in sorted(set(weight_map.values())):
        tensors = read_header(path / check_file_name(file, where)).tensors
        check_agreement(tensors, {name: tensors[name] for name in tensors if weight_map.get(name) == file}, file)
        spans |= tensors
    for name, file in weight_map.items():
        if name not in spans:
            raise BundleError(f"{path / file}: tensor {shown(name)} is missing")
    return spans


def hash_weights(spans: Mapping[str, Span], advance: Advance = silent) -> dict[str, TensorInfo]:
    """Return what the tensors of several files are, by name, files in parallel.

    Args:
        spans: By name.
        advance: Told the bytes done.

    Raises:
        BundleError: One holds NaN or infinity, or a file ends early.
    """
    counted = locked(advance)

    def hashed(path: Path) -> dict[str, TensorInfo]:
        found = {}
        inside = {name: span for name, span in spans.items() if span.path == path}
        for name, info, finite in hash_spans(path, inside, counted):
            if not finite:
                raise BundleError(f"{path.name}: tensor {name}: holds NaN or infinity")
            found[name] = info
        return found

    files = in_parallel(hashed, sorted({span.path for span in spans.values()}))
    return dict(sorted((name, info) for found in files for name, info in found.items()))


def write_tensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Write a safetensors file of tensors in memory, in the order given."""
    with path.open("xb") as file:
        file.write(stock_head(tensors))
        for tensor in tensors.values():
            file.write(tensor.view())


def _manifest_bytes(path: Path) -> bytes:
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory", hint="name the directory of a bundle")
    return read_bytes(path / MANIFEST_FILE)


def _router_space_spans(path: Path) -> dict[str, Span]:
    tensors = read_header(path / ROUTER_SPACE_FILE).tensors
    return {ROUTER_SPACE_PREFIX + name: span for name, span in tensors.items()}


def _architecture(config: Mapping[str, Any], spans: Mapping[str, Span], checkpoint: Path) -> Architecture:
    """Return the sizes in config.json, after checking that the feed-forward matrices have them."""
    sizes: dict[str, int] = {}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        size = config.get(name)
        if type(size) is not int or size < 1:
            raise BundleError(f"{checkpoint / 'config.json'}: {name} is {shown(size)}; expected a whole number")
        sizes[name] = size
    family_of(str(config.get("model_type")))
    first = DENSE_PREFIX + "layers.0.mlp.gate_proj.weight"
    if first not in spans:
        raise BundleError(f"{checkpoint}: tensor {first} is missing", hint="use a Transformers checkpoint")
    architecture = Architecture(**sizes, dtype=spans[first].dtype)
    for name, span in spans.items():
        if span.dtype not in FLOAT_DTYPES:
            raise BundleError(f"{span.path}: tensor {name}: dtype is {span.dtype}; expected {', '.join(FLOAT_DTYPES)}")
    _check_feed_forward(spans, architecture, checkpoint)
    return architecture


def _check_feed_forward(spans: Mapping[str, Span], architecture: Architecture, where: Path) -> None:
    expected = expert_layout(architecture)
    del expected["router.weight"]
    found = {name.removeprefix(DENSE_PREFIX): span for name, span in spans.items() if ".mlp." in name}
    check_agreement(found, expected, str(where))


def _check_router_space(spans: Mapping[str, Span], architecture: Architecture, where: Path) -> None:
    hidden = architecture.hidden_size
    expected = {}
    for layer in range(architecture.num_hidden_layers):
        prefix = f"{ROUTER_SPACE_PREFIX}layers.{layer}"
        expected[f"{prefix}.mean"] = TensorType("F32", (hidden,))
        expected[f"{prefix}.covariance_factor"] = TensorType("F32", (min(hidden, 256), hidden))
        expected[f"{prefix}.covariance_diagonal"] = TensorType("F32", (hidden,))
    found = {name: span for name, span in spans.items() if name.startswith(ROUTER_SPACE_PREFIX)}
    check_agreement(found, expected, str(where / ROUTER_SPACE_FILE))


def _copy(source: Path, target: Path) -> None:
    with target.open("xb") as file:
        copy_range(source, 0, file.fileno(), 0, source.stat().st_size)
