"""Router rows under a guarantee: from a clipped, noised mean over documents, each of which counts once.

A document's share is where its mean router input lies from public text's in every layer, in units in which public
inputs vary alike in all directions, all layers as one vector. What is not the owner's mean is public: the covariance is
public text's alone, and the clip is measured on public documents.

Shapes: B documents, L num_hidden_layers, H hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from flexctl.model.routed import observing, routed_layers
from flexctl.privacy.clipping import clip_scales
from flexctl.privacy.documents import Padded
from flexctl.privacy.noise import Stream, noisy
from flexctl.routing.rows import OwnerInputs, Rows, discriminant, finish_rows
from flexctl.routing.space import RouterSpace

__all__ = ["clipped_shifts", "document_shifts", "private_rows", "shift_norm"]


def document_shifts(model: nn.Module, space: RouterSpace, batches: Iterable[Padded]) -> Iterator[Tensor]:
    """Yield where documents' mean router inputs lie from public text's, whitened, (B, L, H), float64, batch by batch.

    The first position is left out. A row without another one is zero, as one without a document is.

    Args:
        model: The anchor.
        space: Its router space.
        batches: Documents.
    """
    blocks = routed_layers(model)
    device = blocks[0].router.public.device
    near = space.to(device)
    mean = near.mean.double()
    found: Tensor
    counted: Tensor

    def observe(layer: int, inputs: Tensor, _kept: Tensor, _outputs: Tensor) -> None:
        states = inputs.reshape(*counted.shape, -1).double()
        counts = counted.sum(dim=1, keepdim=True)
        mine = (states * counted[:, :, None]).sum(dim=1) / counts.clamp(min=1)
        apart = (mine - mean[layer]) * (counts > 0)
        found[:, layer] = near.covariances.whiten(layer, apart)

    with observing(model, observe):
        for batch in batches:
            with torch.no_grad():
                rows = batch.to(device)
                counted = (rows.weights > 0).double()
                counted[:, 0] = 0
                found = torch.zeros(len(counted), *space.mean.shape, dtype=torch.float64, device=device)
                model.base_model(rows.inputs, use_cache=False)  # type: ignore[operator]
            yield found


def shift_norm(model: nn.Module, space: RouterSpace, batches: Iterable[Padded]) -> float:
    """Return the median length of documents' shifts, all layers together.

    Args:
        model: The anchor.
        space: Its router space.
        batches: Public documents, no empty row among them.
    """
    lengths = [shifts.flatten(1).norm(dim=1) for shifts in document_shifts(model, space, batches)]
    return float(torch.cat(lengths).median())


def clipped_shifts(model: nn.Module, space: RouterSpace, batches: Iterable[Padded], clip: float) -> Tensor:
    """Return the sum of documents' shifts, each at most ``clip`` long over all layers together, (L, H), float64.

    Args:
        model: The anchor.
        space: Its router space.
        batches: Documents; one whose shift is not finite counts nothing.
        clip: Above 0.
    """
    total = torch.zeros(space.mean.shape, dtype=torch.float64)
    for shifts in document_shifts(model, space, batches):
        lengths = shifts.flatten(1).norm(dim=1)
        scale = clip_scales(lengths, clip)
        kept = torch.where(torch.isfinite(lengths)[:, None, None], shifts * scale[:, None, None], 0.0)
        total += kept.sum(dim=0).cpu()
    return total


def private_rows(
    kind: str,
    model: nn.Module,
    space: RouterSpace,
    batches: Iterable[Padded],
    *,
    documents: int,
    clip: float,
    noise_multiplier: float,
    stream: Stream,
) -> Rows:
    """Return calibrated rows from a noised mean.

    Args:
        kind: ``discriminant`` or ``hidden``.
        model: The anchor.
        space: Its router space.
        batches: All of the owner's documents, each once.
        documents: How many there are, as the owner says in public.
        clip: The longest that a document's shift may be.
        noise_multiplier: Standard deviation of the noise on the sum, in clips.
        stream: Secret bits for it.
    """
    total = clipped_shifts(model, space, batches, clip)
    deviation = clip * noise_multiplier
    shift = noisy(total, deviation, stream) / documents
    layers, hidden = shift.shape
    owner = OwnerInputs(
        mean=space.mean.double() + space.covariances.colour(shift),
        within=None,
        # What the noise adds to a squared distance is known, and no secret.
        uncertainty=torch.full((layers,), hidden * (deviation / documents) ** 2, dtype=torch.float64),
    )
    directions = discriminant(space, owner, 0.0) if kind == "discriminant" else owner.mean - space.mean.double()
    return finish_rows(space, owner, directions)
