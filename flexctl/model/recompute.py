"""Layers that keep their inputs alone for the way back, and compute the rest again there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

__all__ = ["recompute_layers"]


def recompute_layers(model: Any) -> None:
    """Let every layer compute again on the way back what it would have kept: less memory, the same numbers.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode: nothing in it is random.
    """
    for layer in model.model.layers:
        layer.forward = partial(_run, layer.forward)


def _run(forward: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, preserve_rng_state=False, **named)
