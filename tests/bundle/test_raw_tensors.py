"""Numbers behind bytes: reading, rounding, NaN and infinity, agreement with an expectation."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.bundle.tensors import (
    FLOAT_DTYPES,
    Span,
    TensorType,
    check_agreement,
    from_float32,
    is_finite,
    size_of,
    to_float32,
)
from flexctl.errors import BundleError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest_bf16(value: float) -> int:
    """The bits of the nearest bfloat16, ties to the even one, by exact arithmetic."""
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    below = bits >> 16
    candidates = [below, below + 1]

    def exact(candidate: int) -> Fraction | None:
        number = struct.unpack("<f", struct.pack("<I", candidate << 16))[0]
        return Fraction(number) if math.isfinite(number) else None

    distances = []
    for candidate in candidates:
        number = exact(candidate)
        if number is None:  # infinity stands where the next number would be
            sign = -1 if value < 0 else 1
            number = sign * Fraction(2) ** 128
        distances.append((abs(number - Fraction(value)), candidate & 1, candidate))
    return min(distances)[2]


@given(FLOATS)
def test_bf16_is_the_nearest_with_ties_to_even(value: float) -> None:
    data = from_float32("BF16", np.array([value], np.float32))
    assert int(data.view("<u2")[0]) == nearest_bf16(value)


@given(st.lists(FLOATS, max_size=8), st.sampled_from(FLOAT_DTYPES))
def test_what_was_rounded_once_does_not_change_again(values: list[float], dtype: str) -> None:
    once = from_float32(dtype, np.array(values, np.float32))
    assert from_float32(dtype, to_float32(dtype, once)).tobytes() == once.tobytes()


def test_rounding_is_that_of_torch() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    values = values[np.isfinite(values)]
    for dtype, kind in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        expected = torch.from_numpy(values.copy()).to(kind).view(torch.uint8).numpy()
        assert from_float32(dtype, values).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [*FLOAT_DTYPES])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_found_wherever_they_stand(dtype: str, bad: float) -> None:
    values = np.zeros(1000, np.float32)
    assert is_finite(dtype, from_float32(dtype, values))
    if dtype == "BF16" and math.isnan(bad):
        data = from_float32(dtype, values)
        data.view("<u2")[-1] = 0x7FC0
    else:
        values[-1] = bad
        data = from_float32(dtype, values)
    assert not is_finite(dtype, data)


def test_integers_and_nothing_are_finite() -> None:
    assert is_finite("I64", b"\xff" * 16)
    assert is_finite("BF16", b"")


def test_rows_of_a_span(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"head" + bytes(range(24)))
    span = Span(path, "U8", (4, 6), 4, 28)
    assert span.rows(1, 3) == Span(path, "U8", (2, 6), 10, 22)
    assert span.rows(3, 4).load() == bytes(range(18, 24))
    assert span.read().data.tobytes() == span.load()
    with pytest.raises(BundleError, match="is truncated"):
        Span(path, "U8", (30,), 4, 34).load()
    assert Span(path, "U8", (0,), 4, 4).read().data.size == 0


def test_size_of() -> None:
    assert size_of(TensorType("BF16", (3, 5))) == 30
    assert size_of(TensorType("F32", ())) == 4


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "f: tensor a is missing"),
        ({"a": TensorType("F32", (2,))}, "f: tensor a: dtype is F32; expected BF16"),
        ({"a": TensorType("BF16", (3,))}, r"f: tensor a: shape is \(3,\); expected \(2,\)"),
        ({"a": TensorType("BF16", (2,)), "b": TensorType("F32", ())}, "f: tensor 'b' is extra"),
    ],
)
def test_disagreement_names_the_tensor(found: dict[str, TensorType], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_agreement(found, {"a": TensorType("BF16", (2,))}, "f")


def test_other_dtypes_have_no_floats() -> None:
    with pytest.raises(BundleError, match="dtype is I64"):
        to_float32("I64", b"")
    with pytest.raises(BundleError, match="dtype is F64"):
        from_float32("F64", np.zeros(1, np.float32))
