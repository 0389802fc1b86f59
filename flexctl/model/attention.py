"""Causal attention in bfloat16 on a CPU, by products of matrices, which torch's own kernel there is slower than.

Shapes: B sequences, A heads, V key-value heads, G = A / V, S positions, D head_dim; R positions of a block of queries,
E positions up to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["block_attention", "is_block_attention", "register_attention"]

_NAME = "flexctl_causal"

_QUERIES = 256
"""R at most: what they score fits a core's cache, and later positions are left out block by block."""

_SCORES = 1 << 20
"""As many scores at most are there at once, but for those of one key."""


def register_attention() -> str:
    """Return the name by which a config asks for this attention: Transformers' sdpa, or ours where that is faster."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    return _NAME


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None or settings.get("dropout") or not is_block_attention(query, key):
        theirs: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return theirs
    return block_attention(query, key, value, settings["scaling"]).transpose(1, 2), None


def is_block_attention(query: Tensor, key: Tensor) -> bool:
    """Return whether causal attention of these, (B, A, S, D) and (B, V, S, D), is better off by ``block_attention``."""
    if query.device.type != "cpu" or not 1 < query.shape[2] == key.shape[2]:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype == torch.bfloat16


def block_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling Q K^T) V where a position sees itself and those before it, (B, A, S, D), bfloat16.

    Scores are bfloat16, as in Transformers' eager attention; products add up in float32, and softmax computes in it.
    Nothing is kept for the way back but the three inputs.

    Args:
        query: (B, A, S, D).
        key: (B, V, S, D), and likewise ``value``.
        scaling: Of the scores.
    """
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _BlockAttention.apply(query.bfloat16(), key.bfloat16(), value.bfloat16(), scaling)
        return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        out = torch.empty_like(query)
        for queries, seen, later in _blocks(query, key):
            shares = _shares(_beside(query[queries], later), key[seen], later, scaling)
            out[queries] = (shares @ value[seen]).reshape(out[queries].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for queries, seen, later in _blocks(query, key):
            asked, given = _beside(query[queries], later), _beside(grad[queries], later)
            shares = _shares(asked, key[seen], later, ctx.scaling)
            to_value[seen] += shares.mT @ given
            to_shares = given @ value[seen].mT
            to_scores = torch._softmax_backward_data(to_shares, shares, -1, shares.dtype).mul_(ctx.scaling)
            to_query[queries] = (to_scores @ key[seen]).reshape(to_query[queries].shape)
            to_key[seen] += to_scores.mT @ asked
        return to_query, to_key, to_value, None


_Where = tuple[int, slice, slice]
"""One sequence, some heads, some positions."""


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[_Where, _Where, Tensor]]:
    """Yield blocks of queries, what they see, and what their scores get, (G R, E): -inf where a position is later."""
    sequences, heads, positions, _ = key.shape
    shared = query.shape[1] // heads
    together = max(1, _SCORES // (shared * min(_QUERIES, positions) * positions))
    for start in range(0, positions, _QUERIES):
        end = min(start + _QUERIES, positions)
        later = query.new_full((end - start, end), float("-inf")).triu_(start + 1).repeat(shared, 1)
        for sequence, first in product(range(sequences), range(0, heads, together)):
            last = first + together
            queries = (sequence, slice(shared * first, shared * last), slice(start, end))
            yield queries, (sequence, slice(first, last), slice(end)), later


def _beside(block: Tensor, later: Tensor) -> Tensor:
    """Return a block's heads that share a key one behind the other, (heads, G R, D)."""
    return block.reshape(-1, len(later), block.shape[-1])


def _shares(query: Tensor, key: Tensor, later: Tensor, scaling: float) -> Tensor:
    """Return what each of a block's queries takes of each position up to its end, (heads, G R, E)."""
    return torch.baddbmm(later, query, key.mT, alpha=scaling).softmax(dim=-1)
