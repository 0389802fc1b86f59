"""Rotary embeddings in fewer passes, which tests/benchmarks measures: Transformers' numbers, forward and back."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.rotary import FAMILIES, given, rotate, stock, there_and_back

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_transformers_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    flat, table = given(family, dtype)
    expected, found = (there_and_back(way, flat, table) for way in (stock(family), rotate))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
