"""Kernels of liger-kernel and cut-cross-entropy, and torch.compile, against flexctl's, at the size of OLMo-2-1B.

First the loss alone, forward and back to the hidden states, with a frozen head; then the whole step of a pair, of which
one part or all are another's. One wins that makes the step at least ``WINS`` times as fast: less is not worth a
dependency. ``TRITON_INTERPRET=1`` rehearses others' kernels on a CPU, slowly, with ``--small``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.model.losses import CARD_LOGITS, LOGIT_BUDGET, training_loss
from tests.benchmarks.shapes import ONE_B, SMALL, Shape
from tests.benchmarks.steps import compile_parts, free, pair, peak_bytes, reset_peak, run, wait
from tests.gpu.section import Section

WINS = 1.05
STEPS, REPEATS = 8, 8
Z_LOSS = 1e-5

LIGER, CUT, COMPILE = "liger_kernel", "cut_cross_entropy", "torch.compile"
ROPE = "transformers.models.olmo2.modeling_olmo2.apply_rotary_pos_emb"

Loss = Callable[..., Tensor]
"""Called as ``training_loss``."""


def main() -> None:
    """Measure; last what is most likely to break the device for all that follows."""
    section = Section()
    shape = SMALL if section.small else ONE_B
    expected = _measure_losses(section, shape, _losses(shape), None)
    free(section.device)
    _measure_steps(section, shape)
    free(section.device)
    _measure_losses(section, shape, {"cut-cross-entropy, with the z-loss": (CUT, cut_loss)}, expected)
    section.end()


def _losses(shape: Shape) -> dict[str, tuple[str | None, Loss]]:
    return {
        "flexctl": (None, training_loss),
        "liger-kernel": (LIGER, partial(liger_loss, chunks=1)),
        "liger-kernel, as many logits at once as flexctl": (LIGER, partial(liger_loss, chunks=_chunks(shape))),
        "torch.compile, all logits at once": (COMPILE, compiled_loss()),
    }


def _missing(section: Section, needs: str | None) -> str | None:
    """Return why there is nothing to measure here."""
    if needs is None:
        return None
    if needs != COMPILE and find_spec(needs) is None:
        return f"{needs} is not installed"
    return f"{needs} is for a GPU" if section.small and "TRITON_INTERPRET" not in os.environ else None


class _Given(nn.Module):
    """Stands for a model whose last hidden states are given."""

    def __init__(self, states: Tensor, head: nn.Linear) -> None:
        super().__init__()
        self.states, self.head = states, head

    def base_model(self, _inputs: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        return SimpleNamespace(last_hidden_state=self.states)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


def _measure_losses(
    section: Section, shape: Shape, ways: dict[str, tuple[str | None, Loss]], expected: Tensor | None
) -> Tensor | None:
    """Measure losses and how far their gradients are from ``expected``, or the first one's; return that."""
    model, targets = _given(section.device, shape)
    for name, (needs, loss) in ways.items():
        if reason := _missing(section, needs):
            section.put(name=f"loss: {name}", skipped=reason)
            continue
        with section.part(f"loss: {name}") as figures:
            gradient = _measure_loss(section, loss, model, targets, figures)
            expected = gradient if expected is None else expected
            figures["gradient_apart"] = float((gradient - expected).norm() / expected.norm())
    return expected


def _given(device: torch.device, shape: Shape) -> tuple[_Given, Tensor]:
    """Return states as a last norm gives them, a frozen head as wide, and targets, of one step."""
    drawn = torch.Generator(device).manual_seed(0)
    size = {"device": device, "dtype": torch.bfloat16, "generator": drawn}
    states = torch.randn(shape.batch, shape.seq_len, shape.hidden, **size).requires_grad_(True)
    head = nn.Linear(shape.hidden, shape.vocab, bias=False, device="meta")
    rows = torch.randn(shape.vocab, shape.hidden, **size).mul_(shape.hidden**-0.5)
    head.weight = nn.Parameter(rows, requires_grad=False)
    targets = torch.randint(shape.vocab, (shape.batch, shape.seq_len), device=device, generator=drawn)
    return _Given(states, head), targets


def _measure_loss(section: Section, loss: Loss, model: _Given, targets: Tensor, figures: dict[str, Any]) -> Tensor:
    """Time a loss and its gradient at the states; return the gradient."""

    def once() -> float:
        wait(section.device)
        started = time.perf_counter()
        found = loss(model, targets, targets, Z_LOSS) / targets.numel()
        found.backward()
        wait(section.device)
        seconds = time.perf_counter() - started
        figures["loss"] = found.detach()
        return seconds

    model.states.grad = None
    figures["warm_up_s"] = once() + once()
    model.states.grad = None
    reset_peak(section.device)
    held = torch.cuda.memory_allocated() if section.device.type == "cuda" else 0
    figures["ms"] = 1e3 * once()
    figures["extra_bytes"] = peak_bytes(section.device) - held
    assert model.states.grad is not None
    gradient = model.states.grad.float()
    figures["ms"] = min(1e3 * once() for _ in range(2 if section.small else REPEATS))
    figures["loss"] = float(figures["loss"])
    return gradient


