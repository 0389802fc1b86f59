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
from flexctl.heap import reusing_memory
from flexctl.model.batching import of_like_length
from flexctl.model.losses import LOGIT_BUDGET

__all__ = ["mixed_logit_losses", "soup_losses"]

_TOGETHER = 256


@reusing_memory()
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
            total.add_(part, alpha=float(weight))
        target.copy_(total)


@reusing_memory()
def mixed_logit_losses(
    models: Sequence[nn.Module],
    weights: Floats,
    windows: Windows,
    *,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> Floats:
    """Return the losses of windows under the weighted sum of the models' logits, token by token, (W,), nats.

    Models of weight 0 do not run. The logits of one window exist at a time, and of a long window a part; all models'
    last hidden states of a batch do.

    Args:
        models: As from ``model.building.build_model``.
        weights: (M, W), each column adding up to 1.
        windows: What to score.
        batch_tokens: Positions that go through a model at once.
        advance: Told how many windows were scored.

    Source: FlexOlmo's branch-train-merge baseline, which mixes logits; the original (arXiv 2208.03306) mixes
    probabilities.
    """
    losses = np.zeros(len(windows))
    stream = enumerate(windows.pieces())
    while near := dict(islice(stream, _TOGETHER)):
        order = list(near)
        for batch in of_like_length([len(near[number].tokens) - 1 for number in order], batch_tokens):
            numbers = [order[each] for each in batch]
            tokens = [torch.from_numpy(near[number].tokens) for number in numbers]
            losses[numbers] = _mixed_losses(models, weights[:, numbers], tokens)
            advance(len(numbers))
    return losses


@torch.no_grad()
def _mixed_losses(models: Sequence[Any], weights: Floats, tokens: Sequence[Tensor]) -> list[float]:
    """Return the loss of each window, nats.

    Args:
        models: As given.
        weights: (M, windows).
        tokens: Of each window, (S + 1,), int64.
    """
    mixtures: list[list[tuple[Any, float, Tensor]]] = [[] for _ in tokens]
    for model, shares in zip(models, weights, strict=True):
        running = np.flatnonzero(shares).tolist()
        if not running:
            continue
        device, head = next(model.parameters()).device, model.get_output_embeddings()
        ids = nn.utils.rnn.pad_sequence([tokens[number][:-1] for number in running], batch_first=True).to(device)
        for number, states in zip(running, model.base_model(ids, use_cache=False).last_hidden_state, strict=True):
            mixtures[number].append((head, float(shares[number]), states))
    return [_mixed_loss(parts, each[1:]) for parts, each in zip(mixtures, tokens, strict=True)]


def _mixed_loss(parts: Sequence[tuple[Any, float, Tensor]], targets: Tensor) -> float:
    """Return one window's loss, nats, from (head, weight, states of at least S positions) of each model that runs."""
    device = parts[0][2].device
    size = max(1, LOGIT_BUDGET // parts[0][0].out_features)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(targets), size):
        ids = targets[start : start + size].to(device)
        logits = torch.zeros((), device=device)
        for head, weight, states in parts:
            logits = logits + weight * head(states[start : start + len(ids)]).float()
        total += F.cross_entropy(logits, ids, reduction="none").double().sum()
    return float(total)
