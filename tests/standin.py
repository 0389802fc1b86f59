"""Torch stand-ins for liger-kernel's functions, which overwrite what they are given just as those do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexctl.model.kernels import Kernels


class Rope(torch.autograd.Function):
    """Turns queries and keys where they lie, and their gradients likewise."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _turned(queries, cosines, sines), _turned(keys, cosines, sines)

    @staticmethod
    def backward(ctx: Any, at_queries: Tensor, at_keys: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(at_queries, cosines, -sines), _turned(at_keys, cosines, -sines), None, None


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    # As there: what is no transposed (B, S, heads, head_dim) is copied.
    states = states.detach().transpose(1, 2).contiguous()
    half = states.shape[-1] // 2
    cosines, sines = (one[:, :, None, :half] for one in (cosines, sines))
    first, second = states[..., :half].clone(), states[..., half:].clone()
    states[..., :half] = first * cosines - second * sines
    states[..., half:] = second * cosines + first * sines
    return states.transpose(1, 2)


class SiluMul(torch.autograd.Function):
    """Keeps gate and up alone, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate.float()).to(up.dtype) * up

    @staticmethod
    def backward(ctx: Any, at_product: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = (one.detach() for one in ctx.saved_tensors)
        wide = gate.float()
        sigmoid = wide.sigmoid()
        at_gate = at_product * (wide * sigmoid * (1 - sigmoid) + sigmoid) * up
        up.copy_(at_product * wide * sigmoid)
        gate.copy_(at_gate)
        return gate, up


class HeadLoss(torch.autograd.Function):
    """Keeps the gradient at the states alone, and scales it where it lies."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        logits = (states @ head.T).float()
        partition, own = logits.logsumexp(dim=-1), torch.nn.functional.one_hot(targets, len(head))
        slopes = logits.softmax(dim=-1) * (1 + 2 * z_loss * partition[:, None]) - own
        ctx.save_for_backward((slopes.to(head.dtype) @ head).to(states.dtype))
        return (partition - (logits * own).sum(dim=-1) + z_loss * partition.square()).sum()

    @staticmethod
    def backward(ctx: Any, at_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (at_states,) = ctx.saved_tensors
        at_states.detach().mul_(at_loss)
        return at_states, None, None, None


def kernels() -> Kernels:
    """All of them."""
    return Kernels(
        name="a stand-in",
        rope=Rope.apply,
        silu_mul=SiluMul.apply,
        head_loss=lambda states, head, targets, z_loss, _chunks: HeadLoss.apply(states, head, targets, z_loss),
    )
