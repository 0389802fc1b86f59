"""The pair: a frozen public expert beside one that trains, behind router rows that stay as they are.

Shapes: L num_hidden_layers, H hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.families import PROJECTIONS
from flexctl.model.batching import to_device
from flexctl.model.building import add_expert
from flexctl.model.lowrank import LowRankLinear, expand
from flexctl.model.routed import routed_layers
from flexctl.model.sharding import network_of_rows, whole
from flexctl.model.tensors import DTYPES, RawBytes, rows_of
from flexctl.processes import ALONE, World
from flexctl.training.loop import ParameterGroup

__all__ = ["Pair", "low_rank_lr_factor"]

LOW_RANK_LR_FACTOR, LOW_RANK_KNEE = 16.0, 8


class Pair:
    """One expert in training beside the public one, in a model that ``build_model`` made from an anchor.

    The frozen and the trainable expert are separate modules, so nothing frozen has a gradient, optimiser state or a
    matrix product for its weight gradient.

    Args:
        model: The anchor; gets one more expert in every layer.
        rows: Its router rows, which stay as they are, (L, H), float32.
        public_match: Weight of the expert's relative squared distance from the public expert's output on public text.
        rank: Of a low-rank expert, which trains differences to the public matrices; None is a full one.
        seed: Of a low-rank expert's start.
        world: The processes that share the model.

    Source: FlexOlmo section 3.3 for the pair; the match and rows that do not train are ours (docs/how-it-works.md,
    section 2).
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Tensor,
        *,
        public_match: float,
        rank: int | None = None,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        self.experts = add_expert(model, rows, rank, seed, world)
        self._blocks = blocks = routed_layers(model)
        self._match, self._rank, self._world = public_match, rank, world
        self._runs_in = next(blocks[0].experts[0].parameters()).dtype
        self._device = blocks[0].router.public.device
        self._outputs: list[dict[str, Tensor]] = [{} for _ in blocks]
        self._is_matched = False
        base: Any = model.base_model
        self._watching = [base.register_forward_pre_hook(self._begin)]
        self._watching += [
            block.experts[index].register_forward_hook(partial(self._keep, layer, name))
            for layer, block in enumerate(blocks)
            for index, name in enumerate(("public", "own"))
        ]

    def _begin(self, _module: nn.Module, _inputs: object) -> None:
        self._is_matched = self._match == 0

    def _keep(self, layer: int, name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        # Layers that are computed again on the way back come here once more, after the match.
        if torch.is_grad_enabled() and not self._is_matched:
            self._outputs[layer][name] = output

    def close(self) -> None:
        """Stop watching what the experts compute."""
        for watch in self._watching:
            watch.remove()
        for expert in self.experts:
            for part in expert.children():
                if isinstance(part, LowRankLinear):
                    part.leave()
        self._outputs.clear()

    def groups(self) -> list[ParameterGroup]:
        """Return what trains: feed-forward weights."""
        weights = [part for expert in self.experts for part in expert.parameters() if part.requires_grad]
        factor = 1.0 if self._rank is None else low_rank_lr_factor(self._rank)
        return [ParameterGroup(parameters=weights, lr_factor=factor)]

    def match(self, public: Tensor) -> Tensor:
        """Return the match: mean over layers of ||own - public||^2 / ||public||^2 on public tokens, times their number.

        An expert that speaks like the public one on public text does no harm there, however many are merged.

        Args:
            public: Which sequences of the forward pass just made, in all processes, are public, (B,), bool, on the
                CPU, so that nothing waits for the device.
        """
        self._is_matched = True
        if self._match == 0 or not bool(public.any()):
            return torch.zeros((), device=self._device)
        mine = self._world.part(len(public)).marked(public)
        chosen = to_device(mine.nonzero().squeeze(-1), self._device)
        apart, size = [], []
        for outputs in self._outputs:
            theirs, own = (
                outputs[name].unflatten(0, (len(mine), -1)).index_select(0, chosen).float()
                for name in ("public", "own")
            )
            theirs = theirs.detach()
            apart.append((own - theirs).square().sum())
            size.append(theirs.square().sum())
        tokens = int(public.sum()) * theirs.shape[1]
        distance: Tensor = (torch.stack(apart) / self._world.sum(torch.stack(size))).mean()
        matched: Tensor = distance * (self._match * tokens)
        return matched

    @torch.no_grad()
    def round_weights(self, dtype_name: str, public: Mapping[str, RawBytes]) -> dict[str, Tensor]:
        """Round the expert once to ``dtype_name`` ("BF16") and return its tensors by name, none where others write.

        The model then has what readers will make of them, in the dtype that it runs in: matrices after rounding, a
        low-rank expert's expanded.

        Args:
            dtype_name: The anchor's, in safetensors.
            public: The public expert's matrices by expert tensor name, as the anchor has them.
        """
        tensors: dict[str, Tensor] = {}
        for layer, expert in enumerate(self.experts):
            served = {}
            for projection in PROJECTIONS:
                name = f"layers.{layer}.mlp.{projection}.weight"
                part = getattr(expert, projection)
                first, last = self._world.rows(public[name].shape[0])
                if isinstance(part, LowRankLinear):
                    a, b = _rounded(part.a, dtype_name), _rounded(part.b, dtype_name)
                    found = {f"{name}.lora_A": a, f"{name}.lora_B": b}
                    rows = expand(rows_of(public[name], first, last), a, b[first:last])
                else:
                    found = {name: _rounded(part.weight, dtype_name)}
                    rows = found[name][first:last]
                served[projection] = rows.to(self._device, self._runs_in)
                tensors |= found if self._world.is_writer else {}
            self._serve(layer, served)
        return tensors

    def _serve(self, layer: int, rows: Mapping[str, Tensor]) -> None:
        """Let a layer's expert have matrices, of which this process has some rows."""
        if self._world.size > 1:
            experts = self._blocks[layer].experts
            experts[1] = network_of_rows(experts[0], rows, world=self._world)
            return
        for projection, weight in rows.items():
            setattr(self.experts[layer], projection, _linear(weight))


def low_rank_lr_factor(rank: int) -> float:
    """Return how much faster A and B learn than full matrices: 16 times up to rank 8, then falling with the root.

    By measurement: docs/results.md, section 5. B A moves with the sum of its components, so more of them need less.
    """
    return LOW_RANK_LR_FACTOR * min(1.0, math.sqrt(LOW_RANK_KNEE / rank))


def _rounded(weight: Tensor, dtype_name: str) -> Tensor:
    return whole(weight.detach()).to("cpu", DTYPES[dtype_name], copy=True)


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
