"""How fast this machine's processor multiplies, measured once: it decides what ``dtype`` auto is on a CPU."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

from flexctl import cache
from flexctl.runtime import software_versions

if TYPE_CHECKING:
    import torch

__all__ = ["bfloat16_pays", "matmul_flops_per_s", "matmul_gflops_per_s", "remember_rates"]

_SIZES, _REPEATS = {"cpu": 512, "cuda": 8192}, 3
"""Rows of the square matrices that are multiplied, by kind of device, and how often; the fastest counts."""

_PAYS_FROM = 1.3
"""A processor that multiplies bfloat16 does it at least twice as fast, one that emulates it several times slower."""

_CACHE_KIND = "matrix-products"


def matmul_gflops_per_s() -> dict[str, float]:
    """Return dtype -> billions of operations a second in products of square matrices on the CPU, measured now."""
    import torch

    cpu = torch.device("cpu")
    rates = {dtype: matmul_flops_per_s(cpu, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    return {str(dtype).removeprefix("torch."): rate for dtype, rate in rates.items()}


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return operations a second in products of square matrices, measured now: on a CPU in milliseconds."""
    import torch

    size = _SIZES[device.type]
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    times_s = []
    for _ in range(1 + _REPEATS):  # the first one also sets up what the others use
        start_s = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return 2 * float(size) ** 3 / min(times_s[1:])


def bfloat16_pays() -> bool:
    """Return whether this machine's processor multiplies bfloat16 clearly faster; measured the first time."""
    known = cache.recall(_CACHE_KIND, _machine())
    if known is None:
        known = matmul_gflops_per_s()
        remember_rates(known)
    return float(known["bfloat16"]) >= _PAYS_FROM * float(known["float32"])


def remember_rates(gflops_per_s: dict[str, float]) -> None:
    """Keep what was measured for all that ``bfloat16_pays`` is asked on this machine.

    Args:
        gflops_per_s: As from ``matmul_gflops_per_s``.
    """
    import numpy as np

    cache.remember(_CACHE_KIND, _machine(), {name: np.array(rate) for name, rate in gflops_per_s.items()})


def _machine() -> dict[str, Any]:
    return {"host": platform.node(), "processor": platform.machine(), "torch": software_versions().get("torch")}
