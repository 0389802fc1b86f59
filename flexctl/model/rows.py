"""Router rows: from a direction to a row that is calibrated against public text.

Shapes: L num_hidden_layers, H hidden_size. All in float64 until the row is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexctl.model.routed import observing
from flexctl.model.space import RouterSpace

__all__ = [
    "ROUTER_KINDS",
    "Domain",
    "Rows",
    "bias_of",
    "clamp_bias",
    "direction",
    "finish_rows",
    "row_logits",
    "set_bias",
    "set_public_logits",
]

ROUTER_KINDS = ("discriminant", "hidden", "encoder")
MAX_NOISE = 1.0
"""What a row may always get from u not being constant, in nats."""

MAX_NOISE_SHARE = 0.25
"""What it may get beyond that, as a share of |b|: own and public text then lie four deviations from even."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One owner's router inputs, as far as rows need to know them.

    Attributes:
        mean: m_i, (L, H), float64.
        uncertainty: Expected (estimate - m_i)' S^-1 (estimate - m_i) from the finite sample, (L,), float64.
        documents: Independent documents behind the mean.
    """

    mean: Tensor
    uncertainty: Tensor
    documents: int

    @classmethod
    def from_documents(cls, means: Tensor, space: RouterSpace) -> Domain:
        """Return what documents' mean router inputs (documents, L, H) say about their owner.

        The mean's uncertainty is measured from how far the documents lie from each other, so it counts documents
        rather than tokens, which are not independent.
        """
        mean = means.double().mean(dim=0)
        apart = means.double() - mean
        spread = (apart * space.solve(apart)).sum(dim=(0, 2))
        return cls(mean=mean, uncertainty=spread / (len(means) * (len(means) - 1)), documents=len(means))


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


def direction(kind: str, space: RouterSpace, mean: Tensor) -> Tensor:
    """Return the direction d of the kinds that need router inputs alone, (L, H), float64.

    ``discriminant``: S^-1 (m_i - m). ``hidden``: m_i - m. Source: docs/how-it-works.md, section 4.
    """
    shift = mean.double() - space.mean.double()
    return space.solve(shift) if kind == "discriminant" else shift


def finish_rows(space: RouterSpace, domain: Domain, directions: Tensor) -> Rows:
    """Return calibrated rows for any kind of direction.

    ``s = (m_i - m).d / (d'S d)`` with the sample's noise subtracted, ``v = s d``, ``b = -(m_i - m).v / 2`` and
    ``r = v - (v . m) u + b u``, so that r . m = b on public text exactly. A layer where the constant direction u is
    so noisy that the row would get more noise from it than MAX_NOISE and MAX_NOISE_SHARE allow is scaled down.

    Args:
        space: The anchor's router space.
        domain: The owner's mean router inputs.
        directions: d, (L, H), float64.

    Source: docs/how-it-works.md, sections 4 and 5; the sample correction is that of a squared Mahalanobis distance.
    """
    shift = domain.mean.double() - space.mean.double()
    along = (shift * directions).sum(dim=1)
    distance = (shift * space.solve(shift)).sum(dim=1)
    trusted = ((distance - domain.uncertainty) / distance.clamp(min=1e-12)).clamp(min=0.0, max=1.0)
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
    return (rows.double().cpu() * space.mean.double()).sum(dim=1)


def set_bias(rows: Tensor, space: RouterSpace, bias: Tensor | float) -> Tensor:
    """Return rows moved along u until their mean logit on public text is ``bias``, (L, H), float32.

    Args:
        rows: (L, H).
        space: The anchor's router space.
        bias: One number, or (L,).
    """
    missing = bias - bias_of(rows, space)
    return (rows.double().cpu() + missing[:, None] * space.constant()).float()


def set_public_logits(rows: Tensor, space: RouterSpace, mean: float, deviation: float) -> Tensor:
    """Return rows scaled and moved along u until public logits have this mean and deviation, (L, H), float32.

    The deviation is that which S implies for the row without its constant part; what u adds by not being constant
    comes on top.

    Args:
        rows: (L, H).
        space: The anchor's router space.
        mean: Of the logits on public text, in every layer.
        deviation: Their standard deviation.
    """
    free = set_bias(rows, space, 0.0)
    spread = space.quadratic(free).sqrt().clamp(min=1e-12)
    return set_bias(deviation / spread[:, None] * free, space, mean)


def clamp_bias(rows: Tensor, mean: Tensor, constant: Tensor) -> None:
    """Move rows (L, H), in place, along u until their mean logit on public text is at most 0.

    Args:
        rows: float32, changed in place.
        mean: m, (L, H), float32.
        constant: u with u . m = 1, (L, H), float32.
    """
    excess = (rows * mean).sum(dim=1).clamp(min=0)
    rows.sub_(excess[:, None] * constant)


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
