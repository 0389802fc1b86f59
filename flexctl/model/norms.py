"""Norms in one kernel where the device has one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FusedNorm", "fuse_norms"]

Model = TypeVar("Model", bound=nn.Module)


class FusedNorm(nn.Module):
    """What Transformers' RMS norms compute, x / sqrt(mean x^2 + eps) times a weight, by torch's own function.

    Theirs goes over the states eight times, in float32.

    Args:
        weight: (H,), shared with the norm that this one stands for.
        eps: Added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, states: Tensor) -> Tensor:
        """Return (..., H) in the dtype of ``states``, computed in float32."""
        if not torch.is_autocast_enabled(states.device.type):
            return self._normed(states)
        # Under autocast torch would return float32, and all that follows would have twice the size.
        with torch.autocast(states.device.type, enabled=False):
            return self._normed(states)

    def _normed(self, states: Tensor) -> Tensor:
        wide = states.to(torch.promote_types(states.dtype, self.weight.dtype))
        return F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(states.dtype)


def fuse_norms(model: Model, device: torch.device) -> Model:
    """Let the RMS norms of a Transformers model run in one kernel each if it is to be on a GPU; return the model.

    Names of tensors stay as they are. On a CPU there is no such kernel, so nothing changes.
    """
    if _has_kernel(device):
        for parent in list(model.modules()):
            norms: list[tuple[str, Any]] = [each for each in parent.named_children() if _is_norm(each[1])]
            for name, norm in norms:
                setattr(parent, name, FusedNorm(norm.weight, norm.variance_epsilon))
    return model


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda"


def _is_norm(module: nn.Module) -> bool:
    return hasattr(module, "variance_epsilon")
