"""Which token comes next: for each row of a pass by its own settings, whatever else is in the pass.

Shapes: R rows, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sampling", "Scored", "choose", "score"]

_GREEDY_BELOW = 1e-5
"""Temperatures below count as 0, as dividing by them leaves the range of float32."""

Scored = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log probability, and the likeliest tokens with theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest that have this share of the probability together.
        seed: Of what is drawn.
        top_logprobs: How many of the likeliest tokens are told with each token; None tells no log probability at all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < _GREEDY_BELOW


def choose(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float]) -> list[int]:
    """Return the next token of each row.

    Args:
        logits: (R, V), float32.
        samplings: By row.
        draws: By row, a number from 0 up to 1 from the sequence's own generator.
    """
    chosen = logits.argmax(dim=-1)
    # What a row draws must not depend on the rows beside it: those that sort and those that need not go apart.
    for is_sorted in (False, True):
        rows = [i for i, way in enumerate(samplings) if not way.is_greedy and (way.top_p < 1) == is_sorted]
        if rows:
            mine = torch.tensor(rows, device=logits.device)
            chosen[mine] = _draw(logits[mine], [samplings[i] for i in rows], [draws[i] for i in rows], is_sorted)
    return [int(token) for token in chosen.tolist()]


def _draw(logits: Tensor, samplings: Sequence[Sampling], draws: Sequence[float], is_sorted: bool) -> Tensor:
    """Return a token for each row by the inverse of its cumulative distribution, (R,), int64."""
    temperatures = logits.new_tensor([way.temperature for way in samplings])[:, None]
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperatures).softmax(-1).double()
    order = None
    if is_sorted:
        top_p = probabilities.new_tensor([way.top_p for way in samplings])[:, None]
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0)
    total = probabilities.cumsum(-1)
    target = total[:, -1:] * total.new_tensor(draws)[:, None]
    # Rounding may put the target at the very end: the last token that has any probability is the last to be drawn.
    last = (probabilities > 0).long().cumsum(-1).argmax(-1, keepdim=True)
    index = torch.minimum(torch.searchsorted(total, target, right=True), last)
    return (index if order is None else order.gather(-1, index))[:, 0]


def score(logits: Tensor, tokens: Sequence[int], most: int) -> list[Scored]:
    """Return each row's token with its log probability, and the likeliest tokens of the row.

    Args:
        logits: (R, V), float32, as the model gave them: temperature and top_p do not count.
        tokens: By row.
        most: How many of the likeliest.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    top = logprobs.topk(min(most, logits.shape[-1]), dim=-1)
    rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    likeliest = [tuple(zip(ids, values, strict=True)) for ids, values in rows]
    return list(zip(own, likeliest, strict=True))
