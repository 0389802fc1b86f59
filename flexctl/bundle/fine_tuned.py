"""Dense checkpoints that were fine-tuned elsewhere, held against their anchor: as bytes, in constant memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flexctl.bundle.anchor import ROUTER_SPACE_PREFIX, Anchor
from flexctl.bundle.hashing import Advance, StoredTensor, hash_weights, silent
from flexctl.bundle.manifest import TensorInfo, digest_of
from flexctl.bundle.stock import DENSE_PREFIX, EMBEDDING, HEAD, checkpoint_spans, read_dense_config
from flexctl.bundle.tensors import Span, Typed, check_agreement
from flexctl.bundle.weights import Weights, dense_weights
from flexctl.errors import BundleError

__all__ = ["DenseChanges", "DenseCheckpoint", "compare_dense", "open_dense"]

_TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
AnyTyped = TypeVar("AnyTyped", bound=Typed)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseCheckpoint:
    """A checkpoint with the very tensors of an anchor, its headers read and checked, its bytes not yet.

    Attributes:
        path: Directory.
        config: Its config.json.
        spans: Where its weights lie, by dense name.
    """

    path: Path
    config: Mapping[str, Any]
    spans: Mapping[str, Span]

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(span.stop - span.start for span in self.spans.values())

    def feed_forward(self, anchor: Anchor) -> dict[str, Span]:
        """Return {expert tensor name: where it lies}, in the order of expert files."""
        return {name: self.spans[DENSE_PREFIX + name] for name in anchor.feed_forward()}

    def weights(self, anchor: Anchor) -> Weights:
        """Return the dense model as it is, with all that moved."""
        owned = self.feed_forward(anchor)
        shared = {name: span for name, span in self.spans.items() if name.removeprefix(DENSE_PREFIX) not in owned}
        return dense_weights(self.config, anchor.manifest.architecture, shared, owned)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseChanges:
    """What one pass over a checkpoint's bytes finds.

    Attributes:
        digest: Of all its weights.
        feed_forward: Its feed-forward tensors by expert tensor name, with what their bytes are.
        changed: Those of them that differ from the anchor's, by expert tensor name.
        moved: Every other weight that differs from the anchor's, by dense name.
    """

    digest: str
    feed_forward: Mapping[str, StoredTensor]
    changed: tuple[str, ...]
    moved: tuple[str, ...]


def open_dense(path: Path, anchor: Anchor) -> DenseCheckpoint:
    """Return the dense checkpoint in a directory, after checking that it has the anchor's tensors.

    Where the head is tied to the embedding, it makes no difference which of the two sides has it in its files.

    Raises:
        BundleError: There are no safetensors, or a tensor is missing, extra, misshaped, or of another dtype.
    """
    spans, expected = checkpoint_spans(path), _weights_of(anchor)
    for name, tensor in expected.items():
        if name in spans and spans[name].dtype != tensor.dtype:
            raise BundleError(
                f"{spans[name].path}: tensor {name}: dtype is {spans[name].dtype}; the anchor's is {tensor.dtype}",
                hint=f"convert it: from_pretrained({path.name!r}, dtype={_TORCH_NAMES.get(tensor.dtype)!r})"
                ".save_pretrained(...)",
            )
    check_agreement(_with_head(spans, anchor), _with_head(expected, anchor), str(path))
    return DenseCheckpoint(path=path, config=read_dense_config(path), spans=spans)


def compare_dense(checkpoint: DenseCheckpoint, anchor: Anchor, advance: Advance = silent) -> DenseChanges:
    """Return where a checkpoint's bytes are not the anchor's, read once through small buffers.

    Args:
        checkpoint: As from ``open_dense``.
        anchor: The one that it was fine-tuned from.
        advance: Told the bytes done.

    Raises:
        BundleError: A tensor holds NaN or infinity, or a file ends early.
    """
    infos, expected = hash_weights(checkpoint.spans, advance), _weights_of(anchor)
    listed = {**expected, **infos}
    theirs, ours = _with_head(infos, anchor), _with_head(expected, anchor)
    differing = [name for name in sorted(listed) if theirs[name] != ours[name]]
    spans = checkpoint.feed_forward(anchor)
    pieces = {name: StoredTensor(DENSE_PREFIX + name, span, infos[DENSE_PREFIX + name]) for name, span in spans.items()}
    return DenseChanges(
        digest=digest_of(infos),
        feed_forward=pieces,
        changed=tuple(name for name in pieces if DENSE_PREFIX + name in differing),
        moved=tuple(name for name in differing if name.removeprefix(DENSE_PREFIX) not in pieces),
    )


def _weights_of(anchor: Anchor) -> dict[str, TensorInfo]:
    tensors = anchor.manifest.tensors
    return {name: info for name, info in tensors.items() if not name.startswith(ROUTER_SPACE_PREFIX)}


def _with_head(tensors: Mapping[str, AnyTyped], anchor: Anchor) -> dict[str, AnyTyped]:
    """Return the tensors, with the embedding as head where the two are tied and the head is in no file."""
    tied = anchor.manifest.moe_config.get("tie_word_embeddings") and EMBEDDING in tensors
    return {**tensors, **({HEAD: tensors[EMBEDDING]} if tied and HEAD not in tensors else {})}
