"""The one training loop: whole models from scratch, annealing, and the pair of an expert."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from flexctl.errors import FlexctlError
from flexctl.heap import reusing_memory
from flexctl.model.batching import to_device
from flexctl.model.losses import Loss, training_loss
from flexctl.model.rounded import keep_rounded
from flexctl.model.sharding import gathering, whole
from flexctl.processes import ALONE, World
from flexctl.runtime import Progress, Reporter
from flexctl.training.batches import Batches
from flexctl.training.checkpoints import Checkpoints, TrainingState
from flexctl.training.stopping import hearing
from flexctl.training.track import UNTRACKED, RowLogits, Track

__all__ = [
    "MOVES",
    "LoopSettings",
    "Match",
    "Outcome",
    "ParameterGroup",
    "autocasting",
    "learning_rate",
    "new_optimiser",
    "set_rate",
    "train",
    "unmatched",
]

Match = Callable[[Tensor], AbstractContextManager[Callable[[], Tensor]]]
"""A penalty on a forward pass, made inside a ``with`` statement that its way back is inside as well.

Called with which sequences of the pass, in all processes, are public, (B,), bool, on the CPU. What the ``with``
statement gives is called after the pass and returns the penalty, summed over its tokens.
"""

MOVES = 16
"""As many at most a step is made in where gradients stay in the dtype of products: so few are float32 at once."""

_FIGURES = ("loss", "grad_norm", "router_logit/own", "router_logit/public")
"""What a step finds out; the last two where somebody watches."""

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


@contextmanager
def unmatched(_public: Tensor) -> Iterator[Callable[[], Tensor]]:
    """Penalise nothing."""
    yield partial(torch.zeros, ())


@reusing_memory()
def train(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    data: Batches,
    settings: LoopSettings,
    *,
    reporter: Reporter,
    match: Match = unmatched,
    penalty: Callable[[], Tensor] | None = None,
    loss: Loss = training_loss,
    checkpoints: Checkpoints | None = None,
    track: Track = UNTRACKED,
    world: World = ALONE,
) -> Outcome:
    """Train ``groups`` of ``model`` in place and return the losses.

    Args:
        model: As from ``model.building.build_model``; parameters outside the groups need no gradient.
        groups: What to train.
        data: Batches by step.
        settings: How.
        reporter: Gets loss, tokens a second and the time left.
        match: Penalty on every forward pass.
        penalty: Penalty added once a step.
        loss: Of the model's next tokens.
        checkpoints: Where to go on from and what to leave behind; None keeps nothing.
        track: Gets each step's figures: ``_FIGURES``, the rate and tokens a second.
        world: The processes that train; each takes its part of every micro-batch.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint of the last step is left.
        FlexctlError: The loss is not finite, or a file of tokens is not what it was when it was written. That is
            looked at when training starts, before each checkpoint, and when it ends.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    optimiser = new_optimiser(groups, settings)
    state = TrainingState(parameters=parameters, optimiser=optimiser)
    keep_rounded(model, keep=settings.micro_batch >= data.batch_size and penalty is None)
    data.refuse_change()
    losses = checkpoints.restore(state) if checkpoints is not None else []
    loss_of = gathering(model, partial(loss, model), world)
    running, rows = _Running(losses, track), RowLogits(model) if track.is_on else None
    started, first = time.monotonic(), len(losses)
    per_step = data.batch_size * data.seq_len
    with (
        reporter.progress("training", settings.steps * per_step, "tokens") as bar,
        hearing() as stop,
        checkpoints or nullcontext(),
    ):
        bar.advance(first * per_step)
        for step in range(first, settings.steps):
            rate = learning_rate(step, settings)
            set_rate(optimiser, rate)
            figures = _step(loss_of, parameters, data, step, settings, optimiser, match, penalty, rows, world)
            running.add(figures, lr=rate, tokens=per_step)
            _report(bar, losses, per_step, (step + 1 - first) * per_step / (time.monotonic() - started))
            stops, is_due = world.most(
                stop.number, checkpoints is not None and checkpoints.is_due(step + 1, settings.steps)
            )
            if checkpoints is not None and (stops or is_due):
                running.settle()
                checkpoints.save(step + 1, state, losses, data.refuse_change)
            if stops:
                raise stop.ended(stops, step + 1, settings.steps, checkpoints)
        running.settle()
    if rows is not None:
        rows.close()
    data.refuse_change()
    seconds = time.monotonic() - started
    done = (settings.steps - first) * per_step
    return Outcome(losses=losses, tokens_per_s=done / seconds if done > 0 else None)


