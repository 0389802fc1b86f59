"""Membership inference: does a model's loss tell documents that were trained on from others of the same kind?"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from flexctl.evaluation.attacks.findings import Membership
from flexctl.evaluation.bootstrap import resample_statistic
from flexctl.heap import reusing_memory
from flexctl.model.losses import score_tokens
from flexctl.runtime import Progress

__all__ = ["Losses", "area", "measure_losses", "memberships", "true_positives"]

_HARDEST = 0.2
_FALSE_POSITIVES = 0.01
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Losses:
    """What a model says of documents, each cut to one window.

    Attributes:
        mean: Nats a token, (documents,).
        zlib: Nats a byte of what zlib makes of the text, (documents,).
        hardest: Nats a token of the fifth of tokens with the highest loss, (documents,).
    """

    mean: Array
    zlib: Array
    hardest: Array

    def scores(self, anchor: Losses | None) -> dict[str, Array]:
        """Return score -> its value for each document, higher for those that look trained on.

        Args:
            anchor: What the anchor says of the same documents; None for the anchor itself.

        Source: Yeom et al., "Privacy Risk in Machine Learning", 2018, for the loss; Carlini et al., "Extracting
        Training Data from Large Language Models", 2021, for zlib and for calibration by another model; Shi et al.,
        "Detecting Pretraining Data from Large Language Models", 2024, for min-k %.
        """
        found = {"loss": -self.mean, "zlib": -self.zlib, "min-k": -self.hardest}
        return found if anchor is None else {**found, "calibrated": anchor.mean - self.mean}


@reusing_memory()
@torch.no_grad()
def measure_losses(
    model: nn.Module, tokenizer: Any, framed: Sequence[Any], *, seq_len: int, batch_tokens: int, progress: Progress
) -> Losses:
    """Return what ``model`` says of framed documents.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        tokenizer: Its tokenizer.
        framed: Framed documents.
        seq_len: Targets of a document that count, from its beginning.
        batch_tokens: Positions that go through the model at once.
        progress: Moves on by documents.
    """
    device = next(model.parameters()).device
    cut = [torch.from_numpy(document.tokens[: seq_len + 1]) for document in framed]
    found: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(cut)
    order = sorted(range(len(cut)), key=lambda number: len(cut[number]))
    while order:
        size = max(1, batch_tokens // len(cut[order[-1]]))
        batch, order = order[-size:], order[:-size]
        ids = nn.utils.rnn.pad_sequence([cut[number] for number in batch], batch_first=True).to(device)
        losses = score_tokens(model, ids[:, :-1], ids[:, 1:]).double().cpu().numpy()
        for number, row in zip(batch, losses, strict=True):
            found[number] = _figures(
                row[: len(cut[number]) - 1], tokenizer.decode(cut[number], skip_special_tokens=True)
            )
        progress.advance(len(batch))
    mean, packed, hardest = np.array(found).T
    return Losses(mean=mean, zlib=packed, hardest=hardest)


def memberships(members: dict[str, Array], others: dict[str, Array]) -> dict[str, Membership]:
    """Return score -> how well it tells documents that were trained on from others.

    Args:
        members: Score -> its value for each document that was trained on.
        others: The same for each that was not.
    """
    return {
        name: Membership(
            auc=resample_statistic(area, members[name], others[name]),
            tpr=resample_statistic(true_positives, members[name], others[name]),
        )
        for name in members
    }


def area(members: Array, others: Array) -> float:
    """Return the chance that one of ``members`` is above one of ``others``, equal ones counted half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, members, side="left") + np.searchsorted(ordered, members, side="right")
    return float(below.mean() / 2 / len(others))


def true_positives(members: Array, others: Array) -> float:
    """Return the share of ``members`` above a threshold that at most one in a hundred of ``others`` is above."""
    allowed = int(_FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    return float((members > threshold).mean())


def _figures(losses: Array, text: str) -> tuple[float, float, float]:
    worst = np.sort(losses)[-max(1, round(_HARDEST * len(losses))) :]
    return float(losses.mean()), float(losses.sum() / len(zlib.compress(text.encode()))), float(worst.mean())
