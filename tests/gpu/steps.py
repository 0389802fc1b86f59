"""Training steps at the size of OLMo-2-1B, against the alternatives."""

from __future__ import annotations

import torch

from tests.benchmarks.shapes import ONE_B, SMALL
from tests.benchmarks.steps import RANK, matmul_flops_per_s, measure
from tests.gpu.section import Section

ROWS = (
    "pair",
    f"pair, rank {RANK}",
    "dense, every weight",
    "masked 2 experts, eager",
    f"LoRA of peft, rank {RANK}",
    "pair, recomputed",
)
"""What is measured: what is compiled is among the kernels."""


def main() -> None:
    """Measure in bfloat16."""
    section = Section()
    shape = SMALL if section.small else ONE_B
    rate = matmul_flops_per_s(section.device, torch.bfloat16, 256 if section.small else 8192)
    section.put(name="measured rate", dtype="bfloat16", flops_per_s=rate)
    for row in measure(shape, section.device, torch.bfloat16, steps=2 if section.small else 8, names=ROWS):
        section.failed |= "failed" in row
        section.put(**row, **({"share_of_rate": row["flops_per_s"] / rate} if "flops_per_s" in row else {}))
    section.end()


if __name__ == "__main__":
    main()
