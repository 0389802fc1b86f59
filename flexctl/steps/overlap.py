"""What router rows say of who will answer whose text, before any model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from flexctl.bundle import Anchor, RawTensor
from flexctl.bundle.tensors import to_float32
from flexctl.routing.overlap import LayerSpace, Routing, expected_routing, overlaps, taken_of_public
from flexctl.runtime import Reporter

__all__ = ["expected_between", "public_shares", "warn_of_overlaps"]

_PARTS = ("mean", "covariance_factor", "covariance_diagonal")


def public_shares(anchor: Anchor, rows: Mapping[str, RawTensor]) -> dict[str, float]:
    """Return what share of public text each expert is expected to take, alone beside the public one.

    Args:
        anchor: The experts' anchor.
        rows: Closed expert -> its router rows, (num_hidden_layers, hidden_size), F32.
    """
    shares = taken_of_public(_every_row(anchor, rows), _space(anchor))
    return dict(zip(rows, map(float, shares), strict=True))


def expected_between(anchor: Anchor, rows: Mapping[str, RawTensor]) -> Routing:
    """Return what share of each expert's text is expected to go to whom, from the anchor's space and rows alone.

    Args:
        anchor: The experts' anchor.
        rows: Closed expert -> its router rows, (num_hidden_layers, hidden_size), F32.
    """
    return expected_routing(list(rows), _every_row(anchor, rows), _space(anchor))


def _space(anchor: Anchor) -> Iterator[LayerSpace]:
    space = anchor.router_space()
    for layer in range(anchor.manifest.architecture.num_hidden_layers):
        yield LayerSpace(*(_numbers(space[f"layers.{layer}.{part}"]) for part in _PARTS))


def _every_row(anchor: Anchor, rows: Mapping[str, RawTensor]) -> np.ndarray:
    """Return all rows, (experts, num_hidden_layers, hidden_size), float64."""
    sizes = anchor.manifest.architecture
    every_row = np.array([_numbers(tensor) for tensor in rows.values()])
    return every_row.reshape(len(rows), sizes.num_hidden_layers, sizes.hidden_size)


def warn_of_overlaps(routing: Routing, reporter: Reporter) -> list[str]:
    """Tell the reporter, in one line, which experts are expected to take each other's text; return what was told."""
    found = [f"{overlap.taker} {overlap.share:.0%} of {overlap.text}" for overlap in overlaps(routing)]
    told = [f"by router rows alone, experts will take each other's text: {', '.join(found)}"] if found else []
    for line in told:
        reporter.warn(line)
    return told


def _numbers(tensor: RawTensor) -> np.ndarray:
    return to_float32(tensor.dtype, tensor.data).reshape(tensor.shape).astype(np.float64)
