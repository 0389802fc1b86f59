"""The pair: a frozen public expert beside one that trains, behind router rows that stay as they are.

Shapes: L num_hidden_layers, H hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from flexctl.families import PROJECTIONS
from flexctl.model.batching import to_device
from flexctl.model.building import add_expert
from flexctl.model.gated import compute_by, product_of
from flexctl.model.lowrank import LowRankDifference, LowRankNetwork, expand
from flexctl.model.routed import RoutedFeedForward, routed_layers
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
        for network in (expert for block in blocks for expert in block.experts):
            if not isinstance(network, LowRankNetwork):
                compute_by(network, product_of(network))
        self._match, self._rank, self._world = public_match, rank, world
        self._runs_in = next(blocks[0].experts[0].parameters()).dtype
        self._device = blocks[0].router.public.device

    def groups(self) -> list[ParameterGroup]:
        """Return what trains: feed-forward weights."""
        weights = [part for expert in self.experts for part in expert.parameters() if part.requires_grad]
        factor = 1.0 if self._rank is None else low_rank_lr_factor(self._rank)
        return [ParameterGroup(parameters=weights, lr_factor=factor)]

    @contextmanager
    def match(self, public: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Watch the forward pass inside the ``with`` statement; what it gives returns the match, once that is made.

        The match is the mean over layers of ||own - public||^2 / ||public||^2 on public tokens, times their number. An
        expert that speaks like the public one on public text does no harm there, however many are merged.

        Args:
            public: Which sequences of the pass, in all processes, are public, (B,), bool, on the CPU, so that nothing
                waits for the device.
        """
        if self._match == 0 or not bool(public.any()):
            yield partial(torch.zeros, (), device=self._device)
            return
        mine = self._world.part(len(public)).marked(public)
        watch = _Watch(len(mine), to_device(mine.nonzero().squeeze(-1), self._device))
        with watch.watching(self._blocks):
            yield lambda: self._distance(watch, int(public.sum()))

    def _distance(self, watch: _Watch, sequences: int) -> Tensor:
        apart, size = watch.read()
        distance: Tensor = (apart / self._world.sum(size)).mean()
        matched: Tensor = distance * (self._match * sequences * watch.seq_len)
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
                if isinstance(part, LowRankDifference):
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
        block = self._blocks[layer]
        block.joined = None
        block.experts[1] = network_of_rows(block.experts[0], rows, world=self._world)


class _Watch:
    """How far the own network is from the public one in one forward pass, layer by layer.

    Args:
        sequences: Of the pass.
        chosen: Which of them are looked at, (C,), int64.
    """

    def __init__(self, sequences: int, chosen: Tensor) -> None:
        self._sequences, self._chosen = sequences, chosen
        self._public: Tensor | None = None
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_read = False
        self.seq_len = 0

    @contextmanager
    def watching(self, blocks: Sequence[RoutedFeedForward]) -> Iterator[None]:
        """Look at what the blocks' two experts compute inside the ``with`` statement, and again on the way back."""
        with ExitStack() as stack:
            for layer, block in enumerate(blocks):
                public, own = block.experts
                if isinstance(own, LowRankNetwork):
                    own.watching = self._pick, partial(self._keep, layer)
                    stack.callback(setattr, own, "watching", None)
                else:
                    stack.enter_context(public.register_forward_hook(self._see_public))
                    stack.enter_context(own.register_forward_hook(partial(self._see_own, layer)))
            yield

    def read(self) -> tuple[Tensor, Tensor]:
        """Return ||own - public||^2 and ||public||^2 by layer, (L,) each, float32."""
        # Layers that are computed again on the way back keep nothing: their numbers would outlive them.
        self._is_read = True
        apart, size = zip(*(self._sums[layer] for layer in sorted(self._sums)), strict=True)
        self._sums.clear()
        return torch.stack(apart), torch.stack(size)

    def _see_public(self, _module: nn.Module, _inputs: object, outputs: Tensor) -> None:
        self._public = self._pick(outputs)

    def _see_own(self, layer: int, _module: nn.Module, _inputs: object, outputs: Tensor) -> None:
        assert self._public is not None, "the public expert runs first"
        theirs, self._public = self._public.float().detach(), None
        self._keep(layer, theirs, self._pick(outputs).float() - theirs)

    def _pick(self, outputs: Tensor) -> Tensor:
        by_sequence = outputs.unflatten(0, (self._sequences, -1))
        self.seq_len = by_sequence.shape[1]
        picked: Tensor = by_sequence.index_select(0, self._chosen)
        return picked

    def _keep(self, layer: int, public: Tensor, apart: Tensor) -> None:
        sums = apart.float().square().sum(), public.float().square().sum()
        if not self._is_read:
            self._sums[layer] = sums


def low_rank_lr_factor(rank: int) -> float:
    """Return how much faster A and B learn than full matrices: 16 times up to rank 8, then falling with the root.

    By measurement: docs/results.md, section 5. B A moves with the sum of its components, so more of them need less.
    """
    return LOW_RANK_LR_FACTOR * min(1.0, math.sqrt(LOW_RANK_KNEE / rank))


def _rounded(weight: Tensor, dtype_name: str) -> Tensor:
    return whole(weight.detach()).to("cpu", DTYPES[dtype_name], copy=True)
