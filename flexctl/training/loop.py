"""The one training loop: whole models from scratch, annealing, and the pair of an expert."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flexctl.errors import FlexctlError
from flexctl.model.losses import training_loss
from flexctl.processes import ALONE, World
from flexctl.runtime import Progress, Reporter
from flexctl.training.batches import Batches
from flexctl.training.checkpoints import Checkpoints, TrainingState

__all__ = [
    "LoopSettings",
    "Outcome",
    "ParameterGroup",
    "autocasting",
    "learning_rate",
    "new_optimiser",
    "set_rate",
    "to_device",
    "train",
]

_STEPS_BEHIND = 2
"""How far a device may be behind its orders: it then never waits for them, and a loss is known as many steps later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopSettings:
    """How to train.

    Attributes:
        steps: Optimiser steps.
        lr: Peak learning rate.
        warmup_steps: Steps over which it rises linearly; afterwards it falls along a cosine to zero.
        micro_batch: Sequences that go through the model at once.
        weight_decay: Of AdamW.
        betas: Of AdamW; FlexOlmo's.
        max_grad_norm: Gradients are scaled down to this norm.
        z_loss: Weight of the squared log-partition of the logits; FlexOlmo's.
        autocast: Dtype of the matrix products, or None for the weights' own.
    """

    steps: int
    lr: float
    warmup_steps: int
    micro_batch: int
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    z_loss: float = 1e-5
    autocast: torch.dtype | None = None

    @property
    def dtype(self) -> str:
        """Name of the dtype that matrix products are in."""
        return str(self.autocast or torch.float32).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate of ``lr_factor`` times the loop's."""

    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        losses: Mean cross-entropy (with z-loss, without penalties) of each step in nats a token.
        tokens_per_s: Targets a second, public ones counted, of this run's own steps; None when it had none.
    """

    losses: list[float] = field(default_factory=list)
    tokens_per_s: float | None = None

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps."""
        return _recent(self.losses)


def learning_rate(step: int, settings: LoopSettings) -> float:
    """Return the learning rate of ``step``: linear warm-up, then a cosine to zero."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    data: Batches,
    settings: LoopSettings,
    *,
    reporter: Reporter,
    match: Callable[[Tensor], Tensor] | None = None,
    penalty: Callable[[], Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
    world: World = ALONE,
) -> Outcome:
    """Train ``groups`` of ``model`` in place and return the losses.

    Args:
        model: As from ``model.building.build_model``; parameters outside the groups need no gradient.
        groups: What to train.
        data: Batches by step.
        settings: How.
        reporter: Gets loss, tokens a second and the time left.
        match: Penalty on the forward pass just made, summed over its tokens; given which sequences of it, in all
            processes, are public, (B,), on the CPU.
        penalty: Penalty added once a step.
        checkpoints: Where to go on from and what to leave behind; None keeps nothing.
        world: The processes that train; each takes its part of every micro-batch.

    Raises:
        FlexctlError: The loss is not finite, or a file of tokens is not what it was when it was written. That is
            looked at when training starts, before each checkpoint, and when it ends.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    optimiser = new_optimiser(groups, settings)
    state = TrainingState(parameters=parameters, optimiser=optimiser)
    data.refuse_change()
    losses = checkpoints.restore(state) if checkpoints is not None else []
    running = _Running(losses)
    started, first = time.monotonic(), len(losses)
    per_step = data.batch_size * data.seq_len
    with reporter.progress("training", settings.steps * per_step, "tokens") as bar:
        bar.advance(first * per_step)
        for step in range(first, settings.steps):
            set_rate(optimiser, learning_rate(step, settings))
            running.add(_step(model, parameters, data, step, settings, optimiser, match, penalty, world))
            _report(bar, losses, per_step, (step + 1 - first) * per_step / (time.monotonic() - started))
            if checkpoints is not None and checkpoints.is_due(step + 1, settings.steps):
                running.settle()
                data.refuse_change()
            if checkpoints is not None:
                checkpoints.save_when_due(step + 1, settings.steps, state, losses)
        running.settle()
    data.refuse_change()
    seconds = time.monotonic() - started
    done = (settings.steps - first) * per_step
    return Outcome(losses=losses, tokens_per_s=done / seconds if done > 0 else None)


class _Running:
    """The losses of steps that a device may not have done yet, in their order.

    Args:
        losses: Gets each as soon as it is known, and refuses one that is not finite.
    """

    def __init__(self, losses: list[float]) -> None:
        self._losses = losses
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def add(self, loss: Tensor) -> None:
        """Take a step's loss, (), and learn what steps before it have lost."""
        copy, copied = loss.to("cpu", non_blocking=True), None
        if loss.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        self._waiting.append((copy, copied))
        self.settle(_STEPS_BEHIND if loss.is_cuda else 0)

    def settle(self, waiting: int = 0) -> None:
        """Wait until the losses of at most so many steps are not known."""
        while len(self._waiting) > waiting:
            loss, copied = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            self._losses.append(float(loss))
            _refuse_nonfinite(self._losses[-1], len(self._losses) - 1)


def _step(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    data: Batches,
    step: int,
    settings: LoopSettings,
    optimiser: torch.optim.Optimizer,
    match: Callable[[Tensor], Tensor] | None,
    penalty: Callable[[], Tensor] | None,
    world: World,
) -> Tensor:
    device = parameters[0].device
    batch, public = data.batch(step), data.is_public(step)
    total = torch.zeros((), device=device)
    count = data.batch_size * data.seq_len
    for together, which in zip(batch.split(settings.micro_batch), public.split(settings.micro_batch), strict=True):
        part = world.part(len(together))
        rows, weights = to_device(part.of(together), device), part.weights(data.seq_len)
        weights = weights if weights is None else to_device(weights, device)
        with autocasting(device, settings.autocast):
            loss = training_loss(model, rows[:, :-1], rows[:, 1:], settings.z_loss, weights)
            penalised = loss if match is None else loss + match(which)
        (penalised / count).backward()
        total += loss.detach() / count
    if penalty is not None:
        (penalty() / world.size).backward()
    world.sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return world.sum(total)


def new_optimiser(groups: Sequence[ParameterGroup], settings: LoopSettings) -> torch.optim.AdamW:
    """Return what moves ``groups``; ``set_rate`` tells it how far."""
    return torch.optim.AdamW(
        [{"params": list(group.parameters), "lr_factor": group.lr_factor} for group in groups],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``; nothing waits until it has arrived."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Let matrix products inside the ``with`` statement run in ``dtype``, or in the weights' own where it is None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Let an optimiser's next step be made at ``rate`` times each group's own factor."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["lr_factor"]


def _refuse_nonfinite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FlexctlError(f"the loss became {loss} at step {step + 1}", hint="try a smaller `lr`")


def _report(bar: Progress, losses: Sequence[float], tokens: int, tokens_per_s: float) -> None:
    known = {"loss": _recent(losses)} if losses else {}
    bar.advance(tokens, **known, tokens_per_s=tokens_per_s)


def _recent(losses: Sequence[float]) -> float:
    """Return the mean of the last 20 losses."""
    recent = losses[-20:]
    return sum(recent) / len(recent)
