"""What a training step of a pair takes: memory of a device and operations, from an anchor's sizes. Numbers, no modules.

docs/scaling.md derives every term; tests hold them against what torch allocates. Letters as there: H hidden_size,
I intermediate_size, L num_hidden_layers, V vocab_size, Q and K the widths of all queries and of all keys, T tokens of a
micro-batch, S of a sequence, r rank, P processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexctl.families import FAMILIES
from flexctl.model.losses import CARD_LOGITS, LOGIT_BUDGET
from flexctl.model.rounded import CAN_KEEP
from flexctl.training.loop import MOVES

__all__ = ["PARTS", "Sizes", "Step", "flops_per_token", "least_bytes", "memory_of_step"]

PARTS = ("frozen", "trained", "gradients", "moments", "activations", "logits", "workspace", "gathered")
"""What memory is taken by, in the order in which it is shown."""

_FULL = 4
"""Bytes of a float32: what trains and AdamW's moments, whatever products are in, and most gradients."""

_MATRICES = 3
"""Of a feed-forward network."""

_NORMS_QUERIES = ("olmo2", "qwen3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """An anchor's sizes.

    Attributes:
        hidden: H.
        inner: I.
        layers: L.
        vocab: V.
        queries: Q.
        keys: K.
        is_tied: Whether the head is the embedding.
        norms_queries: Whether queries and keys are normed.
    """

    hidden: int
    inner: int
    layers: int
    vocab: int
    queries: int
    keys: int
    is_tied: bool
    norms_queries: bool

    @classmethod
    def of(cls, moe_config: Mapping[str, Any]) -> Sizes:
        """Return the sizes in a finished config of the mixture class: an anchor's, or of ``resolve_moe_config``."""
        hidden, heads = int(moe_config["hidden_size"]), int(moe_config["num_attention_heads"])
        head = int(moe_config.get("head_dim") or hidden // heads)
        dense = {family.moe_type: family.dense_type for family in FAMILIES}[moe_config["model_type"]]
        return cls(
            hidden=hidden,
            inner=int(moe_config.get("moe_intermediate_size") or moe_config["intermediate_size"]),
            layers=int(moe_config["num_hidden_layers"]),
            vocab=int(moe_config["vocab_size"]),
            queries=heads * head,
            keys=int(moe_config.get("num_key_value_heads") or heads) * head,
            is_tied=bool(moe_config.get("tie_word_embeddings")),
            norms_queries=dense in _NORMS_QUERIES,
        )

    @property
    def attention(self) -> int:
        """Weights of a layer's attention: 2 H (Q + K)."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def network(self) -> int:
        """Weights of a feed-forward network: 3 H I."""
        return 3 * self.hidden * self.inner

    @property
    def ends(self) -> int:
        """Weights of embedding and head."""
        return (1 if self.is_tied else 2) * self.vocab * self.hidden

    @property
    def frozen(self) -> int:
        """Weights of the anchor, N, without its norms, which are as good as nothing."""
        return self.in_layers + self.ends

    @property
    def in_layers(self) -> int:
        """Weights of all layers."""
        return self.layers * (self.attention + self.network)

    def trained(self, rank: int | None) -> int:
        """Weights that train in a layer, n / L; ``rank`` None is a full expert."""
        return self.network if rank is None else 3 * rank * (self.hidden + self.inner)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How a device takes its part in a step.

    Attributes:
        tokens: T, those that go through the model at once.
        seq_len: S.
        item_bytes: Of a frozen weight and of what products give: 2 in bfloat16, 4 in float32.
        rank: r; None is a full expert.
        recompute: Whether layers compute again on the way back.
        accumulates: Whether a step takes several micro-batches, so that gradients are there from the second on.
        public_share: Share of the tokens that the match looks at.
        on_card: Whether it is a GPU, where norms keep their input as it is and more logits exist at once.
        processes: P.
    """

    tokens: int
    seq_len: int
    item_bytes: int
    rank: int | None
    recompute: bool
    accumulates: bool
    public_share: float
    on_card: bool
    processes: int = 1


def memory_of_step(sizes: Sizes, step: Step) -> dict[str, int]:
    """Return bytes by ``PARTS`` at the moment of a step when most are taken: their sum is the peak of a device."""
    parts = max(_moments_of_a_step(sizes, step), key=lambda taken: sum(taken.values()))
    trained = sizes.layers * sizes.trained(step.rank) / step.processes
    held = {
        "frozen": (sizes.in_layers / step.processes + sizes.ends) * step.item_bytes,
        "trained": _FULL * trained,
        "moments": 2 * _FULL * trained,
        "gathered": _gathered(sizes, step) if step.processes > 1 else 0.0,
    }
    return {name: round((held | parts).get(name, 0.0)) for name in PARTS}


def least_bytes(sizes: Sizes, step: Step) -> int:
    """Return what a step cannot do without, at any moment of it: a run that fits takes no less.

    Weights and moments, and either all gradients or the values inside the feed-forward networks.
    """
    trained = sizes.layers * sizes.trained(step.rank)
    inside = 0 if step.recompute else (sizes.layers - 1) * 5 * sizes.inner * step.item_bytes * step.tokens
    held = sizes.frozen * step.item_bytes + 3 * _FULL * trained
    return held // step.processes + max(_gradient_bytes(step) * trained // step.processes, inside)


def flops_per_token(sizes: Sizes, seq_len: int, rank: int | None, *, recompute: bool = False) -> int:
    """Return the operations of a pair's step a token, two for a multiplication with its addition.

    Args:
        sizes: The anchor's.
        seq_len: S.
        rank: r; None is a full expert.
        recompute: Whether the layers' forward pass is made twice, which docs/benchmarks.md does not count.

    Source: docs/benchmarks.md, the table of operations, with 2 H (Q + K) for attention of any width.
    """
    low = sizes.trained(rank) if rank is not None else 0
    # A low-rank expert and the public one have one product with each public matrix between them.
    networks = 2 * sizes.network if rank is None else sizes.network + low
    layer, scores = sizes.attention + networks, seq_len * sizes.queries
    head = sizes.vocab * sizes.hidden
    forward = sizes.layers * (layer + scores)
    # Below the first trained network nothing goes back; in it, only through its last matrix.
    back = (sizes.layers - 1) * (layer + 2 * scores) + sizes.network // 3
    weights = sizes.layers * (low or sizes.network)
    return 2 * (forward + back + weights + 2 * head + (forward if recompute else 0))


def _moments_of_a_step(sizes: Sizes, step: Step) -> list[dict[str, float]]:
    """Return what is taken beside weights and moments where that can be most: on the turn, and on the way back."""
    first, layer = _first_layer(sizes, step), _layer(sizes, step)
    everything = (
        step.tokens * sizes.layers * (sizes.hidden * step.item_bytes)
        if step.recompute
        else first + (sizes.layers - 1) * layer
    )
    casts = _casts(sizes, step)
    gradients = _gradient_bytes(step) * sizes.layers * sizes.trained(step.rank) / step.processes
    there = gradients if step.accumulates else 0.0
    states = step.tokens * sizes.hidden * step.item_bytes
    work = _work(sizes, step)
    again = layer + casts / sizes.layers if step.recompute else casts
    # What autocast rounds it holds until the pass is over, whoever computes again.
    rounded = 0.0 if step.recompute and step.rank is None else casts
    return [
        {"gradients": there, "activations": everything + rounded, "logits": _logits(sizes, step) + states},
        {"gradients": there, "activations": everything + again, "workspace": work + states},
        {
            "gradients": max(there, gradients * (1 - 1 / sizes.layers)),
            "activations": (0.0 if step.recompute else first) + layer + 2 * casts / sizes.layers,
            "workspace": work,
        },
        {"gradients": gradients, "activations": first + casts / sizes.layers, "workspace": work},
        {"gradients": gradients + _widened(sizes, step)},
    ]


def _gradient_bytes(step: Step) -> int:
    """Return the bytes of a number of a gradient: as products give it where a full expert's step has one way back."""
    stays = CAN_KEEP and step.rank is None and step.processes == 1 and not step.accumulates
    return step.item_bytes if stays else _FULL


def _widened(sizes: Sizes, step: Step) -> float:
    """Return the bytes of the gradients that are float32 at once while the step is made; none where they all were."""
    matrices = sizes.layers * _MATRICES
    together = -(-matrices // MOVES)
    return 0.0 if _gradient_bytes(step) == _FULL else _FULL * together * sizes.network / _MATRICES


def _layer(sizes: Sizes, step: Step) -> float:
    """Return the bytes that a layer keeps for the way back."""
    heads = sizes.queries + sizes.keys
    # A low-rank expert is mixed with the public one inside the networks and not behind them.
    networks = 5 * sizes.inner + 3 * sizes.hidden if step.rank is None else 6 * sizes.inner + 2 * sizes.hidden
    # Attention by blocks does not read again what it gave.
    by_blocks = not step.on_card and step.item_bytes != _FULL
    attended = sizes.queries + 2 * sizes.keys + (0 if by_blocks else sizes.queries)
    plain = networks + attended + 3 * (step.rank or 0)
    normed = 2 * sizes.hidden + (heads if sizes.norms_queries else 0)
    widths = step.item_bytes * plain + (step.item_bytes if step.on_card else _FULL) * normed
    return step.tokens * widths + _matched(sizes, step)


def _first_layer(sizes: Sizes, step: Step) -> float:
    """Return the bytes that the first layer keeps: nothing goes back but what its own network needs."""
    plain = 3 * sizes.inner + 3 * sizes.hidden + 3 * (step.rank or 0)
    return step.tokens * step.item_bytes * plain + _matched(sizes, step)


def _matched(sizes: Sizes, step: Step) -> float:
    """Return the bytes of a layer's differences on public tokens, which the match keeps."""
    return step.tokens * step.public_share * sizes.hidden * _FULL


def _casts(sizes: Sizes, step: Step) -> float:
    """Return the bytes of the trained weights in the dtype of products, kept for the way back.

    Several processes gather them in that dtype, and again on the way back.
    """
    return (
        0.0
        if step.item_bytes == _FULL or step.processes > 1
        else sizes.layers * sizes.trained(step.rank) * step.item_bytes
    )


def _logits(sizes: Sizes, step: Step) -> float:
    """Return the bytes of a chunk's logits: as products give them, as float32, and their logarithms."""
    chunk = min(step.tokens * sizes.vocab, LOGIT_BUDGET * (CARD_LOGITS if step.on_card else 1))
    return chunk * (2 * _FULL if step.item_bytes == _FULL else 2 * _FULL + step.item_bytes)


def _work(sizes: Sizes, step: Step) -> float:
    """Return the bytes of what a network's way back has at once: gradients at its inner values, and of a matrix."""
    matrix = sizes.trained(step.rank) / _MATRICES
    # Until it is float32, and until that is added to others.
    fresh = (step.item_bytes if step.item_bytes < _gradient_bytes(step) else 0) + (_FULL if step.accumulates else 0)
    # A low-rank expert and the public one go back together.
    widths = 3 * (sizes.inner + sizes.hidden) if step.rank is None else 5 * sizes.inner + 2 * sizes.hidden
    return step.tokens * step.item_bytes * widths + matrix * fresh


def _gathered(sizes: Sizes, step: Step) -> float:
    """Return the bytes of what every process has whole for a while: the weights of two layers, a layer's gradients.

    The next layer's weights come while one computes; gradients are made in the dtype of products and summed as float32.
    """
    trained = sizes.trained(step.rank)
    layer = sizes.attention + sizes.network + trained
    return 2 * layer * step.item_bytes + trained * (step.item_bytes + _FULL)
