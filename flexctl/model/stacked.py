"""Experts that lie one behind the other and run at once, where a device has a kernel for that.

One by one they need to know on the host how many tokens each has, so every layer waits for the device, and each takes
its own launches: with few tokens that is most of the time.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.families import PROJECTIONS
from flexctl.model.routed import RoutedFeedForward, Together, routed_layers

__all__ = ["stack_experts"]

Model = TypeVar("Model", bound=nn.Module)

_FAST = (9, 10)
_ALIGNED = 8
"""Major compute capabilities on which torch's grouped product is one kernel, and what it needs sizes to divide by."""

FEW_ROWS = 16
"""Up to so many tokens, times K, each row gets a copy of its expert's matrices: more bytes, but nothing to sort.

Transformers decodes this way whatever the batch. Measured there at 16 rows; a copy grows with them, so no more.
"""


@torch.no_grad()
def stack_experts(model: Model, device: torch.device) -> Model:
    """Let experts that have matrices of one kernel's kind run together on ``device``; return the model.

    Their matrices move there, into one tensor a layer and direction, of which each expert's are parts from then on: no
    memory is needed twice, and whatever is written into an expert counts in both.

    Args:
        model: Frozen, in the dtype that it runs in. It must stay on ``device``, and keep its experts.
        device: Where it is to run. On one without such a kernel nothing changes.
    """
    for block in routed_layers(model):
        if len(block.experts) > 1 and _has_kernel(block, device):
            block.together = _stacked(block, device)
    return model


def _has_kernel(block: RoutedFeedForward, device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(device)[0] in _FAST
        and all(
            matrix.dtype == torch.bfloat16 and not any(size % _ALIGNED for size in matrix.shape)
            for matrix in block.experts.parameters()
        )
    )


class _Stacked:
    """All experts of a layer: see ``model.routed.Together``.

    Args:
        both: Gate and up matrices, (N, 2 I, H).
        down: (N, H, I).
        activation: Transformers' name of it.
    """

    def __init__(self, both: Tensor, down: Tensor, activation: str) -> None:
        # No part of the model, which has the matrices by its own names.
        self._few, self._many = (_run_by(way, both, down, activation) for way in ("batched_mm", "grouped_mm"))

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        experts = self._few if chosen.numel() <= FEW_ROWS else self._many
        outputs: Tensor = experts(inputs, chosen, weights)
        return outputs

    def __deepcopy__(self, _memo: object) -> None:
        """A copied model's matrices are apart, each expert's for itself."""


def _run_by(way: str, both: Tensor, down: Tensor, activation: str) -> nn.Module:
    """Return Transformers' own experts over these matrices, which compute by one of its implementations."""
    from transformers import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

    num_experts, hidden, inner = down.shape
    config = FlexOlmoConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=num_experts,
        num_attention_heads=1,
        hidden_act=activation,
    )
    config._experts_implementation = way
    with torch.device("meta"):
        experts: nn.Module = FlexOlmoExperts(config)
    experts.gate_up_proj, experts.down_proj = (nn.Parameter(each, requires_grad=False) for each in (both, down))
    return experts


def _stacked(block: RoutedFeedForward, device: torch.device) -> Together:
    experts: list[Any] = list(block.experts)
    like: Tensor = experts[0].gate_proj.weight
    inner, hidden = like.shape
    both = torch.empty(len(experts), 2 * inner, hidden, dtype=like.dtype, device=device)
    down = torch.empty(len(experts), hidden, inner, dtype=like.dtype, device=device)
    for index, expert in enumerate(experts):
        places = dict(zip(PROJECTIONS, (both[index, :inner], both[index, inner:], down[index]), strict=True))
        for projection, place in places.items():
            linear = getattr(expert, projection)
            linear.weight = nn.Parameter(place.copy_(linear.weight), requires_grad=False)
    return _Stacked(both, down, experts[0].config.hidden_act)
