"""The loop of a run under a guarantee: clipped sums of chosen documents, noise once a step, public text beside them.

Nothing in here looks at the owner's text but the clipped sum that noise is added to: no loss, no count, no stop. Public
text and the match are outside the sum, so they cost nothing.

Shapes: B rows of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexctl.errors import FlexctlError
from flexctl.heap import reusing_memory
from flexctl.model.batching import to_device
from flexctl.model.losses import training_loss
from flexctl.model.tensors import tensors_digest
from flexctl.privacy.clipping import PerDocument
from flexctl.privacy.documents import Documents, Padded, padded
from flexctl.privacy.noise import Secret, noisy
from flexctl.runtime import Reporter
from flexctl.training.batches import Batches
from flexctl.training.checkpoints import Checkpoints, TrainingState
from flexctl.training.loop import (
    LoopSettings,
    Match,
    ParameterGroup,
    autocasting,
    learning_rate,
    new_optimiser,
    set_rate,
)
from flexctl.training.stopping import hearing
from flexctl.training.track import UNTRACKED, Track

__all__ = ["PrivateSteps", "gradient_norm", "train_privately"]

_STEPS_BEFORE_MEASURING = 8
"""Of public text: the B of a low-rank expert begins as zero, where gradients have a tenth of their later norm."""

_HALF = 0.5
"""Share of public text's gradient in those steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivateSteps:
    """What the steps of a private run are.

    Attributes:
        sampling_rate: Probability that a document takes part in a step.
        batch_size: Documents expected in a step, by which sums are divided.
        seq_len: Targets of a document at most; of a longer one, a step takes a part that lies at random.
        max_grad_norm: Clip of a document's gradient, C.
        noise_multiplier: Standard deviation of the noise, in C.
        public_share: Weight of public text in a step, from 0 to below 1.
    """

    sampling_rate: float
    batch_size: int
    seq_len: int
    max_grad_norm: float
    noise_multiplier: float
    public_share: float


@reusing_memory()
def train_privately(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    documents: Documents,
    public: Batches | None,
    steps: PrivateSteps,
    settings: LoopSettings,
    *,
    secret: Secret,
    match: Match,
    checkpoints: Checkpoints,
    reporter: Reporter,
    track: Track = UNTRACKED,
) -> None:
    """Train ``groups`` of ``model`` in place.

    Args:
        model: As from ``model.building.build_model``, with the pair in it.
        groups: What to train.
        documents: The owner's.
        public: Public sequences by step; None for none.
        steps: What a step is.
        settings: How many of them, and how fast; its ``max_grad_norm`` has no part in this.
        secret: Where noise and choice of documents come from.
        match: As ``loop.train`` takes it.
        checkpoints: Where to go on from and what to leave behind; no figure of a document is in there.
        reporter: Hears which step it is.
        track: Hears which step it is and the loss on public text.

    Raises:
        Interrupted: SIGTERM or Ctrl-C came; a checkpoint of the last step is left.
        FlexctlError: A trained tensor did not move, or is not covered by one linear map, or a file was changed.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    start = [_digest(parameter) for parameter in parameters]
    optimiser = new_optimiser(groups, settings)
    state = TrainingState(parameters=parameters, optimiser=optimiser)
    sums = PerDocument(model, parameters)
    # One number a step, as a checkpoint counts steps by them: the loss on public text.
    losses = checkpoints.restore(state)
    with reporter.progress("training", settings.steps, "steps") as bar, hearing() as stop:
        bar.advance(len(losses))
        for step in range(len(losses), settings.steps):
            set_rate(optimiser, learning_rate(step, settings))
            _own_gradients(model, sums, parameters, documents, steps, settings, step, secret)
            losses.append(_public_gradients(model, parameters, public, steps.public_share, settings, step, match))
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            bar.advance(1)
            track.log(step + 1, {} if public is None else {"public_loss": losses[-1]})
            stops = stop.asked is not None
            if stops or checkpoints.is_due(step + 1, settings.steps):
                checkpoints.save(step + 1, state, losses, documents.refuse_change)
            if stops:
                raise stop.ended(stop.number, step + 1, settings.steps, checkpoints)
    sums.close()
    documents.refuse_change()
    _refuse_still(parameters, start)


@reusing_memory()
def gradient_norm(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    public: Batches,
    documents: Sequence[Padded],
    settings: LoopSettings,
    match: Match,
) -> float:
    """Return the median norm of public documents' gradients after a few steps on public text, which are taken back.

    Args:
        model: As for ``train_privately``.
        groups: Likewise.
        public: Public sequences by step.
        documents: Public documents, no empty row among them.
        settings: As for ``train_privately``.
        match: Likewise.

    Raises:
        FlexctlError: It is not finite.
    """
    parameters = [parameter for group in groups for parameter in group.parameters]
    start = [parameter.detach().clone() for parameter in parameters]
    optimiser = new_optimiser(groups, settings)
    set_rate(optimiser, settings.lr)
    for step in range(_STEPS_BEFORE_MEASURING):
        _public_gradients(model, parameters, public, _HALF, settings, step, match)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    sums = PerDocument(model, parameters)
    norms = [sums.norms(_loss_of(model, rows, settings), len(rows.inputs)) for rows in documents]
    sums.close()
    for parameter, before in zip(parameters, start, strict=True):
        parameter.data.copy_(before)
    median = float(torch.cat(norms).median())
    if not math.isfinite(median):
        raise FlexctlError(f"the clip that public text gives is {median}", hint="try a smaller `lr`")
    return median


def _own_gradients(
    model: nn.Module,
    sums: PerDocument,
    parameters: Sequence[nn.Parameter],
    documents: Documents,
    steps: PrivateSteps,
    settings: LoopSettings,
    step: int,
    secret: Secret,
) -> None:
    """Set every gradient to the noised sum of the chosen documents' clipped ones over how many are expected."""
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    for rows in _chosen(documents, steps, settings.micro_batch, step, secret):
        found = sums.clipped_sum(_loss_of(model, rows, settings), len(rows.inputs), steps.max_grad_norm)
        for total, part in zip(totals, found, strict=True):
            total += part
    stream, deviation = secret.stream("steps", step), steps.noise_multiplier * steps.max_grad_norm
    share = (1 - steps.public_share) / steps.batch_size
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = (noisy(total, deviation, stream) * share).to(parameter.dtype)


