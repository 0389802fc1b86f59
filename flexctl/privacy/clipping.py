"""The sum of documents' clipped gradients from one forward and one backward pass.

Every trained tensor of an expert sits in a module that maps (B S, in) to (B S, out) linearly, so a document's gradient
is a product of what went in and of the loss's gradient at what came out:

  nn.Linear W:          g' x
  LowRankDifference A, B:   (g B)' x   and   g' (x A')

Hooks keep what went in and what came out; one ``torch.autograd.grad`` gives g and computes no weight's gradient. Norms
come from g and x by whichever of two ways is cheaper; the clipped sum is one more product, g scaled by document.

Shapes: B documents, S positions of each.

Source: Goodfellow, "Efficient Per-Example Gradient Computations" (arXiv 1510.01799); Bu et al., "Differentially Private
Optimization on Large Model at Small Cost" (arXiv 2210.00038) for one backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.errors import FlexctlError
from flexctl.model.lowrank import LowRankDifference

__all__ = ["PerDocument", "clip_scales"]

_MARGIN = 1e-3
"""Documents are clipped to this much less than C, which leaves room for what float32 rounds in norms and in the sum."""


def clip_scales(norms: Tensor, clip: float) -> Tensor:
    """Return by what documents are multiplied so that none is longer than ``clip``, less a margin for rounding.

    Args:
        norms: Their lengths, (B,).
        clip: C, above 0.
    """
    return (clip * (1 - _MARGIN) / norms.clamp(min=1e-30)).clamp(max=1.0)


Factors = tuple[nn.Parameter, Tensor, Tensor]
"""A parameter, and g (B, S, out) and x (B, S, in) with which a document's gradient is g' x."""


class PerDocument:
    """Watches a model's trained modules and gives the sum of clipped gradients.

    Args:
        model: The model; what trains in it has ``requires_grad``.
        parameters: What is trained.

    Raises:
        FlexctlError: A trained tensor is not covered by exactly one module of a kind that is known here.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._modules = _covering(model, self._parameters)
        self._seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._watching = False
        self._hooks = [module.register_forward_hook(self._keep) for module in self._modules]

    def _keep(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if not (self._watching and torch.is_grad_enabled()):
            return
        if module in self._seen:
            raise FlexctlError("a trained module ran twice in one pass, so documents' gradients cannot be told apart")
        self._seen[module] = (inputs[0].detach(), output)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def norms(self, run: Callable[[], Tensor], documents: int) -> Tensor:
        """Return the norm of each document's gradient, (B,), float64.

        Args:
            run: Makes the forward pass and returns the sum of the documents' losses.
            documents: B.
        """
        return _norms(self._factors(run, documents), documents)

    def clipped_sum(self, run: Callable[[], Tensor], documents: int, clip: float) -> list[Tensor]:
        """Return the sum over documents of min(1, C / norm) times the gradient, a tensor a parameter, float32.

        A document whose gradient is not finite counts nothing, like one that is not there.

        Args:
            run: As for ``norms``.
            documents: B.
            clip: C, above 0.
        """
        factors = self._factors(run, documents)
        norms = _norms(factors, documents)
        bad = ~torch.isfinite(norms)
        scale = clip_scales(norms, clip).masked_fill(bad, 0.0).float()
        found, some_are_bad = {}, bool(bad.any())
        for parameter, g, x in factors:
            if some_are_bad:
                # Masked as well, as 0 times NaN is NaN.
                g, x = (part.masked_fill(bad[:, None, None], 0.0) for part in (g, x))
            found[parameter] = (g.float() * scale[:, None, None]).flatten(0, 1).T @ x.float().flatten(0, 1)
        return [found[parameter] for parameter in self._parameters]

    def _factors(self, run: Callable[[], Tensor], documents: int) -> list[Factors]:
        self._watching = True
        try:
            loss = run()
        finally:
            self._watching = False
        seen, self._seen = self._seen, {}
        if len(seen) < len(self._modules):
            raise FlexctlError("a trained module did not run, so documents' gradients cannot be told")
        kept = [seen[module] for module in self._modules]
        grads = torch.autograd.grad(loss, [output for _, output in kept])
        found: list[Factors] = []
        for module, (inputs, _), grad in zip(self._modules, kept, grads, strict=True):
            x, g = (part.unflatten(0, (documents, -1)) for part in (inputs, grad))
            if isinstance(module, LowRankDifference):
                # Both of a document's factors in float32, so that norm and sum are made of the same numbers.
                found.append((module.a, g.float() @ module.b.detach(), x))
                found.append((module.b, g, x.float() @ module.a.detach().T))
            else:
                found.append((module.weight, g, x))  # type: ignore[arg-type]
        return found


def _covering(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[nn.Module]:
    """Return the modules whose own trained tensors are ``parameters``, each exactly once."""
    wanted = {id(parameter) for parameter in parameters}
    found: list[nn.Module] = []
    covered: list[int] = []
    for name, module in model.named_modules():
        own = [part for part in module.parameters(recurse=False) if part.requires_grad or id(part) in wanted]
        if not own:
            continue
        plain = isinstance(module, nn.Linear) and module.bias is None
        if not plain and not isinstance(module, LowRankDifference):
            raise FlexctlError(f"{name} trains and is no linear map, so documents' gradients cannot be told apart")
        found.append(module)
        covered += [id(part) for part in own]
    if sorted(covered) != sorted(wanted):
        raise FlexctlError("what trains is not covered by exactly one linear map each; nothing was trained")
    return found


def _norms(factors: Sequence[Factors], documents: int) -> Tensor:
    squares = torch.zeros(documents, dtype=torch.float64, device=factors[0][1].device)
    for _, g, x in factors:
        squares += _square_norms(g.float(), x.float()).double()
    return squares.clamp(min=0).sqrt()


def _square_norms(g: Tensor, x: Tensor) -> Tensor:
    """Return ||g' x||^2 of each document, (B,): from Gram matrices of positions, or from the products themselves."""
    if 2 * g.shape[1] ** 2 < g.shape[2] * x.shape[2]:
        return ((x @ x.mT) * (g @ g.mT)).sum(dim=(1, 2))
    return (g.mT @ x).square().sum(dim=(1, 2))
