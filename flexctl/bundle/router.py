"""Router files: rows without an expert, made by embed-router for train-expert to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.expert import embedded_manifest
from flexctl.bundle.hashing import hash_raw
from flexctl.bundle.headers import header_bytes
from flexctl.bundle.layout import ROUTER_TENSOR
from flexctl.bundle.manifest import MANIFEST_KEY, RouterInfo, RouterManifest, digest_of, write_manifest
from flexctl.bundle.names import check_expert_name
from flexctl.bundle.store import new_file
from flexctl.bundle.tensors import RawTensor, Span, TensorType, check_agreement, is_finite
from flexctl.errors import BundleError

__all__ = ["RouterFile", "open_router_file", "write_router_file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterFile:
    """Router rows on disk.

    Attributes:
        path: File.
        manifest: What it says about itself.
        span: Where the rows lie.
    """

    path: Path
    manifest: RouterManifest
    span: Span

    @property
    def digest(self) -> str:
        """What binds the rows."""
        return self.manifest.digest

    @property
    def info(self) -> RouterInfo:
        """How the rows came about."""
        return self.manifest.router

    @property
    def rows(self) -> RawTensor:
        """The rows, (num_hidden_layers, hidden_size), F32, memory-mapped."""
        return self.span.read()


def open_router_file(path: Path, anchor: Anchor | None = None) -> RouterFile:
    """Return the router file at ``path``, after checking header and manifest.

    Args:
        path: File.
        anchor: The one that the rows must have been made for.

    Raises:
        UsageError: There is no such file.
        BundleError: It is no router file, or was made for another anchor.
    """
    manifest, _, spans = embedded_manifest(path)
    if not isinstance(manifest, RouterManifest):
        raise BundleError(f"{path}: kind is {manifest.kind!r}; expected 'router'")
    rows = spans.get(ROUTER_TENSOR)
    layers = len(manifest.router.bias)
    if rows is None or len(rows.shape) != 2 or rows.shape[0] != layers:
        found = "missing" if rows is None else rows.shape
        raise BundleError(f"{path}: tensor {ROUTER_TENSOR} is {found}; expected ({layers}, hidden_size)")
    check_agreement(spans, {ROUTER_TENSOR: TensorType("F32", rows.shape)}, str(path))
    if anchor is not None and manifest.anchor.digest != anchor.digest:
        raise BundleError(
            f"{path}: anchor.digest is {manifest.anchor.digest} ({manifest.anchor.name}); "
            f"expected {anchor.digest} ({anchor.manifest.name})"
        )
    return RouterFile(path=path, manifest=manifest, span=rows)


def write_router_file(
    path: Path, *, anchor: Anchor, name: str, rows: RawTensor, router: RouterInfo, overwrite: bool
) -> RouterFile:
    """Write router rows as a file of their own.

    Args:
        path: File to write, ``NAME.st``.
        anchor: The one they were made for.
        name: Name of the expert that they are meant for.
        rows: (num_hidden_layers, hidden_size), F32.
        router: How they came about.
        overwrite: Whether a file that exists may be replaced.

    Raises:
        BundleError: The rows are misshaped, of another dtype, or not finite.
    """
    sizes = anchor.manifest.architecture
    expected = {ROUTER_TENSOR: TensorType("F32", (sizes.num_hidden_layers, sizes.hidden_size))}
    check_agreement({ROUTER_TENSOR: rows}, expected, str(path))
    if not is_finite(rows.dtype, rows.data):
        raise BundleError(f"{path}: tensor {ROUTER_TENSOR}: holds NaN or infinity")
    infos = {ROUTER_TENSOR: hash_raw(rows)}
    manifest = RouterManifest(
        name=check_expert_name(name, f"{path}: name"),
        digest=digest_of(infos),
        anchor=anchor.manifest.ref,
        router=router,
        tensors=infos,
    )
    with new_file(path, overwrite=overwrite) as temporary:
        text = write_manifest(manifest).decode("utf-8")
        temporary.write_bytes(header_bytes(expected, {MANIFEST_KEY: text}) + rows.data.tobytes())
        open_router_file(temporary)
    return open_router_file(path)
