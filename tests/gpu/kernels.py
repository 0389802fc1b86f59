"""The kernels of liger-kernel that ``train-expert`` uses where it is installed, and other ways, against plain code.

First the loss alone, forward and back to the hidden states, with a frozen head; then the steps of a pair of OLMo-2-1B's
size. What makes a step at least ``WINS`` times as fast wins: less is not worth a dependency. ``TRITON_INTERPRET=1``
rehearses the kernels on a CPU, slowly, with ``--small``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.model.kernels import Kernels, _liger, _loss, fused
from flexctl.model.losses import Loss, training_loss
from tests.benchmarks.shapes import ONE_B, SMALL, Shape
from tests.benchmarks.steps import (
    RANK,
    Trained,
    compile_parts,
    free,
    pair,
    peak_bytes,
    recomputed,
    reset_peak,
    run,
    wait,
)
from tests.gpu.section import Section

WINS = 1.05
STEPS, REPEATS = 8, 8
Z_LOSS = 1e-5

ROPE = "transformers.models.olmo2.modeling_olmo2.apply_rotary_pos_emb"

PLAIN, KERNELS = "plain", "with kernels"
COMPILED = "compiled: rotary embeddings, networks, norms"


def main() -> None:
    """Measure."""
    section = Section()
    shape = SMALL if section.small else ONE_B
    dtype = torch.float32 if section.small else torch.bfloat16  # the interpreter makes NaN of bfloat16
    kernels = _kernels(section)
    _measure_losses(section, shape, dtype, kernels)
    for kind, make in (("pair", pair), (f"rank {RANK}", partial(pair, rank=RANK)), ("recomputed", recomputed)):
        free(section.device)
        _measure_steps(section, shape, kind, make(shape, section.device, dtype), kernels)
    section.end()


def _kernels(section: Section) -> Kernels | None:
    """Return liger-kernel's, of whatever release; None, and say so, where there is nothing to measure."""
    if find_spec("liger_kernel") is None:
        section.put(name=KERNELS, skipped="liger-kernel is not installed")
        return None
    if section.small and "TRITON_INTERPRET" not in os.environ:
        section.put(name=KERNELS, skipped="they are for a GPU")
        return None
    return _liger(metadata.version("liger-kernel"))


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


def _measure_losses(section: Section, shape: Shape, dtype: torch.dtype, kernels: Kernels | None) -> None:
    """Measure losses and how far their gradients are from flexctl's own."""
    model, targets = _given(section.device, dtype, shape)
    ways: dict[str, Loss] = {PLAIN: training_loss}
    if kernels is not None:
        ways[KERNELS] = partial(_loss, kernels)
    if not section.small:
        ways["torch.compile, all logits at once"] = _compiled_loss()
    expected: Tensor | None = None
    for name, loss in ways.items():
        with section.part(f"loss: {name}") as figures:
            gradient = _measure_loss(section, loss, model, targets, figures)
            expected = gradient if expected is None else expected
            figures["gradient_apart"] = float((gradient - expected).norm() / expected.norm())


def _given(device: torch.device, dtype: torch.dtype, shape: Shape) -> tuple[_Given, Tensor]:
    """Return states as a last norm gives them, a frozen head as wide, and targets, of one step."""
    drawn = torch.Generator(device).manual_seed(0)
    size = {"device": device, "dtype": dtype, "generator": drawn}
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
        found = loss(model, targets, targets, Z_LOSS, None) / targets.numel()
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


def _compiled_loss() -> Loss:
    """Return the plain loss, of all logits at once, for torch.compile to fuse."""

    def plain(states: Tensor, rows: Tensor, ids: Tensor, z_loss: float) -> Tensor:
        logits = F.linear(states, rows).float()
        partition = logits.logsumexp(dim=-1)
        own = logits.gather(1, ids[:, None]).squeeze(1)
        return (partition - own + z_loss * partition.square()).sum()

    found = torch.compile(plain, dynamic=False)

    def loss(model: Any, inputs: Tensor, targets: Tensor, z_loss: float, weights: Tensor | None) -> Tensor:
        assert weights is None
        states = model.base_model(inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        total: Tensor = found(states, model.get_output_embeddings().weight, targets.flatten(), z_loss)
        return total

    return loss


def _measure_steps(section: Section, shape: Shape, kind: str, made: Trained, kernels: Kernels | None) -> None:
    """Measure a kind of step each way, from the same weights; plain code once more at the end shows the drift."""
    ways: dict[str, AbstractContextManager[Loss]] = {PLAIN: nullcontext(training_loss)}
    if kernels is not None:
        ways[KERNELS] = fused(made.model, kernels)
    if kind == "pair" and not section.small:
        ways[COMPILED] = _compiled(made.model)
    ways[f"{PLAIN}, again"] = nullcontext(training_loss)
    weights = made.groups[0].parameters
    begun = [weight.detach().clone() for weight in weights]
    base: float | None = None
    for name, way in ways.items():
        with torch.no_grad():
            for weight, was in zip(weights, begun, strict=True):
                weight.copy_(was)
        with section.part(f"{kind}: {name}") as figures, way as loss:
            started = time.monotonic()
            run(made, shape, 2, loss)
            figures["warm_up_s"] = time.monotonic() - started
            reset_peak(section.device)
            rate, figures["loss"] = run(made, shape, 2 if section.small else STEPS, loss)
            base = base or rate
            figures |= {"tokens_per_s": rate, "of_plain": rate / base, "wins": rate >= WINS * base}
            figures["peak_bytes"] = peak_bytes(section.device)


@contextmanager
def _compiled(model: nn.Module) -> Iterator[Loss]:
    """Let torch.compile have what is not a matrix product."""
    from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb

    parts = compile_parts(model)
    try:
        with patch(ROPE, torch.compile(apply_rotary_pos_emb, dynamic=False)):
            yield training_loss
    finally:
        for part in parts:
            del part.forward


if __name__ == "__main__":
    main()