def liger_loss(
    model: Any, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None = None, *, chunks: int
) -> Tensor:
    """The loss by liger-kernel; ``chunks`` times T H logits exist at once."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    assert weights is None
    states, rows = _at_the_head(model, inputs)
    plain = {"lse_square_scale": z_loss, "label_smoothing": 0.0, "reduction": "sum", "softcap": None}
    off = {"return_z_loss": False, "accum_dtype": None, "use_token_scaling": False, "return_token_accuracy": False}
    last = {"return_predicted_tokens": False, "ce_impl": None, "ce_mode": None, "chunk_mem_const": chunks}
    given = (states, rows, targets.flatten(), None, None, -100)
    loss: Tensor = LigerFusedLinearCrossEntropyFunction.apply(*given, *(plain | off | last).values())[0]
    return loss


def cut_loss(model: Any, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None = None) -> Tensor:
    """The loss by cut-cross-entropy, which has no z-loss: log Z is its loss and the target's logit."""
    from cut_cross_entropy import linear_cross_entropy

    assert weights is None
    states, rows = _at_the_head(model, inputs)
    ids = targets.flatten()
    losses = linear_cross_entropy(states, rows, ids, reduction="none").float()
    logits = (states.float() * rows[ids].float()).sum(dim=-1)
    return (losses + z_loss * (losses + logits).square()).sum()


def compiled_loss() -> Loss:
    """The plain loss, of all logits at once, for torch.compile to fuse."""

    def plain(states: Tensor, rows: Tensor, ids: Tensor, z_loss: float) -> Tensor:
        logits = F.linear(states, rows).float()
        partition = logits.logsumexp(dim=-1)
        own = logits.gather(1, ids[:, None]).squeeze(1)
        return (partition - own + z_loss * partition.square()).sum()

    fused = torch.compile(plain, dynamic=False)

    def loss(model: Any, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None = None) -> Tensor:
        assert weights is None
        states, rows = _at_the_head(model, inputs)
        found: Tensor = fused(states, rows, targets.flatten(), z_loss)
        return found

    return loss


def _at_the_head(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    states = model.base_model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    return states, model.get_output_embeddings().weight


def _chunks(shape: Shape) -> int:
    """Return how many times T H logits flexctl has at once on a card."""
    return max(1, LOGIT_BUDGET * CARD_LOGITS // (shape.tokens * shape.hidden))


def _measure_steps(section: Section, shape: Shape) -> None:
    made = pair(shape, section.device, torch.bfloat16)
    model = made.model
    liger = {"rope": _liger_rope, "networks": partial(_liger_networks, model), "norms": partial(_liger_norms, model)}
    liger["loss"] = lambda: _loss_is(partial(liger_loss, chunks=_chunks(shape)))
    parts = partial(_compiled_parts, model)
    ways: dict[str, tuple[str | None, list[Callable[[], AbstractContextManager[None]]]]] = {
        "flexctl": (None, []),
        "liger-kernel: all": (LIGER, list(liger.values())),
        **{f"liger-kernel: {name}": (LIGER, [one]) for name, one in liger.items()},
        "compiled: rope": (COMPILE, [_compiled_rope]),
        "compiled: rope, networks, norms": (COMPILE, [_compiled_rope, parts]),
        "compiled: rope, networks, norms; liger-kernel: loss": (LIGER, [_compiled_rope, parts, liger["loss"]]),
        "flexctl, again": (None, []),
        "cut-cross-entropy": (CUT, [lambda: _loss_is(cut_loss)]),
    }
    base: float | None = None
    weights = made.groups[0].parameters
    begun = [weight.detach().clone() for weight in weights]
    for name, (needs, others) in ways.items():
        with torch.no_grad():
            for weight, was in zip(weights, begun, strict=True):
                weight.copy_(was)
        if reason := _missing(section, needs):
            section.put(name=f"step: {name}", skipped=reason)
            continue
        with section.part(f"step: {name}") as figures, ExitStack() as stack:
            for other in others:
                stack.enter_context(other())
            started = time.monotonic()
            run(made, shape, 2)
            figures["warm_up_s"] = time.monotonic() - started
            reset_peak(section.device)
            rate, figures["loss"] = run(made, shape, 2 if section.small else STEPS)
            base = base or rate
            figures |= {"tokens_per_s": rate, "of_flexctl": rate / base, "wins": rate >= WINS * base}
            figures["peak_bytes"] = peak_bytes(section.device)


@contextmanager
def _forwards(model: nn.Module, kinds: tuple[str, ...], other: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Let modules of some classes run otherwise."""
    found: list[Any] = [module for module in model.modules() if type(module).__name__ in kinds]
    assert found, f"there is none of {kinds}"
    try:
        for module in found:
            module.forward = other(module)
        yield
    finally:
        for module in found:
            vars(module).pop("forward", None)


@contextmanager
def _compiled_parts(model: nn.Module) -> Iterator[None]:
    parts = compile_parts(model)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _compiled_rope() -> AbstractContextManager[None]:
    from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb

    return patch(ROPE, torch.compile(apply_rotary_pos_emb, dynamic=False))


def _liger_rope() -> AbstractContextManager[None]:
    from liger_kernel.ops import LigerRopeFunction

    return patch(ROPE, lambda *given: LigerRopeFunction.apply(*given[:4]))


def _liger_networks(model: nn.Module) -> AbstractContextManager[None]:
    from liger_kernel.ops import LigerSiLUMulFunction

    def other(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            inner = LigerSiLUMulFunction.apply(module.gate_proj(inputs), module.up_proj(inputs), 1.0, 1.0)
            outputs: Tensor = module.down_proj(inner)
            return outputs

        return forward

    return _forwards(model, ("Olmo2MLP",), other)


def _liger_norms(model: nn.Module) -> AbstractContextManager[None]:
    from liger_kernel.ops import LigerRMSNormFunction

    def other(module: Any) -> Callable[[Tensor], Tensor]:
        # As liger-kernel does it for OLMo-2: the gradient is not written over what came in.
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        return lambda states: LigerRMSNormFunction.apply(states, module.weight, eps, 0.0, "llama", False, None)

    return _forwards(model, ("FusedNorm", "Olmo2RMSNorm"), other)


def _loss_is(loss: Loss) -> AbstractContextManager[None]:
    return patch("flexctl.training.loop.training_loss", loss)


if __name__ == "__main__":
    main()
