"""The router space: what router inputs look like on public text, layer by layer.

Shapes: L num_hidden_layers, H hidden_size, R rank, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.heap import reusing_memory
from flexctl.model.batching import of_like_length, to_device
from flexctl.model.routed import observing, routed_layers
from flexctl.model.tensors import RawBytes, to_torch
from flexctl.processes import ALONE, World
from flexctl.routing.covariances import Covariances

__all__ = [
    "InputStatistics",
    "PassageInputs",
    "RouterSpace",
    "add_outer",
    "constant_spread",
    "fit_space",
    "measure_documents",
    "measure_inputs",
    "measure_passages",
    "mirrored",
]

BATCH_TOKENS = 2048
"""Positions of documents that go through the model at once."""

OUTER_BLOCKS = 4
"""Parts of the width by which sums of outer products are taken: of their two halves, which are the same, one."""

MAX_RANK = 256
SHRINKAGE = 0.1
"""Share of the mean variance added to every direction: shares from 0.003 to 0.3 do about equally well."""

VARIETY = 0.3
"""Weight of other kinds' covariance beside public text's own. By measurement: docs/results.md, section 10."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputStatistics:
    """Sums over router inputs, where the model ran.

    Attributes:
        count: Tokens seen.
        mean: (L, H), float64.
        second: Mean outer product, (L, H, H), float64.
    """

    count: int
    mean: Tensor
    second: Tensor


