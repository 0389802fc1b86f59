"""Linear maps that train in float32 and multiply in another dtype, and what that says of their gradients.

The gradient that such a product gives is in its dtype; autocast makes float32 numbers of it, twice the bytes for the
same values. Here it may stay as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["CAN_KEEP", "RoundedLinear", "keep_rounded"]

CAN_KEEP = hasattr(torch.Tensor, "grad_dtype")
"""Whether gradients can stay in the dtype of products: torch below 2.10 makes all of them float32."""


class RoundedLinear(nn.Linear):
    """A linear map whose weight is rounded to the dtype of products where autocast is on, and not before.

    Used once a forward pass. Layers that compute again on the way back have the rounded weight one at a time: autocast
    would hold on to it until the end of the forward pass.

    Args:
        linear: The map with the weight, (out, in), float32; shared, not copied. It has no bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight = linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (T, out) for inputs (T, in)."""
        kind = inputs.device.type
        if not torch.is_autocast_enabled(kind):
            return F.linear(inputs, self.weight)
        rounded: Tensor = _Rounded.apply(self.weight, torch.get_autocast_dtype(kind))
        return F.linear(inputs, rounded)


class _Rounded(torch.autograd.Function):
    """A weight in another dtype; its gradient comes back in that, and torch makes of it what the weight asks for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight in ``dtype``."""
        del ctx
        return weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_rounded: Tensor) -> tuple[Tensor, None]:
        """Return the gradient as it is."""
        del ctx
        return at_rounded, None


def keep_rounded(model: nn.Module, *, keep: bool) -> None:
    """Say whether gradients of rounded weights stay in the dtype of products, which is exact for one backward pass.

    Of several they are summed, in float32. Where torch cannot keep them (``CAN_KEEP``) they are always float32.

    Args:
        model: Its ``RoundedLinear`` parts are told.
        keep: Whether they stay.
    """
    for module in model.modules():
        if CAN_KEEP and isinstance(module, RoundedLinear):
            module.weight.grad_dtype = None if keep else module.weight.dtype
