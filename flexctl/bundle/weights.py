"""What a runnable model consists of, whatever bundle it comes from: the one thing that model code reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexctl.bundle.codec import json_digest
from flexctl.bundle.hashing import hash_raw, in_parallel
from flexctl.bundle.manifest import Architecture, digest_of
from flexctl.bundle.names import PUBLIC
from flexctl.bundle.tensors import RawTensor, Span

__all__ = ["Weights", "dense_weights", "weights_digest", "zero_rows"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """A model as named tensors, memory-mapped.

    Attributes:
        dense_config: config.json of the dense class.
        shared: Tensors outside the feed-forward networks, by their names in the dense checkpoint.
        experts: Expert's name -> expert tensor name (``layers.{i}.mlp.gate_proj.weight``) -> tensor; ``public``
            first, then by name.
        router: Rows of each layer, (num_experts, hidden_size), F32, in the order of ``experts``.
        num_experts_per_tok: Experts kept for each token, at most the number of experts.
    """

    dense_config: Mapping[str, Any]
    shared: Mapping[str, RawTensor]
    experts: Mapping[str, Mapping[str, RawTensor]]
    router: tuple[RawTensor, ...]
    num_experts_per_tok: int


def weights_digest(weights: Weights) -> str:
    """Return ``sha256:<hex>`` of all that decides a model's logits: config, tensors, experts kept for each token.

    Every byte is hashed, as a memory map.
    """
    named = {
        **weights.shared,
        **{f"{expert} {name}": raw for expert, own in weights.experts.items() for name, raw in own.items()},
        **{f"router {layer}": rows for layer, rows in enumerate(weights.router)},
    }
    infos = dict(zip(named, in_parallel(hash_raw, named.values()), strict=True))
    content = {
        "config": weights.dense_config,
        "experts": list(weights.experts),
        "num_experts_per_tok": weights.num_experts_per_tok,
        "tensors": digest_of(infos),
    }
    return json_digest(content)


def zero_rows(num_hidden_layers: int, hidden_size: int) -> tuple[RawTensor, ...]:
    """Return the router rows of a model of the public expert alone, (1, hidden_size) a layer, F32."""
    return (RawTensor("F32", (1, hidden_size), np.zeros(4 * hidden_size, np.uint8)),) * num_hidden_layers


def dense_weights(
    config: Mapping[str, Any], architecture: Architecture, shared: Mapping[str, Span], feed_forward: Mapping[str, Span]
) -> Weights:
    """Return a dense model as one of the public expert alone, whose router rows are zero.

    Args:
        config: config.json of the dense class.
        architecture: Its sizes.
        shared: Where the weights outside the feed-forward networks lie, by dense name.
        feed_forward: Where the others lie, by expert tensor name.
    """
    return Weights(
        dense_config=config,
        shared={name: span.read() for name, span in shared.items()},
        experts={PUBLIC: {name: span.read() for name, span in feed_forward.items()}},
        router=zero_rows(architecture.num_hidden_layers, architecture.hidden_size),
        num_experts_per_tok=1,
    )
