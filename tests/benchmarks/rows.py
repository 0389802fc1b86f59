"""What a router row takes beside a pass through the model, a layer: ``python -m tests.benchmarks.rows WIDTH ...``.

On one thread, by its own time; made-up inputs of a real spread, 128 passages of 256 tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from flexctl.routing.rows import OwnerInputs, discriminant, finish_rows
from flexctl.routing.space import MAX_RANK, PassageInputs, RouterSpace, add_outer, mirrored

PASSAGES, TOKENS, BATCH = 128, 256, 2048
Value = TypeVar("Value")


def main() -> None:
    """Print a line a width."""
    torch.set_num_threads(1)
    for width in map(int, sys.argv[1:]):
        generator = torch.Generator().manual_seed(0)
        scale = torch.logspace(1, -2, width)[torch.randperm(width, generator=generator)]
        space = _space(width, scale, generator)
        means = space.mean + torch.randn(PASSAGES, 1, width, generator=generator) * scale
        states = torch.randn(BATCH, width, generator=generator) * scale
        measured, within = _timed(lambda states=states: _within(states))
        passages = PassageInputs(means=means, within=within)
        known, owner = _timed(lambda passages=passages, space=space: OwnerInputs.of(passages, space))
        directed, found = _timed(lambda owner=owner, space=space: discriminant(space, owner, 0.1))
        finished, _ = _timed(lambda owner=owner, space=space, found=found: finish_rows(space, owner, found))
        print(
            f"{width:5}: outer products {measured:.3f} s, uncertainty {known:.3f} s, direction {directed:.3f} s, "
            f"finish {finished:.3f} s",
            flush=True,
        )


def _space(width: int, scale: Tensor, generator: torch.Generator) -> RouterSpace:
    factor = torch.randn(1, min(width, MAX_RANK), width, generator=generator) * scale
    diagonal = scale.square() + 0.1 * scale.square().mean()
    mean = 3 * torch.randn(1, width, generator=generator) * scale
    return RouterSpace(mean=mean, factor=factor, diagonal=diagonal[None])


def _within(states: Tensor) -> Tensor:
    total = torch.zeros(1, states.shape[1], states.shape[1])
    for _ in range(PASSAGES * TOKENS // BATCH):
        add_outer(total[0], states)
    return mirrored(total).div_(PASSAGES * TOKENS)


def _timed(work: Callable[[], Value]) -> tuple[float, Value]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


if __name__ == "__main__":
    main()
