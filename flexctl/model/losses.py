"""Next-token losses in which the logits of a whole batch never exist at once.

Shapes: B sequences, S positions, H hidden_size, V vocab_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ["LOGIT_BUDGET", "score_tokens", "training_loss"]

LOGIT_BUDGET = 16 * 1024 * 1024
"""Logits that may exist at once; positions are taken in chunks of LOGIT_BUDGET / vocab_size."""


def training_loss(
    model: nn.Module, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None = None
) -> Tensor:
    """Return cross-entropy plus ``z_loss`` times the squared log-partition, summed over positions, float32.

    Args:
        model: As from ``model.building.build_model``.
        inputs: Token ids, (B, S), int64.
        targets: The ids that follow, (B, S), int64.
        z_loss: Weight of log(Z)^2; FlexOlmo uses 1e-5.
        weights: Of the positions in the sum, (B, S), float32; None is 1 each.
    """
    states = model.base_model(inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    flat = [states.flatten(0, 1), targets.flatten(), *([] if weights is None else [weights.flatten()])]

    def part(chunk: Tensor, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        logits: Tensor = head(chunk).float()
        squares = logits.logsumexp(dim=-1).square()
        if weight is None:
            return F.cross_entropy(logits, ids, reduction="sum") + z_loss * squares.sum()
        return (weight * (F.cross_entropy(logits, ids, reduction="none") + z_loss * squares)).sum()

    size = max(1, LOGIT_BUDGET // head.out_features)
    if len(flat[0]) <= size:
        return part(*flat)
    pieces = zip(*(each.split(size) for each in flat), strict=True)
    return torch.stack([checkpoint(part, *piece, use_reentrant=False) for piece in pieces]).sum()


@torch.no_grad()
def score_tokens(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (B, S), float32.

    Args:
        model: As from ``model.building.build_model``.
        inputs: Token ids, (B, S), int64.
        targets: The ids that follow, (B, S), int64.
    """
    states = model.base_model(inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    flat, wanted = states.flatten(0, 1), targets.flatten()
    size = max(1, LOGIT_BUDGET // head.out_features)
    losses = [
        F.cross_entropy(head(chunk).float(), ids, reduction="none")
        for chunk, ids in zip(flat.split(size), wanted.split(size), strict=True)
    ]
    return torch.cat(losses).reshape(targets.shape)
