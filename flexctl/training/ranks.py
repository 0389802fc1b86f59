"""Which rank each matrix of a compressed expert gets, within a number of components for all of them.

A component is one row of A with one column of B; in every matrix it takes the same number of bytes. Which matrix a
component is worth most in is measured on held-out text: what it adds to the loss that the expert takes off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flexctl.families import feed_forward_names
from flexctl.model.losses import training_loss
from flexctl.model.routed import routed_layers
from flexctl.runtime import Reporter

__all__ = ["Factors", "choose_ranks", "expert_matrices", "measure_gains", "share_out"]

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Expert tensor name -> A (components, in) and B (out, components) of its difference, largest components first."""

PATH_POINTS = 4


def expert_matrices(model: nn.Module, index: int) -> dict[str, nn.Parameter]:
    """Return the matrices of expert ``index`` in ``model`` by expert tensor name."""
    blocks = routed_layers(model)
    return {
        name: getattr(blocks[layer].experts[index], projection).weight
        for layer, projection, name in feed_forward_names(len(blocks))
    }


def choose_ranks(
    model: nn.Module,
    factors: Factors,
    components: int,
    sequences: Sequence[Tensor],
    score: Callable[[], float],
    reporter: Reporter,
) -> dict[str, int]:
    """Return the rank of every matrix, at least 1, together at most ``components``.

    Three ways to share components out are tried, and the one with the lowest held-out loss is taken: the same rank for
    all; the largest singular values of all; the largest measured gains. It costs ``PATH_POINTS`` gradients over
    ``sequences`` and three scorings, however many matrices there are.

    Args:
        model: The pair; its expert's matrices are changed.
        factors: The expert's differences to the public expert.
        components: Rows of A in the whole expert, at least one a matrix.
        sequences: Held-out text, batches of (B, S + 1) token ids.
        score: Scores the model as it is on held-out text, nats a token.
        reporter: Hears of progress.
    """
    values = {name: a.square().sum(dim=1) for name, (a, _) in factors.items()}
    gains = measure_gains(model, factors, sequences, reporter)
    even = [components // len(factors) + (i < components % len(factors)) for i in range(len(factors))]
    ways = {
        "evenly": {name: min(n, len(values[name])) for name, n in zip(factors, even, strict=True)},
        "by singular values": share_out(values, components),
        "by measured gains": share_out(gains, components),
    }
    losses = {}
    with reporter.progress("comparing ranks", len(ways), "ways") as bar:
        for way, ranks in ways.items():
            _set_matrices(model, factors, ranks)
            losses[way] = score()
            bar.advance(1, loss=losses[way])
    best = min(losses, key=lambda way: losses[way])
    others = ", ".join(f"{loss:.4f} {way}" for way, loss in losses.items() if way != best)
    reporter.note(f"ranks are shared out {best}: held-out loss {losses[best]:.4f}; {others}")
    return ways[best]


def measure_gains(
    model: nn.Module, factors: Factors, sequences: Sequence[Tensor], reporter: Reporter
) -> dict[str, Tensor]:
    """Return what each component takes off the loss, nats a token, (components,) a matrix.

    The loss falls from the public expert's to the expert's along W(t) = W_public + t B A, t from 0 to 1, so it is the
    sum over components i of the integral of -<dL/dW(t), B[:, i] A[i]>: each term is that component's gain. The
    integral is taken by the midpoint rule.

    Args:
        model: The pair; its expert's matrices are changed.
        factors: The expert's differences.
        sequences: Held-out text, batches of (B, S + 1) token ids.
        reporter: Hears of progress.

    Source: Sundararajan et al., "Axiomatic Attribution for Deep Networks" (arXiv 1703.01365), on components in place
    of inputs.
    """
    gains = {name: torch.zeros(len(a)) for name, (a, _) in factors.items()}
    targets = sum(batch[:, 1:].numel() for batch in sequences)
    own = expert_matrices(model, 1)
    with reporter.progress("measuring gains", PATH_POINTS * targets, "tokens") as bar:
        for point in range(PATH_POINTS):
            _set_matrices(model, factors, None, scale=(point + 0.5) / PATH_POINTS)
            for matrix in own.values():
                matrix.requires_grad_(True)
            for batch in sequences:
                loss = training_loss(model, batch[:, :-1], batch[:, 1:], z_loss=0.0)
                (loss / (targets * PATH_POINTS)).backward()
                bar.advance(batch[:, 1:].numel())
            for name, (a, b) in factors.items():
                gradient = own[name].grad
                assert gradient is not None
                gains[name] -= ((b.T @ gradient.float().cpu()) * a).sum(dim=1)
                own[name].grad = None
                own[name].requires_grad_(False)
    return gains


def share_out(worth: Mapping[str, Tensor], components: int) -> dict[str, int]:
    """Return how many of its first components each matrix keeps, at least 1, so that together they are worth most.

    Components are kept from the first on, so each matrix's running total is replaced by its least concave cover:
    stretches of falling mean worth, which are taken in that order over all matrices. What is worth nothing is not
    taken, even where room is left.

    Args:
        worth: Of each component, (components,) a matrix; may be negative.
        components: How many may be kept in all.
    """
    ranks = dict.fromkeys(worth, 1)
    stretches = [(mean, name, count) for name, each in worth.items() for mean, count in _stretches(each.tolist()[1:])]
    left = components - len(ranks)
    for mean, name, count in sorted(stretches, key=lambda stretch: -stretch[0]):
        if mean > 0 and left > 0:
            ranks[name] += min(count, left)
            left -= min(count, left)
    return ranks


def _stretches(each: Sequence[float]) -> list[tuple[float, int]]:
    """Return (mean, length) of the stretches of falling mean that numbers fall into, joined from the left."""
    found: list[tuple[float, int]] = []
    for number in each:
        mean, count = number, 1
        while found and found[-1][0] <= mean:
            before, length = found.pop()
            mean, count = (before * length + mean * count) / (length + count), length + count
        found.append((mean, count))
    return found


@torch.no_grad()
def _set_matrices(model: nn.Module, factors: Factors, ranks: Mapping[str, int] | None, scale: float = 1.0) -> None:
    """Give the expert W_public + scale B A, of the first ``ranks`` components or of all."""
    public, own = expert_matrices(model, 0), expert_matrices(model, 1)
    for name, (a, b) in factors.items():
        kept = len(a) if ranks is None else ranks[name]
        difference = scale * (b[:, :kept] @ a[:kept])
        own[name].copy_(public[name].float() + difference.to(public[name].device))
