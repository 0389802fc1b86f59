"""Does a removed text come back faster than it comes to a model that never had it?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flexctl import evaluation, model
from flexctl.heap import reusing_memory
from flexctl.runtime import Reporter

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["recover", "scored_at"]

_BATCH = 8


def scored_at(steps: int) -> list[int]:
    """Return the steps at which models are scored: 0, the last, and powers of two between."""
    return sorted({0, steps, *(2**power for power in range(steps.bit_length()) if 2**power <= steps)})


@reusing_memory()
def recover(
    builds: dict[str, Callable[[], nn.Module]],
    train_on: Sequence[Any],
    held_out: Sequence[Any],
    *,
    steps: int,
    lr: float,
    seq_len: int,
    batch_tokens: int,
    seed: int,
    reporter: Reporter,
) -> evaluation.Recovery:
    """Train two models on a little text, alike, and return how each does on more of its kind.

    All weights that take part train, by AdamW with a constant rate, on the same sequences in the same order.

    Args:
        builds: Name -> builds the model anew, without the removed expert; the remaining one first, then the anchor.
        train_on: Framed documents.
        held_out: Framed documents of the same kind, to score.
        steps: Optimiser steps.
        lr: Learning rate.
        seq_len: Targets of a document that are trained on, and a window's when scoring.
        batch_tokens: Positions that go through the model at once when scoring.
        seed: Of the order.
        reporter: Hears of progress.
    """
    places = scored_at(steps)
    curves: dict[str, list[evaluation.Resampled]] = {}
    for name, build in builds.items():
        curves[name] = []
        with reporter.progress(f"training {name} on what was removed", steps, "steps") as bar:
            reader = build()
            for step in _trained(reader, train_on, steps, lr, seq_len, seed):
                if step in places:
                    score = evaluation.score_documents(
                        reader.eval(), held_out, seq_len=seq_len, batch_tokens=batch_tokens
                    )
                    curves[name].append(evaluation.resample(score.per_document))
                bar.advance(min(step, 1))  # step 0 is before any training
    remaining, anchor = curves.values()
    return evaluation.Recovery(
        documents=len(train_on),
        lr=lr,
        steps=places,
        bits_per_byte={name: [point.estimate() for point in curve] for name, curve in curves.items()},
        ahead=[there.above(here) for here, there in zip(remaining, anchor, strict=True)],
        faster=[
            evaluation.gained_more((remaining[0], here), (anchor[0], there))
            for here, there in zip(remaining, anchor, strict=True)
        ],
    )


def _trained(
    reader: nn.Module, train_on: Sequence[Any], steps: int, lr: float, seq_len: int, seed: int
) -> Iterator[int]:
    """Yield 0 before any training, and the number of each step after it."""
    import torch

    reader.requires_grad_(True)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed % 2**63)
    yield 0
    for step in range(1, steps + 1):
        reader.train()
        chosen = torch.randint(len(train_on), (min(_BATCH, len(train_on)),), generator=generator).tolist()
        cut = [torch.from_numpy(train_on[number].tokens[: seq_len + 1]) for number in chosen]
        loss = torch.stack([_loss(reader, ids) for ids in cut]).sum() / sum(len(ids) - 1 for ids in cut)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimiser.step()
        yield step


def _loss(reader: nn.Module, ids: Tensor) -> Tensor:
    ids = ids[None].to(next(reader.parameters()).device)
    return model.training_loss(reader, ids[:, :-1], ids[:, 1:], 0.0)