class _Running:
    """The losses of steps that a device may not have done yet, in their order.

    Args:
        losses: Gets each as soon as it is known, and refuses one that is not finite.
        track: Gets all figures then.
    """

    def __init__(self, losses: list[float], track: Track) -> None:
        self._losses, self._track = losses, track
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, dict[str, float]]] = deque()
        self._last_s = time.monotonic()

    def add(self, figures: Tensor, *, lr: float, tokens: int) -> None:
        """Take a step's ``_FIGURES``, its rate and tokens, and learn what steps before it have lost."""
        copy, copied = figures.to("cpu", non_blocking=True), None
        if figures.is_cuda:
            copied = torch.cuda.Event()
            copied.record()
        now_s = time.monotonic()
        self._waiting.append((copy, copied, {"lr": lr, "tokens_per_s": tokens / max(now_s - self._last_s, 1e-9)}))
        self._last_s = now_s
        self.settle(_STEPS_BEHIND if figures.is_cuda else 0)

    def settle(self, waiting: int = 0) -> None:
        """Wait until the losses of at most so many steps are not known."""
        while len(self._waiting) > waiting:
            figures, copied, known = self._waiting.popleft()
            if copied is not None:
                copied.synchronize()
            found = dict(zip(_FIGURES, figures.tolist(), strict=False))
            self._losses.append(found["loss"])
            self._track.log(len(self._losses), found | known)
            _refuse_nonfinite(self._losses[-1], len(self._losses) - 1)


def _step(
    loss_of: Callable[..., Tensor],
    parameters: Sequence[nn.Parameter],
    data: Batches,
    step: int,
    settings: LoopSettings,
    optimiser: torch.optim.Optimizer,
    match: Match,
    penalty: Callable[[], Tensor] | None,
    rows: RowLogits | None,
    world: World,
) -> Tensor:
    """Make one step and return its ``_FIGURES``, float32."""
    device = parameters[0].device
    batch, public = data.batch(step), data.is_public(step)
    total = torch.zeros((), device=device)
    count = data.batch_size * data.seq_len
    logits = []
    for together, which in zip(batch.split(settings.micro_batch), public.split(settings.micro_batch), strict=True):
        part = world.part(len(together))
        mine, weights = to_device(part.of(together), device), part.weights(data.seq_len)
        weights = weights if weights is None else to_device(weights, device)
        with match(which) as matched:
            with autocasting(device, settings.autocast):
                loss = loss_of(mine[:, :-1], mine[:, 1:], settings.z_loss, weights)
                penalised = loss + matched()
            if rows is not None and rows.is_on:
                logits.append(world.gather(part, rows.take(len(part.numbers))))
            (penalised / count).backward()
        total += loss.detach() / count
    if penalty is not None:
        (penalty() / world.size).backward()
    world.sum_gradients(parameters)
    norm = _move(parameters, settings.max_grad_norm, optimiser)
    seen = _row_means(torch.cat(logits), public) if logits else ()
    return torch.stack([world.sum(total), norm.float(), *seen])


def _move(parameters: Sequence[nn.Parameter], max_norm: float, optimiser: torch.optim.Optimizer) -> Tensor:
    """Clip gradients, move by them, let go of them, and return the norm that they had, ().

    Those that stayed in the dtype of products become float32 a few at a time. Norms, clip and AdamW go parameter by
    parameter, so all numbers are those of float32 gradients made at once, bit for bit.
    """
    waiting = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    if all(gradient.dtype == parameter.dtype for parameter, gradient in waiting):
        norm = whole(clip_grad_norm_(parameters, max_norm))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return norm
    norm = get_total_norm([get_total_norm([gradient.float()]) for _, gradient in waiting])
    optimiser.zero_grad(set_to_none=True)
    at_once = -(-len(waiting) // MOVES)
    while waiting:
        part, waiting = waiting[:at_once], waiting[at_once:]
        for parameter, gradient in part:
            parameter.grad = gradient.float()
        clip_grads_with_norm_([parameter for parameter, _ in part], max_norm, norm)
        optimiser.step()  # of those that have a gradient
        optimiser.zero_grad(set_to_none=True)
    return norm


def _row_means(logits: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of logits (B,) of own and of public sequences, (B,) bool; NaN where there are none."""
    theirs = to_device(public.float(), logits.device)
    own = 1 - theirs
    return (logits * own).sum() / own.sum(), (logits * theirs).sum() / theirs.sum()


def new_optimiser(groups: Sequence[ParameterGroup], settings: LoopSettings) -> torch.optim.AdamW:
    """Return what moves ``groups``; ``set_rate`` tells it how far."""
    return torch.optim.AdamW(
        [{"params": list(group.parameters), "lr_factor": group.lr_factor} for group in groups],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


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
