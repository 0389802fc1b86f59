"""Router rows: from a direction to a row that is calibrated against public text.

Shapes: L num_hidden_layers, H hidden_size. All in float64 until the row is stored, and all where the router space is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flexctl.model.routed import observing
from flexctl.routing.space import PassageInputs, RouterSpace

__all__ = [
    "ROUTER_KINDS",
    "OwnerInputs",
    "Rows",
    "bias_of",
    "discriminant",
    "finish_rows",
    "row_logits",
    "set_bias",
]

ROUTER_KINDS = ("discriminant", "hidden", "encoder")
MAX_NOISE = 1.0
"""What a row may always get from u not being constant, in nats."""

MAX_NOISE_SHARE = 0.25
"""What it may get beyond that, as a share of |b|: own and public text then lie four deviations from even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnerInputs:
    """One owner's router inputs, as far as rows need to know them.

    Attributes:
        mean: m_i, (L, H), float64.
        within: W_i, covariance of inputs inside a passage, (L, H, H), float32; None where it was not measured.
        uncertainty: Expected (estimate - m_i)' S^-1 (estimate - m_i) from the finite sample, (L,), float64.
    """

    mean: Tensor
    within: Tensor | None
    uncertainty: Tensor

    @classmethod
    def of(cls, passages: PassageInputs, space: RouterSpace) -> OwnerInputs:
        """Return what passages say about their owner."""
        return replace(cls.of_means(passages.means, space), within=passages.within.to(space.mean.device))

    @classmethod
    def of_means(cls, means: Tensor, space: RouterSpace) -> OwnerInputs:
        """Return what the means of passages, (passages, L, H), say about their owner; W_i stays unknown.

        The mean's uncertainty is measured from how far the passages' means lie from each other, so it counts passages
        rather than tokens, which are not independent.
        """
        wide = means.to(space.mean.device).double()
        mean = wide.mean(dim=0)
        apart = wide - mean
        spread = space.covariances.inverse_quadratic(apart).sum(dim=0)
        count = len(apart)
        return cls(mean=mean, within=None, uncertainty=spread / (count * (count - 1)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """An expert's router rows and how they came about.

    Attributes:
        rows: r, (L, H), float32.
        bias: b = r . m, (L,), float64, at most 0.
        scale: s, (L,), float64.
        distance: Squared Mahalanobis distance of the owner's mean from public, sample noise taken off, (L,).
        noise: |coefficient of u| * std(u . x), (L,), float64.
    """

    rows: Tensor
    bias: Tensor
    scale: Tensor
    distance: Tensor
    noise: Tensor

    def cpu(self) -> Rows:
        """Return the same on the CPU."""
        return Rows(
            rows=self.rows.cpu(),
            bias=self.bias.cpu(),
            scale=self.scale.cpu(),
            distance=self.distance.cpu(),
            noise=self.noise.cpu(),
        )


def discriminant(space: RouterSpace, owner: OwnerInputs, own_covariance: float) -> Tensor:
    """Return d = ((1 - a) S + a W_i)^-1 (m_i - m), (L, H), float64.

    S alone says how public inputs vary; directions in which the owner's own inputs vary are no mark of them either.
    Here S has a share of how text of other kinds varies, where the anchor knows it.

    Args:
        space: The anchor's router space.
        owner: The owner's router inputs; where W_i was not measured, a is 0.
        own_covariance: a, from 0 (public text alone) to below 1.

    Source: linear discriminant analysis; the share of the owner's own covariance is ours (docs/how-it-works.md,
    section 4).
    """
    shifts = owner.mean - space.mean.double()
    if owner.within is None:
        return space.usual_covariances.solve(shifts)
    directions = []
    for layer, shift in enumerate(shifts):
        # W_i has full rank, so here is the one matrix of H rows that has to be factorised.
        varies = space.usual(layer).mul_(1 - own_covariance).add_(owner.within[layer], alpha=own_covariance)
        directions.append(torch.cholesky_solve(shift[:, None], torch.linalg.cholesky(varies))[:, 0])
    return torch.stack(directions)


def finish_rows(space: RouterSpace, owner: OwnerInputs, directions: Tensor) -> Rows:
    """Return calibrated rows for any kind of direction.

    ``s = (m_i - m).d / (d'S d)`` with the sample's noise subtracted, ``v = s d``, ``b = -(m_i - m).v / 2`` and
    ``r = v - (v . m) u + b u``, so that r . m = b on public text exactly. A layer where the constant direction u is
    so noisy that the row would get more noise from it than MAX_NOISE and MAX_NOISE_SHARE allow is scaled down.

    Args:
        space: The anchor's router space.
        owner: The owner's router inputs.
        directions: d, (L, H), float64.

    Source: docs/how-it-works.md, sections 4 and 5; the sample correction is that of a squared Mahalanobis distance.
    """
    shift = owner.mean - space.mean.double()
    along = (shift * directions).sum(dim=1)
    distance = space.covariances.inverse_quadratic(shift)
    trusted = ((distance - owner.uncertainty) / distance.clamp(min=1e-12)).clamp(min=0.0, max=1.0)
    scale = trusted * along.clamp(min=0) / space.quadratic(directions).clamp(min=1e-12)
    free = scale[:, None] * directions
    bias = -(shift * free).sum(dim=1).clamp(min=0) / 2
    constant = space.constant()
    coefficient = bias - (free * space.mean.double()).sum(dim=1)
    noise = coefficient.abs() * space.spread_bound()
    allowed = (MAX_NOISE_SHARE * bias.abs()).clamp(min=MAX_NOISE)
    keep = (allowed / torch.maximum(noise, allowed))[:, None]
    rows = keep * (free + coefficient[:, None] * constant)
    return Rows(
        rows=rows.float(),
        bias=bias_of(rows, space),
        scale=scale * keep[:, 0],
        distance=distance * trusted,
        noise=noise * keep[:, 0],
    )


def bias_of(rows: Tensor, space: RouterSpace) -> Tensor:
    """Return b = r . m of rows (L, H), as (L,), float64: their mean logit on public text."""
    return (rows.double().to(space.mean.device) * space.mean.double()).sum(dim=1)


def set_bias(rows: Tensor, space: RouterSpace, bias: Tensor | float) -> Tensor:
    """Return rows moved along u until their mean logit on public text is ``bias``, (L, H), float32.

    Args:
        rows: (L, H).
        space: The anchor's router space.
        bias: One number, or (L,).
    """
    missing = bias - bias_of(rows, space)
    return (rows.double().to(space.mean.device) + missing[:, None] * space.constant()).float()


def row_logits(model: nn.Module, rows: Sequence[Tensor], documents: Iterable[Tensor]) -> list[Tensor]:
    """Return every row's logits on documents' router inputs, an (tokens, len(rows)) float32 tensor a layer.

    Args:
        model: The anchor.
        rows: Candidates, (L, H) each.
        documents: Token ids of one document each, (S,), int64; the first position is left out.
    """
    stacked = torch.stack(list(rows), dim=1)
    found: list[list[Tensor]] = [[] for _ in stacked]
    device = next(model.parameters()).device

    def observe(layer: int, inputs: Tensor, _kept: Tensor, _outputs: Tensor) -> None:
        found[layer].append(inputs[1:].float().cpu() @ stacked[layer].T)

    with torch.no_grad(), observing(model, observe):
        for tokens in documents:
            model.base_model(tokens[None].to(device), use_cache=False)  # type: ignore[operator]
    return [torch.cat(parts) for parts in found]
