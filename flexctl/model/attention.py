"""Causal attention for training in bfloat16 on a CPU, by products of matrices: faster than torch's own kernel there.

Shapes: B sequences, A heads, V key-value heads, G = A / V, S positions, D head_dim; R positions of a block of queries,
E positions up to the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["attend_by_blocks", "register_attention"]

_NAME = "flexctl_causal"

_QUERIES = 256
"""R at most: what they score fits a core's cache, and later positions are left out block by block."""

_FEWEST = 16
"""R at least, where there are as many positions."""

_SCORES = 1 << 20
"""As many scores at most are there at once, unless _FEWEST queries of the heads that share one key have more."""

_SHORTEST = 64
"""S at least: below, torch's kernel is faster."""


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

    if attention_mask is not None or settings.get("dropout") or not _is_by_blocks(query, key):
        theirs: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return theirs
    return attend_by_blocks(query, key, value, settings["scaling"]).transpose(1, 2), None


def _is_by_blocks(query: Tensor, key: Tensor) -> bool:
    """Return whether attention of these, (B, A, S, D) and (B, V, S, D), is a training pass that is faster by blocks.

    Passes without a gradient are torch's: what answers and scores may cut or pad a text in more than one way, and with
    torch's kernel alone that makes no difference.
    """
    if query.device.type != "cpu" or not torch.is_grad_enabled() or not _SHORTEST <= query.shape[2] == key.shape[2]:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    return dtype == torch.bfloat16 and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    """Return whether this processor has products of bfloat16, as far as torch can tell; ARM was not measured."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask is not None)


def attend_by_blocks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Return softmax(scaling Q K^T) V where a position sees itself and those before it, (B, A, S, D), bfloat16.

    Scores are rounded to bfloat16, as in Transformers' eager attention. A product adds up in float32, as softmax does;
    what several blocks give one key adds up in bfloat16. For the way back the three inputs are kept, as bfloat16.

    Args:
        query: (B, A, S, D).
        key: (B, V, S, D), and likewise ``value``.
        scaling: Of the scores.
    """
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _ByBlocks.apply(query.bfloat16(), key.bfloat16(), value.bfloat16(), scaling)
        return out


class _ByBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        out = torch.empty_like(query)
        for queries, seen, later in _blocks(query, key):
            shares = _shares(_beside(query[queries], len(later)), key[seen], later, scaling)
            out[queries] = (shares @ value[seen]).reshape(out[queries].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        to_query, to_key, to_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for queries, seen, later in _blocks(query, key):
            asked, given = _beside(query[queries], len(later)), _beside(grad[queries], len(later))
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
    rows = min(positions, max(_FEWEST, min(_QUERIES, _SCORES // (shared * positions))))
    together = max(1, _SCORES // (shared * rows * positions))
    for start in range(0, positions, rows):
        end = min(start + rows, positions)
        later = query.new_full((end - start, end), float("-inf")).triu_(start + 1).repeat(shared, 1)
        for sequence, first in product(range(sequences), range(0, heads, together)):
            last = first + together
            queries = (sequence, slice(shared * first, shared * last), slice(start, end))
            yield queries, (sequence, slice(first, last), slice(end)), later


def _beside(block: Tensor, rows: int) -> Tensor:
    """Return a block with the queries of heads that share a key one behind the other, (V heads, ``rows``, D)."""
    return block.reshape(-1, rows, block.shape[-1])


def _shares(query: Tensor, key: Tensor, later: Tensor, scaling: float) -> Tensor:
    """Return what each of a block's queries takes of each position up to its end, (V heads, G R, E)."""
    return torch.baddbmm(later, query, key.mT, alpha=scaling).softmax(dim=-1)
