"""What rows alone say of who takes whose text, against drawing the text itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.routing.overlap import (
    NOTEWORTHY,
    OWN_SPREAD,
    LayerSpace,
    Routing,
    expected_routing,
    overlaps,
    taken_of_public,
)

LAYERS, HIDDEN, RANK = 3, 8, 4


def make_space(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(LAYERS, HIDDEN))
    mean[:, -1] = 30
    return {
        "mean": mean,
        "factor": rng.normal(size=(LAYERS, RANK, HIDDEN)),
        "diagonal": rng.uniform(0.5, 1.5, size=(LAYERS, HIDDEN)),
    }


def routing_of(names: list[str], rows: np.ndarray, space: dict[str, np.ndarray]) -> Routing:
    parts = (space["mean"], space["factor"], space["diagonal"])
    return expected_routing(names, rows, (LayerSpace(*layer) for layer in zip(*parts, strict=True)))


def covariance(space: dict[str, np.ndarray], layer: int) -> np.ndarray:
    return space["factor"][layer].T @ space["factor"][layer] + np.diag(space["diagonal"][layer])


def discriminant_rows(space: dict[str, np.ndarray], shifts: np.ndarray) -> np.ndarray:
    """Rows of owners whose means are off public by ``shifts`` (N, LAYERS, HIDDEN), as flexctl makes them."""
    rows = np.zeros_like(shifts)
    for layer in range(LAYERS):
        mean, inverse = space["mean"][layer], np.linalg.inv(covariance(space, layer))
        constant = inverse @ mean / (mean @ inverse @ mean)
        for owner, shift in enumerate(shifts[:, layer]):
            free = inverse @ shift
            rows[owner, layer] = free - (free @ mean) * constant - shift @ free / 2 * constant
    return rows


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_shares_are_those_of_drawn_text(seed: int) -> None:
    """Draw inputs around each owner's mean, as far apart as said, and let the rows route them.

    The seeds are the same each time, as both sides draw: of 400 others, two were more than 0.05 off.
    """
    space, rng = make_space(seed), np.random.default_rng(seed)
    shifts = 1.5 * rng.normal(size=(3, LAYERS, HIDDEN))
    shifts[:, :, -1] = 0
    rows = discriminant_rows(space, shifts)
    found = routing_of(["a", "b", "c"], rows, space)
    for text, shift, spread in (("public", 0 * shifts[0], 1.0), ("b", shifts[1], OWN_SPREAD)):
        shares = np.zeros(4)
        for layer in range(LAYERS):
            noise = rng.multivariate_normal(np.zeros(HIDDEN), covariance(space, layer), size=4000)
            inputs = space["mean"][layer] + shift[layer] + spread * noise
            logits = np.column_stack([np.zeros(4000), inputs @ rows[:, layer].T])
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            shares += (powers / powers.sum(axis=1, keepdims=True)).mean(axis=0) / LAYERS
        assert list(found[text].values()) == pytest.approx(shares, abs=0.05)
        assert sum(found[text].values()) == pytest.approx(1.0)


def test_owners_of_like_text_overlap_and_others_do_not() -> None:
    space = make_space(0)
    near, far = np.zeros((2, LAYERS, HIDDEN))
    near[:, 0], far[:, 1] = 3, 5
    rows = discriminant_rows(space, np.stack([near, 1.1 * near, far]))
    found = routing_of(["left", "right", "far"], rows, space)
    told = overlaps(found)
    assert {(overlap.text, overlap.taker) for overlap in told} >= {("left", "right"), ("right", "left")}
    assert all("public" not in (overlap.text, overlap.taker) for overlap in told)
    assert all(overlap.share >= NOTEWORTHY for overlap in told)
    assert found["far"]["far"] > found["left"]["left"]
    assert [overlap.share for overlap in told] == sorted((overlap.share for overlap in told), reverse=True)


def test_without_closed_experts_public_has_everything() -> None:
    assert routing_of([], np.zeros((0, LAYERS, HIDDEN)), make_space(1)) == {"public": {"public": 1.0}}
    assert overlaps({"public": {"public": 1.0}}) == []


def test_the_same_rows_give_the_same_figures() -> None:
    space = make_space(2)
    rows = discriminant_rows(space, np.random.default_rng(0).normal(size=(2, LAYERS, HIDDEN)))
    assert routing_of(["a", "b"], rows, space) == routing_of(["a", "b"], rows, space)


def test_what_is_taken_of_public_text_alone_is_what_the_pair_says() -> None:
    rng = np.random.default_rng(3)
    layers, size = 2, 6
    space = [
        LayerSpace(rng.normal(size=size), rng.normal(size=(3, size)), rng.uniform(0.5, 1, size)) for _ in range(layers)
    ]
    rows = rng.normal(size=(4, layers, size))
    shares = taken_of_public(rows, space)
    for index in range(4):
        pair = expected_routing(["x"], rows[index : index + 1], space)
        assert shares[index] == pytest.approx(pair["public"]["x"], abs=0.03)
    assert taken_of_public(rows * 0, space) == pytest.approx([0.5] * 4)
