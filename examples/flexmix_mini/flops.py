"""What training and running cost in floating-point operations, counted in products with weight matrices.

A product of one token's state with a matrix of n weights is 2n operations. Training a matrix takes three of them:
forward, for its input's gradient, for its own gradient; one that is frozen takes two, and one below everything that
trains takes one. Attention scores, norms and embeddings are left out, as is usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Matrices"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrices:
    """Weights in the matrices of a dense model.

    Attributes:
        layers: num_hidden_layers.
        attention: Of one layer's attention.
        feed_forward: Of one layer's feed-forward network.
        row: One expert's router row in one layer.
        head: Of the head.
    """

    layers: int
    attention: int
    feed_forward: int
    row: int
    head: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Matrices:
        """Return the matrices of a dense config.json."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        key_value = config.get("num_key_value_heads") or heads
        return cls(
            layers=config["num_hidden_layers"],
            attention=2 * hidden * head_dim * (heads + key_value),
            feed_forward=3 * hidden * config["intermediate_size"],
            row=hidden,
            head=hidden * config["vocab_size"],
        )

    def forward(self, active: int = 1, num_experts: int = 1) -> int:
        """Return the operations of running one token.

        Args:
            active: Feed-forward networks that run on it in each layer.
            num_experts: Experts in each layer; 1 is a dense model, without a router.
        """
        router = self.row * num_experts if num_experts > 1 else 0
        return 2 * (self.layers * (self.attention + active * self.feed_forward + router) + self.head)

    def training(self, active: int = 1, num_experts: int = 1) -> int:
        """Return the operations of training every weight on one token; for arguments see ``forward``."""
        return 3 * self.forward(active, num_experts)

    def pair_training(self) -> int:
        """Return the operations of training an expert beside the frozen public one on one token.

        Gradients go through everything above the first layer's expert, of which they take the last matrix; weights'
        own gradients are the expert's alone.
        """
        through = (self.layers - 1) * (self.attention + 2 * self.feed_forward + 2 * self.row) + self.head
        first = self.feed_forward // 3
        own = self.layers * (self.feed_forward + 2 * self.row)
        return self.forward(2, 2) + 2 * (through + first + own)
