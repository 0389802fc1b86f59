"""Ranks: gains add up to what the expert takes off the loss, and components go where they are worth most."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from flexctl.evaluation.scoring import score_documents
from flexctl.model.lowrank import decompose
from flexctl.model.tensors import to_torch
from flexctl.runtime import SILENT
from flexctl.text.tokens import Framed
from flexctl.training.ranks import choose_ranks, expert_matrices, measure_gains, share_out

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = tiny.make_weights(tiny.dense_config(), ("public", "law"), spread=0.05)
TOKENS = tiny.some_tokens(4, 33, seed=3)


def loss(model: Any) -> float:
    documents = [Framed(tokens=row.numpy(), num_bytes=32) for row in TOKENS]
    return score_documents(model, documents, seq_len=32, batch_tokens=4096).nll


@pytest.fixture
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    public, law = (WEIGHTS.experts[name] for name in ("public", "law"))
    return {name: decompose(to_torch(law[name]) - to_torch(public[name])) for name in law}


def test_gains_add_up_to_what_the_expert_takes_off_the_loss(factors: Any) -> None:
    model = tiny.build(WEIGHTS)
    whole = loss(model)
    gains = measure_gains(model, factors, [TOKENS[:1], TOKENS[1:]], SILENT)
    assert {name: len(gain) for name, gain in gains.items()} == {name: len(a) for name, (a, _) in factors.items()}
    with torch.no_grad():
        for public, own in zip(expert_matrices(model, 0).values(), expert_matrices(model, 1).values(), strict=True):
            own.copy_(public)
    taken_off = loss(model) - whole
    assert abs(taken_off) > 0.01
    assert float(sum(gain.sum() for gain in gains.values())) == pytest.approx(taken_off, rel=0.05)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_chosen_ranks_are_within_the_budget_and_no_worse_than_the_same_for_all(factors: Any) -> None:
    model = tiny.build(WEIGHTS)
    public = {name: to_torch(raw) for name, raw in WEIGHTS.experts["public"].items()}

    def loss_at(ranks: dict[str, int]) -> float:
        with torch.no_grad():
            for name, matrix in expert_matrices(model, 1).items():
                a, b = factors[name]
                matrix.copy_(public[name] + b[:, : ranks[name]] @ a[: ranks[name]])
        return loss(model)

    for components in (6, 20, 45):
        ranks = choose_ranks(model, factors, components, [TOKENS], lambda: loss(model), SILENT)
        assert list(ranks) == list(factors)
        assert min(ranks.values()) >= 1
        assert sum(ranks.values()) <= components
        assert loss_at(ranks) <= loss_at(dict.fromkeys(factors, components // 6)) + 1e-6


def test_components_go_where_they_are_worth_most() -> None:
    worth = {"a": torch.tensor([9.0, 1.0, 5.0, -1.0]), "b": torch.tensor([0.0, 2.0, 1.0]), "c": torch.tensor([1.0])}
    # After the first of each come a's next two, worth 3 on average, then b's.
    assert share_out(worth, 3) == {"a": 1, "b": 1, "c": 1}
    assert share_out(worth, 5) == {"a": 3, "b": 1, "c": 1}
    assert share_out(worth, 6) == {"a": 3, "b": 2, "c": 1}
    assert share_out(worth, 100) == {"a": 3, "b": 3, "c": 1}


def test_sharing_out_falling_worth_is_the_best_there_is() -> None:
    generator = np.random.Generator(np.random.PCG64(0))
    for _ in range(5):
        worth = {name: torch.from_numpy(np.sort(generator.random(4))[::-1].copy()) for name in "abc"}
        totals = [
            sum(float(worth[name][:rank].sum()) for name, rank in zip("abc", ranks, strict=True))
            for ranks in itertools.product(range(1, 5), repeat=3)
            if sum(ranks) <= 7
        ]
        found = share_out(worth, 7)
        assert sum(float(worth[name][:rank].sum()) for name, rank in found.items()) == pytest.approx(max(totals))
