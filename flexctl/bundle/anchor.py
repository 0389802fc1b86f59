"""Anchors: a stock dense checkpoint with a manifest, its router space and its public sample beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import indented_json, parse_json, read_bytes
from flexctl.bundle.copying import copy_range
from flexctl.bundle.hashing import hash_file, hash_weights
from flexctl.bundle.headers import read_header
from flexctl.bundle.layout import index_json, stock_head
from flexctl.bundle.manifest import (
    MANIFEST_FILE,
    PUBLIC_SAMPLE_FILE,
    AnchorManifest,
    Architecture,
    digest_of,
    write_manifest,
)
from flexctl.bundle.names import check_anchor_name
from flexctl.bundle.stock import (
    CONFIG_FILE,
    DENSE_PREFIX,
    INDEX_FILE,
    architecture_of,
    check_feed_forward,
    checkpoint_spans,
    indexed_spans,
    is_stock_file,
    read_dense_config,
    stock_bytes,
    without_pointers,
)
from flexctl.bundle.store import new_directory
from flexctl.bundle.tensors import RawTensor, Span, TensorType, check_agreement
from flexctl.bundle.validation import read_directory_manifest
from flexctl.bundle.weights import Weights, dense_weights
from flexctl.errors import BundleError
from flexctl.families import feed_forward_names

__all__ = [
    "ROUTER_SPACE_PREFIX",
    "Anchor",
    "open_anchor",
    "write_anchor",
    "write_tensors",
]

ROUTER_SPACE_FILE = "router-space.safetensors"
ROUTER_SPACE_PREFIX = "router_space."


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

    @property
    def is_calibrated(self) -> bool:
        """Whether owners can train against it: see the manifest's."""
        return self.manifest.is_calibrated

    def weights(self) -> Weights:
        """Return the anchor as a model of one expert, whose router rows are zero."""
        return dense_weights(self.config, self.manifest.architecture, self.shared(), self.feed_forward())

    def router_space(self) -> dict[str, RawTensor]:
        """Return the tensors of router-space.safetensors by their names there.

        Raises:
            BundleError: It was adopted without public text and has none.
        """
        self.refuse_uncalibrated()
        prefix = ROUTER_SPACE_PREFIX
        return {n.removeprefix(prefix): span.read() for n, span in self.spans.items() if n.startswith(prefix)}

    def public_sample(self) -> dict[str, RawTensor]:
        """Return the tensors of public-sample.safetensors.

        Raises:
            BundleError: It was adopted without public text and has none.
        """
        self.refuse_uncalibrated()
        header = read_header(self.path / PUBLIC_SAMPLE_FILE)
        return {name: span.read() for name, span in header.tensors.items()}

    def refuse_uncalibrated(self) -> None:
        """Refuse an anchor that nothing can be trained against.

        Raises:
            BundleError: It was adopted without public text.
        """
        if not self.is_calibrated:
            raise BundleError(
                f"{self.path}: has neither router space nor public sample, as it was adopted without public text",
                hint="flexctl adopt makes both of `data`; its experts must then come from the same run",
            )


def open_anchor(path: Path) -> Anchor:
    """Return the anchor in a directory, after checking manifest, headers and config.json.

    The tensors' bytes and the other files are verify's and merge's to hash.

    Raises:
        UsageError: There is no such directory.
        BundleError: It is no anchor, or manifest, headers and config.json do not agree.
    """
    manifest = read_directory_manifest(path)
    if not isinstance(manifest, AnchorManifest):
        raise BundleError(f"{path / MANIFEST_FILE}: kind is {manifest.kind!r}; expected 'anchor'")
    config_bytes = read_bytes(path / CONFIG_FILE)
    if hashlib.sha256(config_bytes).hexdigest() != manifest.files.get(CONFIG_FILE):
        raise BundleError(f"{path / CONFIG_FILE}: its bytes are not those of the manifest", hint="fetch it again")
    weights = checkpoint_spans(path)
    _check_index(path, weights)
    spans = weights | (_router_space_spans(path) if manifest.is_calibrated else {})
    check_agreement(spans, manifest.tensors, str(path))
    check_feed_forward(spans, manifest.architecture, path)
    if manifest.is_calibrated:
        _check_router_space(spans, manifest.architecture, path)
    config = without_pointers(parse_json(config_bytes, str(path / CONFIG_FILE)))
    return Anchor(path=path, manifest=manifest, config=config, spans=spans)


