"""Which token comes next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from flexctl.serving.sampling import Sampling, choose, score

LOGITS = torch.tensor([0.5, 0.2, 0.2, 0.07, 0.03]).log()


def drawn(sampling: Sampling, count: int = 2000) -> Counter[int]:
    draws = [i / count for i in range(count)]
    return Counter(choose(LOGITS.expand(count, -1), [sampling] * count, draws))


def shares(counts: Counter[int], count: int = 2000) -> list[float]:
    return [counts[token] / count for token in range(5)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), (0.5, 0.2, 0.2, 0.07, 0.03)),
        (Sampling(temperature=1.0, top_p=0.69), (0.5 / 0.7, 0.2 / 0.7, 0, 0, 0)),
        (Sampling(temperature=1.0, top_p=0.71), (0.5 / 0.9, 0.2 / 0.9, 0.2 / 0.9, 0, 0)),
        (Sampling(temperature=1.0, top_p=1e-9), (1, 0, 0, 0, 0)),
        (Sampling(temperature=0.0, top_p=0.5), (1, 0, 0, 0, 0)),
        (Sampling(temperature=1e-300), (1, 0, 0, 0, 0)),
        (Sampling(temperature=1e30), (0.2, 0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_what_is_drawn_is_as_likely_as_it_should_be(sampling: Sampling, expected: Sequence[float]) -> None:
    assert shares(drawn(sampling)) == pytest.approx(expected, abs=2e-3)


def test_a_row_draws_the_same_beside_any_others() -> None:
    ways = [Sampling(temperature=1.0), Sampling(), Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=3.0)]
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    draws = [0.9, 0.1, 0.7, 0.2]
    together = choose(logits, ways, draws)
    assert together == [choose(logits[i : i + 1], [ways[i]], [draws[i]])[0] for i in range(4)]


def test_the_highest_draw_stays_among_tokens_that_may_come() -> None:
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    for top_p in (1.0, 0.99):
        assert choose(logits, [Sampling(temperature=1.0, top_p=top_p)], [1 - 2**-53]) == [1]


def test_scores_are_those_of_the_model() -> None:
    (first, second) = score(LOGITS.expand(2, -1) + 3, [3, 0], 2)
    assert first[0] == pytest.approx(math.log(0.07))
    assert [token for token, _ in second[1]] in ([0, 1], [0, 2])
    assert [value for _, value in first[1]] == pytest.approx([math.log(0.5), math.log(0.2)])
    assert score(LOGITS[None], [0], 0)[0][1] == ()
    assert len(score(LOGITS[None], [0], 99)[0][1]) == 5
