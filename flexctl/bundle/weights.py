"""What a runnable model consists of, whatever bundle it comes from: the one thing that model code reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexctl.bundle.tensors import RawTensor

__all__ = ["Weights"]


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
