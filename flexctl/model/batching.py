"""Which sequences go through a model together, and how they get to where it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["of_like_length", "to_device"]


def of_like_length(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences in batches, shortest first: of ``positions`` with padding at most, or of one.

    Args:
        lengths: Positions of each sequence.
        positions: That go through the model at once.
    """
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[number] > positions:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on ``device``; nothing waits until it has arrived."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
