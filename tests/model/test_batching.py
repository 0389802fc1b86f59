"""Sequences that go through a model together."""

from __future__ import annotations

from flexctl.model.batching import of_like_length


def test_batches_are_filled_shortest_first_and_count_padding() -> None:
    assert list(of_like_length([5, 2, 9, 2, 3], 8)) == [[1, 3], [4], [0], [2]]
    assert list(of_like_length([3, 3, 3], 9)) == [[0, 1, 2]]


def test_of_nothing_there_is_no_batch() -> None:
    assert list(of_like_length([], 8)) == []
