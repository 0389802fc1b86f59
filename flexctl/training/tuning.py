"""Tuning a merged model's router: the rows of all closed experts train together, everything else stands still.

Shapes: L num_hidden_layers, N closed experts, H hidden_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flexctl.model.routed import routed_layers
from flexctl.routing.space import RouterSpace
from flexctl.training.loop import ParameterGroup

__all__ = ["RouterTuning"]


class RouterTuning:
    """The router rows of a merged model in training.

    The public row stays zero: the same vector added to all rows of a layer changes no probability, so nothing is lost.

    Args:
        model: As from ``build_model``, with the rows to start from.
        space: The anchor's router space.
        tether: Weight of the mean squared change of the rows' logits on public text.

    Source: FlexOlmo for tuning on proxies; the tether is ours (docs/how-it-works.md, section 9).
    """

    def __init__(self, model: nn.Module, space: RouterSpace, *, tether: float) -> None:
        self._blocks = routed_layers(model)
        self._rows = [block.router.closed for block in self._blocks]
        for row in self._rows:
            row.requires_grad_(True)
        device = self._rows[0].device
        self._tether = tether
        self._start = torch.stack([row.detach().clone() for row in self._rows])
        self._second = torch.stack(
            [space.covariance(i) + torch.outer(m, m) for i, m in enumerate(space.mean.double())]
        ).to(device, torch.float32)

    @property
    def rows(self) -> list[Tensor]:
        """All rows as they are now, public first, a layer each, (1 + N, H), float32, on the CPU."""
        return [block.router.rows.detach().cpu() for block in self._blocks]

    def groups(self) -> list[ParameterGroup]:
        """Return what trains."""
        return [ParameterGroup(parameters=self._rows)]

    def penalty(self) -> Tensor:
        """Return the tether: mean over layers and experts of (r - r_start)' S2 (r - r_start), weighted.

        S2 is the second moment of public router inputs, so this is the mean squared change of public logits.
        """
        change = torch.stack(list(self._rows)) - self._start
        moved: Tensor = torch.einsum("lnh,lhk,lnk->ln", change, self._second, change).mean()
        return moved * self._tether
