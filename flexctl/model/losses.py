"""Next-token losses in which the logits of a whole batch never exist at once.

Shapes: B sequences, S positions, T = B S tokens, H hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["CARD_LOGITS", "LOGIT_BUDGET", "Loss", "score_tokens", "training_loss"]

Loss = Callable[[nn.Module, Tensor, Tensor, float, "Tensor | None"], Tensor]
"""Called as ``training_loss`` is, with model, inputs, targets, z_loss and weights."""

LOGIT_BUDGET = 4 * 1024 * 1024
"""Logits that may exist at once; positions are taken in chunks of LOGIT_BUDGET / vocab_size.

More of them are slower on a CPU: memory of that size is given back to the system and asked for again each time.
"""

CARD_LOGITS = 32
"""As many times LOGIT_BUDGET: products of fewer rows leave a GPU idle."""


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
    each = None if weights is None else weights.flatten()
    size = _positions_at_once(head)
    loss: Tensor = _HeadLoss.apply(states.flatten(0, 1), head.weight, targets.flatten(), each, z_loss, size)
    return loss


class _HeadLoss(torch.autograd.Function):
    """The loss over a linear head; its gradient is made in the forward pass, chunk by chunk, so no logits are kept.

    Nothing is computed twice: a chunk's logits become its loss, and at once the gradients at what it came from.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        z_loss: float,
        size: int,
    ) -> Tensor:
        """Return the loss, (), float32.

        Args:
            ctx: Keeps the gradients at states, (T, H), and at the head, (V, H), as far as they are needed.
            states: (T, H).
            head: (V, H).
            targets: (T,), int64.
            weights: (T,), float32, or None.
            z_loss: As for ``training_loss``.
            size: Tokens in a chunk.
        """
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        rows = head.to(dtype)
        at_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        at_head = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), device=states.device)
        with torch.autocast(kind, enabled=False):
            for first in range(0, len(states), size):
                part = slice(first, first + size)
                chunk, ids = states[part].to(dtype), targets[part, None]
                logits = F.linear(chunk, rows)
                logs = logits.log_softmax(dim=-1, dtype=torch.float32)
                partition = logits.gather(1, ids).float() - logs.gather(1, ids)
                losses = z_loss * partition.square() - logs.gather(1, ids)
                weight = None if weights is None else weights[part, None]
                total += losses.sum() if weight is None else (weight * losses).sum()
                if at_states is None and at_head is None:
                    continue
                # d loss / d logits = s (p - [target] / (1 + 2 z log Z)), where s = weight (1 + 2 z log Z) a token
                # is taken out of the products: they are of V numbers a token, and what goes in or comes out of H.
                slope = 1 + 2 * z_loss * partition
                logits.copy_(logs.exp_().scatter_add_(1, ids, -1 / slope))
                slope = slope if weight is None else slope * weight
                if at_states is not None:
                    at_states[part] = (logits @ rows) * slope
                if at_head is not None:
                    at_head += logits.T @ (chunk * slope).to(dtype)
        ctx.gradients = (at_states, None if at_head is None else at_head.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients at states and head; the other arguments have none."""
        at_states, at_head = (None if one is None else one * at_loss.to(one.dtype) for one in ctx.gradients)
        return at_states, at_head, None, None, None, None


def _positions_at_once(head: Any) -> int:
    budget = LOGIT_BUDGET * (CARD_LOGITS if head.weight.is_cuda else 1)
    return max(1, budget // int(head.out_features))


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
    size = _positions_at_once(head)
    losses = [
        F.cross_entropy(head(chunk).float(), ids, reduction="none")
        for chunk, ids in zip(flat.split(size), wanted.split(size), strict=True)
    ]
    return torch.cat(losses).reshape(targets.shape)