def write_anchor(
    path: Path,
    *,
    checkpoint: Path,
    name: str,
    moe_config: Mapping[str, Any],
    router_space: Mapping[str, RawTensor] | None,
    public_sample: Mapping[str, RawTensor] | None,
    overwrite: bool,
    license: str | None = None,
    run: Mapping[str, Any] | None = None,
) -> Anchor:
    """Make an anchor of a stock dense checkpoint. Files are copied, never linked.

    Only fields that point to code, or to weights by another name, go out of config.json and tokenizer_config.json.

    Args:
        path: Directory to write.
        checkpoint: Directory with config.json, weights as safetensors, tokenizer files.
        name: How people call it; letters, digits, '.', '_' and '-'.
        moe_config: Finished config of the mixture class; counts in it are of no account.
        router_space: ``layers.{i}.mean``, ``.covariance_factor``, ``.covariance_diagonal``, F32; also
            ``.variety_factor`` and ``.variety_diagonal`` where other kinds of text were measured. None where there was
            no public text to measure.
        public_sample: Tensors of the public sample, written as they are; None in the same case.
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
    architecture = architecture_of(config, spans, checkpoint)
    with new_directory(path, kind="anchor", overwrite=overwrite) as folder:
        for file in sorted({span.path.name for span in spans.values()}):
            _copy(checkpoint / file, folder / file)
        # Servers that load every safetensors file of a directory keep to an index where there is one.
        (folder / INDEX_FILE).write_bytes(index_json({name: spans[name].path.name for name in sorted(spans)}, spans))
        stock = sorted(item.name for item in checkpoint.iterdir() if item.is_file() and is_stock_file(item.name))
        for file in stock:
            _copy_stock(checkpoint / file, folder / file)
        copied, hashed = checkpoint_spans(folder), list(stock)
        if router_space is not None and public_sample is not None:
            write_tensors(folder / ROUTER_SPACE_FILE, router_space)
            write_tensors(folder / PUBLIC_SAMPLE_FILE, public_sample)
            copied |= _router_space_spans(folder)
            hashed.append(PUBLIC_SAMPLE_FILE)
        tensors = hash_weights(copied)
        files = {file: hash_file(folder / file) for file in sorted(hashed)}
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


def write_tensors(path: Path, tensors: Mapping[str, RawTensor]) -> None:
    """Write a safetensors file of tensors in memory, in the order given."""
    with path.open("xb") as file:
        file.write(stock_head(tensors))
        for tensor in tensors.values():
            file.write(tensor.view())


def _router_space_spans(path: Path) -> dict[str, Span]:
    tensors = read_header(path / ROUTER_SPACE_FILE).tensors
    return {ROUTER_SPACE_PREFIX + name: span for name, span in tensors.items()}


def _check_router_space(spans: Mapping[str, Span], architecture: Architecture, where: Path) -> None:
    hidden = architecture.hidden_size
    parts = ["covariance"]
    if f"{ROUTER_SPACE_PREFIX}layers.0.variety_factor" in spans:
        parts.append("variety")
    expected = {}
    for layer in range(architecture.num_hidden_layers):
        prefix = f"{ROUTER_SPACE_PREFIX}layers.{layer}"
        expected[f"{prefix}.mean"] = TensorType("F32", (hidden,))
        for part in parts:
            expected[f"{prefix}.{part}_factor"] = TensorType("F32", (min(hidden, 256), hidden))
            expected[f"{prefix}.{part}_diagonal"] = TensorType("F32", (hidden,))
    found = {name: span for name, span in spans.items() if name.startswith(ROUTER_SPACE_PREFIX)}
    check_agreement(found, expected, str(where / ROUTER_SPACE_FILE))


def _check_index(path: Path, weights: Mapping[str, Span]) -> None:
    """Refuse an index that says anything but where the weights lie: software may go by it, and no hash binds it."""
    if (path / INDEX_FILE).is_file() and indexed_spans(path / INDEX_FILE) != weights:
        raise BundleError(f"{path / INDEX_FILE}: is not that of the weights beside it", hint="fetch it again")


def _copy_stock(source: Path, target: Path) -> None:
    if (kept := stock_bytes(source)) is None:
        _copy(source, target)
    else:
        target.write_bytes(kept)


def _copy(source: Path, target: Path) -> None:
    with target.open("xb") as file:
        copy_range(source, 0, file.fileno(), 0, source.stat().st_size)
