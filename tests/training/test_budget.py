from __future__ import annotations

from typing import Any

import pytest

from flexctl.training.budget import Budget, held_out_tokens, passages, resolve_budget, warmup_steps


def resolve(**settings: Any) -> Budget:
    open_settings = dict.fromkeys(("max_tokens", "seq_len", "batch_tokens", "micro_batch", "lr"))
    sizes = {"available_tokens": 1_000_000, "hidden_size": 192, "max_position_embeddings": 256}
    return resolve_budget(**{"epochs": 1.0, "public_mix": 0.0, **open_settings, **sizes, **settings})


def test_all_of_the_text_once_by_default() -> None:
    assert resolve().own_tokens == 1_000_000
    assert resolve(epochs=2.5).own_tokens == 2_500_000
    assert resolve(epochs=2.5, max_tokens=300_000).own_tokens == 300_000


@pytest.mark.parametrize(("longest", "expected"), [(256, 256), (4096, 1024), (None, 1024)])
def test_sequences_are_as_long_as_the_anchor_can_hold(longest: int | None, expected: int) -> None:
    assert resolve(max_position_embeddings=longest).seq_len == expected


@pytest.mark.parametrize(
    ("tokens", "mix", "expected"),
    [(1_000, 0.0, 1024), (1_300_000, 0.0, 2048), (1_300_000, 0.5, 4096), (10**9, 0.0, 65_536)],
)
def test_steps_grow_with_the_budget(tokens: int, mix: float, expected: int) -> None:
    budget = resolve(available_tokens=tokens, public_mix=mix)
    assert budget.batch_size * budget.seq_len == expected


def test_what_is_given_is_taken() -> None:
    budget = resolve(seq_len=100, batch_tokens=1000, micro_batch=3, lr=0.5)
    assert budget == Budget(own_tokens=1_000_000, seq_len=100, batch_size=10, micro_batch=3, lr=0.5)
    assert resolve(seq_len=100, batch_tokens=10).batch_size == 1


@pytest.mark.parametrize(("width", "expected"), [(32, 2.5e-3), (192, 2e-3), (576, 2e-3 / 9), (4096, 5e-5)])
def test_learning_rate_falls_with_the_square_of_the_width(width: int, expected: float) -> None:
    assert resolve(hidden_size=width).lr == pytest.approx(expected)


def test_warm_up() -> None:
    assert [warmup_steps(steps, None) for steps in (1, 100, 1000)] == [1, 5, 50]
    assert warmup_steps(100, 0) == 0


@pytest.mark.parametrize(
    ("own", "held_out", "count"), [(1_000, 4_096, 128), (100_000, 6_250, 195), (10**9, 65_536, 512)]
)
def test_a_short_run_is_not_mostly_scoring(own: int, held_out: int, count: int) -> None:
    assert (held_out_tokens(own), passages(own)) == (held_out, count)
