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
        experts: Transformers' own, over the same memory; no part of the model, which has the matrices by its own names.
    """

    def __init__(self, experts: nn.Module) -> None:
        self._experts = experts

    def __call__(self, inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        outputs: Tensor = self._experts(inputs, chosen, weights)
        return outputs

    def __deepcopy__(self, _memo: object) -> None:
        """A copied model's matrices are apart, each expert's for itself."""


def _stacked(block: RoutedFeedForward, device: torch.device) -> Together:
    from transformers import FlexOlmoConfig
    from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoExperts

    experts: list[Any] = list(block.experts)
    like: Tensor = experts[0].gate_proj.weight
    inner, hidden = like.shape
    config = FlexOlmoConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_experts=len(experts),
        num_attention_heads=1,
        hidden_act=experts[0].config.hidden_act,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        together = FlexOlmoExperts(config)
    both = torch.empty(len(experts), 2 * inner, hidden, dtype=like.dtype, device=device)
    down = torch.empty(len(experts), hidden, inner, dtype=like.dtype, device=device)
    together.gate_up_proj, together.down_proj = (nn.Parameter(each, requires_grad=False) for each in (both, down))
    for index, expert in enumerate(experts):
        places = dict(zip(PROJECTIONS, (both[index, :inner], both[index, inner:], down[index]), strict=True))
        for projection, place in places.items():
            linear = getattr(expert, projection)
            linear.weight = nn.Parameter(place.copy_(linear.weight), requires_grad=False)
    return _Stacked(together)