@dataclass(frozen=True, kw_only=True)
class RouterSpace:
    """Mean and shrunk covariance S = F'F + diag(D) of router inputs on public text.

    Attributes:
        mean: m, (L, H), float32.
        factor: F, (L, R, H), float32, R = min(H, 256).
        diagonal: D, (L, H), float32, positive.
        variety: F and D, likewise, of the covariance with that of other kinds of text added; None in anchors from
            before these were measured always.
    """

    mean: Tensor
    factor: Tensor
    diagonal: Tensor
    variety: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, RawBytes]) -> RouterSpace:
        """Return the space kept in an anchor's ``router-space.safetensors``."""
        layers = sum(name.endswith(".mean") for name in tensors)
        if layers == 0:
            raise BundleError("router-space.safetensors: it holds no layer", hint="calibrate again with init-anchor")

        def stack(part: str) -> Tensor:
            return torch.stack([to_torch(tensors[f"layers.{i}.{part}"]) for i in range(layers)])

        return cls(
            mean=stack("mean"),
            factor=stack("covariance_factor"),
            diagonal=stack("covariance_diagonal"),
            variety=(stack("variety_factor"), stack("variety_diagonal"))
            if "layers.0.variety_factor" in tensors
            else None,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of ``router-space.safetensors`` by name."""
        tensors = {}
        for i in range(len(self.mean)):
            tensors[f"layers.{i}.mean"] = self.mean[i]
            tensors[f"layers.{i}.covariance_factor"] = self.factor[i]
            tensors[f"layers.{i}.covariance_diagonal"] = self.diagonal[i]
            if self.variety is not None:
                tensors[f"layers.{i}.variety_factor"] = self.variety[0][i]
                tensors[f"layers.{i}.variety_diagonal"] = self.variety[1][i]
        return tensors

    def to(self, device: torch.device) -> RouterSpace:
        """Return the same on a device, where everything that is asked of it is then computed; itself if it is there."""
        if device == self.mean.device:
            return self
        varied = None if self.variety is None else (self.variety[0].to(device), self.variety[1].to(device))
        return RouterSpace(
            mean=self.mean.to(device),
            factor=self.factor.to(device),
            diagonal=self.diagonal.to(device),
            variety=varied,
        )

    @cached_property
    def covariances(self) -> Covariances:
        """S of every layer."""
        return Covariances(factor=self.factor, diagonal=self.diagonal)

    @cached_property
    def usual_covariances(self) -> Covariances:
        """How router inputs vary in text of many kinds, as far as that was measured; else S."""
        if self.variety is None:
            return self.covariances
        factor, diagonal = self.variety
        return Covariances(factor=factor, diagonal=diagonal)

    def covariance(self, layer: int) -> Tensor:
        """Return S of one layer, (H, H), float64."""
        return self.covariances.dense(layer)

    def usual(self, layer: int) -> Tensor:
        """Return how router inputs vary in text of many kinds, as far as that was measured; else S. (H, H), float64."""
        return self.usual_covariances.dense(layer)

    def solve(self, directions: Tensor) -> Tensor:
        """Return S^-1 d for directions of every layer, (..., L, H) -> (..., L, H), float64."""
        return self.covariances.solve(directions)

    def quadratic(self, directions: Tensor) -> Tensor:
        """Return d'S d for one direction a layer, (L, H) -> (L,), float64."""
        return self.covariances.quadratic(directions)

    def constant(self) -> Tensor:
        """Return u = S^-1 m / (m . S^-1 m), (L, H), float64: u . m = 1 and u . x is near 1 for most x.

        Source: docs/how-it-works.md, section 5.
        """
        solved = self.solve(self.mean)
        return solved / (self.mean.double() * solved).sum(dim=1, keepdim=True)

    def spread_bound(self) -> Tensor:
        """Return the standard deviation of u . x that S implies, (L,), float64; shrinkage makes it an upper bound."""
        return self.covariances.inverse_quadratic(self.mean).rsqrt()


@reusing_memory()
def measure_inputs(model: nn.Module, batches: Iterable[Tensor], world: World = ALONE) -> InputStatistics:
    """Return mean and second moment of every layer's router inputs.

    The first position of each sequence is left out: it attends to nothing and often is an outlier.

    Args:
        model: As from ``model.building.build_model``.
        batches: Token ids, (B, S), int64.
        world: The processes that share the work; each takes its part of every batch, and all get the whole.

    Raises:
        UsageError: There is too little text.
        FlexctlError: The model computes what is not finite.
    """
    blocks = routed_layers(model)
    hidden = blocks[0].router.public.shape[1]
    device = blocks[0].router.public.device
    mean = torch.zeros(len(blocks), hidden, dtype=torch.float64, device=device)
    second = torch.zeros(len(blocks), hidden, hidden, dtype=torch.float64, device=device)
    count = real = 0
    shape: tuple[int, ...] = ()

    def observe(layer: int, inputs: Tensor, _kept: Tensor, _outputs: Tensor) -> None:
        states = inputs.reshape(*shape, hidden)[:real, 1:].reshape(-1, hidden).float()
        mean[layer] += states.double().sum(dim=0)
        add_outer(second[layer], states)

    with torch.no_grad(), observing(model, observe):
        for batch in batches:
            part = world.part(len(batch))
            rows, real = part.of(batch), part.real
            shape = tuple(rows.shape)
            model.base_model(to_device(rows, device), use_cache=False)  # type: ignore[operator]
            count += len(batch) * (shape[1] - 1)
    if count < 2:
        raise UsageError("there is too little public text to measure router inputs on", hint="give more text")
    found = InputStatistics(count=count, mean=world.sum(mean) / count, second=mirrored(world.sum(second)) / count)
    if not found.second.isfinite().all():
        raise FlexctlError(
            "what routers are given on public text is not finite",
            hint="if the model was trained just now, try a smaller `lr`; else its weights are broken",
        )
    return found


def fit_space(statistics: InputStatistics, kinds: Sequence[Tensor] = ()) -> RouterSpace:
    """Return the shrunk, low-rank-plus-diagonal fit of public router inputs.

    The covariance keeps its ``min(H, 256)`` largest eigenvectors; what they leave stays on the diagonal, and
    ``SHRINKAGE`` times the mean variance is added to it.

    Args:
        statistics: Of public text.
        kinds: Covariances inside passages of other kinds of text, (L, H, H) each, as ``measure_passages`` gives them.
    """
    factor, diagonal = _fit(_covariances(statistics))
    varied = _fit(_covariances(statistics, kinds)) if kinds else None
    return RouterSpace(mean=statistics.mean.float().cpu(), factor=factor, diagonal=diagonal, variety=varied)


def _covariances(statistics: InputStatistics, kinds: Sequence[Tensor] = ()) -> Iterator[Tensor]:
    """Yield the covariance of each layer in turn, as all of them together are large, with other kinds' share."""
    for layer, (mean, second) in enumerate(zip(statistics.mean, statistics.second, strict=True)):
        public = second - torch.outer(mean, mean)
        if kinds:
            mean_kind = torch.stack([kind[layer] for kind in kinds]).double().mean(dim=0)
            public += VARIETY * mean_kind.to(public.device)
        yield public


def _fit(covariances: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return F, (L, R, H), and D, (L, H), float32, on the CPU, of covariances (H, H), float64, a layer each."""
    factors, diagonals = [], []
    for covariance in covariances:
        values, vectors = torch.linalg.eigh(covariance)
        rank = min(len(covariance), MAX_RANK)
        factor = (vectors * values.clamp(min=0).sqrt())[:, -rank:].T
        left = (covariance.diagonal() - factor.square().sum(dim=0)).clamp(min=0)
        factors.append(factor.float().cpu())
        diagonals.append((left + SHRINKAGE * covariance.diagonal().mean() + 1e-12).float().cpu())
    return torch.stack(factors), torch.stack(diagonals)


def constant_spread(space: RouterSpace, statistics: InputStatistics) -> Tensor:
    """Return the standard deviation of u . x on public text, (L,), float64; its mean is 1."""
    constant = space.constant().to(statistics.second.device)
    second = torch.einsum("lh,lhk,lk->l", constant, statistics.second, constant)
    first = (constant * statistics.mean).sum(dim=1)
    return (second - first.square()).clamp(min=0).sqrt().cpu()


@dataclass(frozen=True, kw_only=True, slots=True)
class PassageInputs:
    """What passages' router inputs look like.

    Attributes:
        means: Of each passage, (passages, L, H), float32.
        within: Covariance of inputs about the mean of their own passage, over all passages, (L, H, H), float32, where
            the model ran.
    """

    means: Tensor
    within: Tensor


def measure_documents(
    model: nn.Module,
    documents: Iterable[Tensor],
    advance: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> Tensor:
    """Return the mean router input of each document in each layer, (documents, L, H), float32.

    Documents of like length go through the model together, ``BATCH_TOKENS`` at a time.

    Args:
        model: As from ``model.building.build_model``.
        documents: Token ids of one document each, (S,), int64, at least two; the first position is left out.
        advance: Told after each batch how many documents were in it.
        world: As for ``measure_inputs``.

    Raises:
        UsageError: There are fewer than two documents.
    """
    return _measure_each(model, list(documents), lambda _layer, _apart: None, advance, world)


def measure_passages(
    model: nn.Module,
    passages: Iterable[Tensor],
    advance: Callable[[int], None] | None = None,
    world: World = ALONE,
) -> PassageInputs:
    """Return passages' mean router inputs and how inputs vary inside a passage.

    Args:
        model: As from ``model.building.build_model``.
        passages: As the documents of ``measure_documents``.
        advance: Likewise.
        world: As for ``measure_inputs``.

    Raises:
        UsageError: There are fewer than two passages.
    """
    tokens = list(passages)
    blocks = routed_layers(model)
    rows = blocks[0].router.public
    scatter = torch.zeros(len(blocks), rows.shape[1], rows.shape[1], device=rows.device)

    def add(layer: int, apart: Tensor) -> None:
        add_outer(scatter[layer], apart)

    means = _measure_each(model, tokens, add, advance, world)
    freedom = sum(len(each) - 2 for each in tokens)
    return PassageInputs(means=means, within=mirrored(world.sum(scatter)).div_(max(1, freedom)))


def add_outer(total: Tensor, states: Tensor) -> None:
    """Add the outer product of every state with itself to a sum, (H, H), above its diagonal: 5/8 of the operations.

    Args:
        total: The sum; below the diagonal it is not to be looked at before ``mirrored``.
        states: (T, H), float32.
    """
    width = states.shape[1]
    size = -(-width // OUTER_BLOCKS)
    for first in range(0, width, size):
        total[first : first + size, first:] += states[:, first : first + size].T @ states[:, first:]


def mirrored(totals: Tensor) -> Tensor:
    """Return sums of ``add_outer``, (L, H, H), with what is above the diagonal below it too; in place."""
    for total in totals:
        total.copy_(total.triu() + total.triu(1).T)
    return totals


@reusing_memory()
def _measure_each(
    model: nn.Module,
    documents: Sequence[Tensor],
    add: Callable[[int, Tensor], None],
    advance: Callable[[int], None] | None,
    world: World,
) -> Tensor:
    """Return each document's mean router inputs; ``add`` gets inputs less their document's mean, (T, H), by layer.

    Of positions that are padding, and of each document's first, that is zero. Nothing waits for the device until all
    documents are through.
    """
    if len(documents) < 2:
        raise UsageError("router rows need at least two documents", hint="give more text, or split it into documents")
    blocks = routed_layers(model)
    device, hidden = blocks[0].router.public.device, blocks[0].router.public.shape[1]
    means = torch.zeros(len(documents), len(blocks), hidden, device=device)
    real = current = torch.empty(0)

    def observe(layer: int, inputs: Tensor, _kept: Tensor, _outputs: Tensor) -> None:
        states = inputs.unflatten(0, tuple(real.shape)).float() * real[:, :, None]
        current[:, layer] = states.sum(dim=1) / real.sum(dim=1, keepdim=True)
        add(layer, ((states - current[:, layer, None]) * real[:, :, None]).flatten(0, 1))

    with torch.no_grad(), observing(model, observe):
        for batch in of_like_length([len(tokens) for tokens in documents], BATCH_TOKENS):
            part = world.part(len(batch))
            mine = [documents[batch[number]] for number in part.numbers]
            ids = to_device(nn.utils.rnn.pad_sequence(mine, batch_first=True), device)
            # A row that stands in counts for nothing but its second position, whose distance to itself is zero.
            lengths = torch.tensor([len(tokens) if row < part.real else 2 for row, tokens in enumerate(mine)])
            places = torch.arange(ids.shape[1], device=device)
            real = ((places > 0) & (places < to_device(lengths, device)[:, None])).float()
            current = torch.zeros(len(mine), len(blocks), hidden, device=device)
            model.base_model(ids, use_cache=False)  # type: ignore[operator]
            means[to_device(torch.tensor(batch), device)] = world.gather(part, current)
            if advance is not None:
                advance(len(batch))
    return means.cpu()
