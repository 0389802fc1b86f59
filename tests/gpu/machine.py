"""The card, its software, and the two rates that everything else is held against."""

from __future__ import annotations

import os
import platform
import time

import torch
import transformers

from tests.benchmarks.steps import matmul_flops_per_s
from tests.gpu.section import Section


def main() -> None:
    """Measure."""
    section = Section()
    section.put(
        name="machine",
        device=torch.cuda.get_device_name() if not section.small else platform.machine(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        cpus=os.cpu_count(),
        date=time.strftime("%Y-%m-%d"),
    )
    size = 512 if section.small else 8192
    for dtype in (torch.bfloat16, torch.float32):
        with section.part(f"matrix product, {dtype}") as figures:
            figures["flops_per_s"] = matmul_flops_per_s(section.device, dtype, size)
    if not section.small:
        with section.part("copy on the card") as figures:
            source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
            target = torch.empty_like(source)
            target.copy_(source)
            torch.cuda.synchronize()
            started = time.monotonic()
            for _ in range(10):
                target.copy_(source)
            torch.cuda.synchronize()
            figures["bytes_per_s"] = 20 * source.numel() / (time.monotonic() - started)
    section.end()


if __name__ == "__main__":
    main()