def _chosen(documents: Documents, steps: PrivateSteps, micro_batch: int, step: int, secret: Secret) -> Iterator[Padded]:
    """Yield the documents of a step in micro-batches of one size: each takes part by itself, by secret bits."""
    stream = secret.stream("sample", step)
    chosen = documents.shortest_first(stream.chosen(len(documents), steps.sampling_rate))
    places = stream.words(len(chosen))
    windows = [
        documents.window(int(index), steps.seq_len, int(place)) for index, place in zip(chosen, places, strict=True)
    ]
    for first in range(0, len(windows), micro_batch):
        yield padded(windows[first : first + micro_batch], micro_batch)


def _loss_of(model: nn.Module, rows: Padded, settings: LoopSettings) -> Callable[[], Tensor]:
    """Return what makes the forward pass of some documents and returns the sum of their mean losses."""
    device = next(model.parameters()).device

    def run() -> Tensor:
        here = rows.to(device)
        with autocasting(device, settings.autocast):
            return training_loss(model, here.inputs, here.targets, settings.z_loss, here.weights)

    return run


def _public_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    public: Batches | None,
    share: float,
    settings: LoopSettings,
    step: int,
    match: Match,
) -> float:
    """Add the gradient of public text and of the match, and return the loss of public text, nats a token."""
    if public is None:
        return 0.0
    device = parameters[0].device
    batch = to_device(public.batch(step), device)
    count = batch[:, 1:].numel()
    with match(public.is_public(step)) as matched:
        with autocasting(device, settings.autocast):
            loss = training_loss(model, batch[:, :-1], batch[:, 1:], settings.z_loss)
            penalised = loss + matched()
        (penalised * (share / count)).backward()
    return float(loss.detach()) / count


def _digest(parameter: nn.Parameter) -> str:
    return tensors_digest({"": parameter.detach()})


def _refuse_still(parameters: Sequence[nn.Parameter], start: Sequence[str]) -> None:
    still = sum(_digest(parameter) == before for parameter, before in zip(parameters, start, strict=True))
    if still:
        raise FlexctlError(
            f"{still} of {len(start)} trained tensors did not move, which noise alone would have done; "
            "nothing was written",
            hint="give a higher `lr`",
        )
