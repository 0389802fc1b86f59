"""A composition as something to run, before anything of it is written."""

from __future__ import annotations

import numpy as np

from flexctl.bundle.composition import Composition, LowRank, Part
from flexctl.bundle.hashing import StoredTensor
from flexctl.bundle.lowrank import expand_bytes
from flexctl.bundle.tensors import RawTensor
from flexctl.bundle.weights import Weights

__all__ = ["composed_weights"]


def composed_weights(composition: Composition) -> Weights:
    """Return the model that a composition will be, memory-mapped; low-rank experts are expanded into memory.

    Its bytes are not proven: that comes with writing.
    """
    public = composition.parts[0]
    return Weights(
        dense_config=composition.family.dense_config(composition.moe_config),
        shared={name: piece.span.read() for name, piece in composition.shared.items()},
        experts={part.entry.name: _feed_forward(part, public) for part in composition.parts},
        router=tuple(_rows(composition, layer) for layer in range(composition.architecture.num_hidden_layers)),
        num_experts_per_tok=min(composition.top_k, len(composition.parts)),
    )


def _feed_forward(part: Part, public: Part) -> dict[str, RawTensor]:
    return {
        name: source.span.read() if isinstance(source, StoredTensor) else _expanded(source, public.feed_forward[name])
        for name, source in part.feed_forward.items()
    }


def _expanded(source: LowRank, base: StoredTensor | LowRank) -> RawTensor:
    assert isinstance(base, StoredTensor)
    blocks = list(expand_bytes(base.span, source.a.span, source.b.span))
    return RawTensor(base.span.dtype, base.span.shape, np.concatenate(blocks))


def _rows(composition: Composition, layer: int) -> RawTensor:
    """Return one layer's router rows, (num_experts, hidden_size), F32."""
    size = composition.architecture.hidden_size
    rows = [part.rows[layer].load() if part.rows else bytes(4 * size) for part in composition.parts]
    return RawTensor("F32", (len(rows), size), np.frombuffer(b"".join(rows), np.uint8))
