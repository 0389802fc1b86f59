"""Many sequences in one forward pass: their tokens in one row, without padding, their keys and values by slots.

A sequence has a slot of its own while it lasts. Each of its tokens sees the keys and values of that slot alone, so what
another sequence says, how long it is and which experts answer it makes no difference.

Shapes: T tokens of a pass, m of them alone in their sequence; A heads, V key-value heads, G = A / V, D head_dim;
S slots, C positions that a slot holds now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SlotCache", "Span", "forward"]

_ATTENTION = "flexctl_slots"
_LEAST_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of one sequence in a forward pass.

    Attributes:
        slot: The sequence's.
        start: Position of the first, which is how many tokens its slot holds already.
        length: How many.
    """

    slot: int
    start: int
    length: int

    @property
    def end(self) -> int:
        """Position behind the last."""
        return self.start + self.length


class SlotCache:
    """Keys and values of up to ``slots`` sequences. It grows with the longest one.

    Args:
        model: As from ``build_model``. From here on it runs by ``forward`` alone.
        slots: S.
        context: The most positions that a sequence can have.
    """

    def __init__(self, model: Any, slots: int, context: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attend)
        model.set_attn_implementation(_ATTENTION)
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._context = context
        shape = (slots, config.num_key_value_heads, 0, head_dim)
        empty = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.model.layers]
        self.keys, self.values = empty, list(empty)

    def reserve(self, positions: int) -> None:
        """Make room for sequences of so many tokens."""
        held = self.keys[0].shape[2]
        if positions <= held:
            return
        wanted = min(self._context, max(_LEAST_POSITIONS, 2 * held, positions))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = F.pad(old, (0, 0, 0, wanted - held))

    def wipe(self, slot: int) -> None:
        """Forget a sequence; its slot is free for another."""
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One forward pass: which token is whose. Masks are the same in all layers of one window and are made once.

    Attributes:
        cache: Where keys and values are.
        spans: Those of one token first.
        slots: Of each token, (T,), int64.
        positions: Of each token in its sequence, (T,), int64.
        alone: m.
        masks: What tokens see, by slot (-1 for those that are alone) and window.
    """

    cache: SlotCache
    spans: tuple[Span, ...]
    slots: Tensor
    positions: Tensor
    alone: int
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)

    def sees(self, span: Span, window: int | None) -> Tensor | None:
        """Return what the tokens of a span see, (length, end), bool; None is all up to themselves, from the start.

        Args:
            span: One of the pass.
            window: How far back a token sees; None is to the start.
        """
        if not span.start and (window is None or span.end <= window):
            return None
        key = (span.slot, window)
        if key not in self.masks:
            own = torch.arange(span.start, span.end, device=self.positions.device)
            self.masks[key] = _sees(own[:, None], span.end, window)
        return self.masks[key]

    def alone_see(self, window: int | None) -> Tensor:
        """Return what the tokens see that are alone in their sequences, (S', 1, 1, C'), bool, by slot."""
        key = (-1, window)
        if key not in self.masks:
            self.masks[key] = self._alone_see(window)
        return self.masks[key]

    def _alone_see(self, window: int | None) -> Tensor:
        alone = self.spans[: self.alone]
        rows, columns = max(span.slot for span in alone) + 1, max(span.end for span in alone)
        positions = self.positions.new_zeros(rows, 1)
        positions[self.slots[: len(alone)], 0] = self.positions[: len(alone)]
        return _sees(positions, columns, window)[:, None, None]


def _sees(positions: Tensor, columns: int, window: int | None) -> Tensor:
    """Return which of the first ``columns`` positions tokens at ``positions`` (..., 1) see, (..., columns), bool."""
    keys = torch.arange(columns, device=positions.device)
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)


def forward(model: nn.Module, cache: SlotCache, spans: Sequence[Span], tokens: Tensor, wanted: Tensor) -> Tensor:
    """Return the logits of some tokens of a pass, (wanted, vocab_size), float32; no gradients.

    Args:
        model: That of ``cache``.
        cache: Has room for all spans; their keys and values are in it afterwards.
        spans: Those of one token first. A slot occurs once.
        tokens: Ids, in the order of the spans, (T,), int64.
        wanted: Which tokens' logits, (wanted,), int64.
    """
    device = tokens.device
    slots = torch.tensor([span.slot for span in spans for _ in range(span.length)]).to(device)
    positions = torch.cat([torch.arange(span.start, span.end) for span in spans]).to(device)
    plan = _Plan(cache, tuple(spans), slots, positions, sum(span.length == 1 for span in spans))
    with torch.no_grad():
        out = model(tokens[None], position_ids=positions[None], use_cache=False, logits_to_keep=wanted, plan=plan)
    logits: Tensor = out.logits[0].float()
    return logits


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    plan: _Plan,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return what the tokens attend to, (1, T, A, D): an attention function of Transformers.

    Args:
        module: The layer's attention.
        query: (1, A, T, D).
        key: (1, V, T, D), and likewise ``value``.
        plan: The pass.
        scaling: Of the products.
        sliding_window: How far back a token sees; None is to the start.
    """
    keys, values = plan.cache.keys[module.layer_idx], plan.cache.values[module.layer_idx]
    keys[plan.slots, :, plan.positions] = key[0].transpose(0, 1)
    values[plan.slots, :, plan.positions] = value[0].transpose(0, 1)
    begin = plan.alone
    parts = []
    if begin:
        seen_alone = plan.alone_see(sliding_window)
        alone = query[0, :, :begin].transpose(0, 1)
        parts.append(_attend_alone(alone, keys, values, plan.slots[:begin], seen_alone, scaling))
    for span in plan.spans[begin:]:
        seen = plan.sees(span, sliding_window)
        mine = slice(span.slot, span.slot + 1)
        out = F.scaled_dot_product_attention(
            query[:, :, begin : begin + span.length],
            keys[mine, :, : span.end],
            values[mine, :, : span.end],
            attn_mask=seen,
            is_causal=seen is None,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        parts.append(out[0].transpose(0, 1))
        begin += span.length
    return torch.cat(parts)[None], None


def _attend_alone(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Return what tokens that are alone in their sequences attend to, (m, A, D), in one call.

    Heads that share keys and values stand as G queries of one head; slots between that are idle take part for nothing.

    Args:
        query: (m, A, D).
        keys: (S, V, C, D), and likewise ``values``.
        slots: Of the tokens, (m,).
        seen: What they see, (S', 1, 1, C'), S' slots and C' positions being all that take part.
        scaling: Of the products.
    """
    rows, columns = seen.shape[0], seen.shape[-1]
    heads, head_dim = query.shape[1:]
    by_slot = query.new_zeros(rows, keys.shape[1], heads // keys.shape[1], head_dim)
    by_slot[slots] = query.reshape(len(query), *by_slot.shape[1:])
    out = F.scaled_dot_product_attention(
        by_slot, keys[:rows, :, :columns], values[:rows, :, :columns], attn_mask=seen, scale=scaling
    )
    return out[slots].reshape(query.shape)
