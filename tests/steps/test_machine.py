"""What commands run on: auto takes bfloat16 where nothing is rounded by it and the processor multiplies it faster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexctl.errors import UsageError
from flexctl.steps import speed
from flexctl.steps.machine import machine_of

FAST, LEVEL = {"float32": 10.0, "bfloat16": 35.0}, {"float32": 10.0, "bfloat16": 12.0}


def config(dtype: str = "auto", device: str = "cpu") -> Any:
    return SimpleNamespace(threads=None, device=device, dtype=dtype)


def stored(*dtypes: str) -> Any:
    return {str(number): SimpleNamespace(dtype=dtype) for number, dtype in enumerate(dtypes)}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What the processor does when it is measured, the last first; the cache is empty."""
    rates = [FAST]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(speed, "matmul_gflops_per_s", lambda: rates.pop())
    return rates


def test_auto_is_bfloat16_for_what_is_stored_in_it_on_a_processor_that_multiplies_it(measured: Any) -> None:
    machine = machine_of(config(), stored("BF16", "BF16"))
    assert (machine.dtype, machine.autocast) == (torch.bfloat16, torch.bfloat16)
    assert measured == []
    assert machine_of(config(), stored("BF16")).dtype == torch.bfloat16  # measured once


@pytest.mark.parametrize("tensors", [stored("F32"), stored("BF16", "F32"), stored("F16"), stored(), None])
def test_auto_rounds_no_weight(measured: Any, tensors: Any) -> None:
    machine = machine_of(config(), tensors)
    assert (machine.dtype, machine.autocast) == (torch.float32, None)
    assert measured == [FAST]


def test_auto_is_float32_where_bfloat16_does_not_pay(measured: Any) -> None:
    measured[:] = [LEVEL]
    assert machine_of(config(), stored("BF16")).dtype == torch.float32


def test_what_is_asked_for_is_what_runs(measured: Any) -> None:
    assert machine_of(config("float32"), stored("BF16")).dtype == torch.float32
    assert machine_of(config("bfloat16"), stored("F32")).dtype == torch.bfloat16
    assert measured == [FAST]
    with pytest.raises(UsageError, match="int4"):
        machine_of(config("int4"))


def test_rates_are_those_of_this_processor() -> None:
    found = speed.matmul_gflops_per_s()
    assert set(found) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in found.values())
