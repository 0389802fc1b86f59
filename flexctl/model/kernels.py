"""Kernels of liger-kernel in the training step of a pair: fewer passes over a GPU's memory, for the same sums.

They run rotary embeddings, the product inside a feed-forward network, and the loss. Its norms are no faster than
torch's own (docs/benchmarks.md), so those stay.

Shapes: B sequences, S positions, T = B S tokens, H hidden_size, I intermediate_size, V vocab_size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from flexctl.model.gated import Product, compute_by, product_of
from flexctl.model.losses import CARD_LOGITS, LOGIT_BUDGET, Loss, training_loss
from flexctl.model.lowrank import LowRankNetwork
from flexctl.model.routed import routed_layers
from flexctl.runtime import Reporter

__all__ = ["KNOWN", "Kernels", "find_kernels", "fused"]

KNOWN = SpecifierSet(">=0.8.5,<0.9")
"""Releases of liger-kernel whose functions take what is given here: they have no names for it, only places."""

_UNLOADABLE = (ImportError, AttributeError, RuntimeError, OSError)
"""What a package raises that is broken, or stands on a Triton or a driver that it does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Functions that stand for torch's in a training step; they may write over what they are given.

    Attributes:
        name: The package and its version.
        rope: (queries, keys, cosines, sines) -> queries and keys, turned; as Transformers' ``apply_rotary_pos_emb``.
        silu_mul: (gate, up), (T, I) each -> silu(gate) up.
        head_loss: (states (T, H), head (V, H), targets (T,), z_loss, how many times T H logits may exist at once) ->
            what ``training_loss`` returns.
    """

    name: str
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    silu_mul: Product
    head_loss: Callable[[Tensor, Tensor, Tensor, float, int], Tensor]


def find_kernels(device: torch.device, autocast: torch.dtype | None, reporter: Reporter) -> Kernels | None:
    """Return liger-kernel's functions where it is installed, for products in bfloat16 on a GPU; elsewhere None.

    Args:
        device: Where training runs.
        autocast: Dtype of its matrix products; None for the weights' own.
        reporter: Warned where it is installed and cannot be used.
    """
    if device.type != "cuda" or autocast != torch.bfloat16:
        return None
    try:
        version = metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return None
    if version not in KNOWN:
        reporter.warn(f"liger-kernel {version} is left out: flexctl knows {KNOWN}")
        return None
    try:
        return _liger(version)
    except _UNLOADABLE as error:
        said = " ".join(str(error).split())
        reporter.warn(f"liger-kernel {version} is left out, as it cannot be loaded: {said}")
        return None


def _liger(version: str) -> Kernels:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction, LigerRopeFunction, LigerSiLUMulFunction

    def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = LigerSiLUMulFunction.apply(gate, up, 1.0, 1.0)
        return product

    def head_loss(states: Tensor, head: Tensor, targets: Tensor, z_loss: float, chunks: int) -> Tensor:
        plain = {"lse_square_scale": z_loss, "label_smoothing": 0.0, "reduction": "sum", "softcap": None}
        off = {"return_z_loss": False, "accum_dtype": None, "use_token_scaling": False, "return_token_accuracy": False}
        last = {"return_predicted_tokens": False, "ce_impl": None, "ce_mode": None, "chunk_mem_const": chunks}
        given = (states, head, targets, None, None, -100)
        loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(*given, *(plain | off | last).values())[0]
        return loss

    return Kernels(name=f"liger-kernel {version}", rope=LigerRopeFunction.apply, silu_mul=silu_mul, head_loss=head_loss)


@contextmanager
def fused(model: nn.Module, kernels: Kernels | None) -> Iterator[Loss]:
    """Let a model train by kernels inside the ``with`` statement, which gets the loss to train by.

    Names and tensors stay as they are. Rotary embeddings are a function of the family's module in Transformers, so
    other models of that family use the kernel as well meanwhile.

    Args:
        model: As from ``model.building.build_model``, whole in one process.
        kernels: None leaves everything as it is.
    """
    if kernels is None:
        yield training_loss
        return
    family: Any = sys.modules[type(model).__module__]
    with ExitStack() as stack:
        stack.callback(setattr, family, "apply_rotary_pos_emb", family.apply_rotary_pos_emb)
        family.apply_rotary_pos_emb = lambda *given: kernels.rope(*given[:4])
        for block in routed_layers(model):
            for network in block.experts:
                stack.callback(_compute_by(network, kernels.silu_mul))
        yield partial(_loss, kernels)


def _compute_by(network: nn.Module, silu: Product) -> Callable[[], None]:
    if isinstance(network, LowRankNetwork):
        undo = partial(setattr, network, "inside", network.inside)
        network.inside = product_of(network.public, silu)
        return undo
    return compute_by(network, product_of(network, silu))


def _loss(
    kernels: Kernels, model: Any, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None = None
) -> Tensor:
    if weights is not None:
        return training_loss(model, inputs, targets, z_loss, weights)
    states = model.base_model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    chunks = max(1, LOGIT_BUDGET * CARD_LOGITS // states.numel())
    return kernels.head_loss(states, model.get_output_embeddings().weight, targets.flatten(), z_loss, chunks)
