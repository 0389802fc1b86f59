"""Several models on one window: a soup of its own for each, or their logits mixed token by token.

Shapes: M models, W windows, S positions, V vocab_size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.evaluation.baselines.windows import Floats, Windows
from flexctl.model.losses import LOGIT_BUDGET

__all__ = ["mixed_logit_losses", "soup_losses"]

_TOGETHER = 256


def soup_losses(
    models: Sequence[nn.Module],
    weights: Floats,
    windows: Windows,
    *,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Floats:
    """Return the losses of windows, each scored by the soup of all models with its own weights, (W,), nats.

    Windows near each other with the same weights share a soup. One model is made in place, one tensor at a time.

    Args:
        models: Of one architecture, as from ``model.building.build_model``.
        weights: (M, W), each column adding up to 1.
        windows: What to score.
        batch_tokens: Positions that go through a model at once.
        advance: Told how many windows were scored.
    """
    mixed = copy.deepcopy(models[0])
    losses = np.zeros(len(windows))
    stream = enumerate(windows.pieces())
    while near := dict(islice(stream, _TOGETHER)):
        distinct, which = np.unique(weights[:, list(near)], axis=1, return_inverse=True)
        for index, column in enumerate(distinct.T):
            _fill(mixed, models, column)
            members = [number for number, soup in zip(near, which.reshape(-1), strict=True) if soup == index]
            losses[members] = windows.losses(mixed, [near[number] for number in members], batch_tokens, advance)
    return losses


@torch.no_grad()
def _fill(mixed: nn.Module, models: Sequence[nn.Module], weights: Floats) -> None:
    for target, *parts in zip(mixed.parameters(), *(model.parameters() for model in models), strict=True):
        total = torch.zeros_like(target, dtype=torch.float32)
        for weight, part in zip(weights, parts, strict=True):
            total += float(weight) * part.float()
        target.copy_(total)


def mixed_logit_losses(
    models: Sequence[nn.Module], weights: Floats, windows: Windows, *, advance: Callable[[int], None]
) -> Floats:
    """Return the losses of windows under the weighted sum of the models' logits, token by token, (W,), nats.

    Models of weight 0 do not run. The logits of one window exist at a time, and of a long window a part.

    Args:
        models: As from ``model.building.build_model``.
        weights: (M, W), each column adding up to 1.
        windows: What to score.
        advance: Told how many windows were scored.

    Source: FlexOlmo's branch-train-merge baseline, which mixes logits; the original (arXiv 2208.03306) mixes
    probabilities.
    """
    device = next(models[0].parameters()).device
    losses = np.zeros(len(windows))
    for index, piece in enumerate(windows.pieces()):
        tokens = torch.from_numpy(piece.tokens).to(device)
        running = [(model, float(w)) for model, w in zip(models, weights[:, index], strict=True) if w > 0]
        losses[index] = _mixed_loss(running, tokens[:-1], tokens[1:])
        advance(1)
    return losses


@torch.no_grad()
def _mixed_loss(running: Sequence[tuple[Any, float]], inputs: Tensor, targets: Tensor) -> float:
    states = [model.base_model(inputs[None], use_cache=False).last_hidden_state[0] for model, _ in running]
    heads = [model.get_output_embeddings() for model, _ in running]
    size = max(1, LOGIT_BUDGET // heads[0].out_features)
    total = 0.0
    for start in range(0, len(targets), size):
        logits = torch.zeros((), device=targets.device)
        for (_, weight), head, state in zip(running, heads, states, strict=True):
            logits = logits + weight * head(state[start : start + size]).float()
        total += float(F.cross_entropy(logits, targets[start : start + size], reduction="none").double().sum())
    return total
