"""Training steps at the size of OLMo-2-1B, against the alternatives; and where the time of a pair's step goes."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.benchmarks.shapes import ONE_B, SEVEN_B, SMALL
from tests.benchmarks.steps import KINDS, USUAL, free, matmul_flops_per_s, measure, pair, run
from tests.gpu.section import Section

_SEVEN_B_BYTES = 84_000_000_000
"""Of a card that holds a full expert of a 7B: those of 80 GB."""


def main() -> None:
    """Measure in bfloat16, with a batch of 8 and, for its memory, of 1; and a 7B, where the card is large enough."""
    section = Section()
    shape = SMALL if section.small else ONE_B
    rate = matmul_flops_per_s(section.device, torch.bfloat16, 256 if section.small else 8192)
    section.put(name="measured rate", dtype="bfloat16", flops_per_s=rate)
    names = USUAL if section.small else tuple(KINDS)
    for row in measure(shape, section.device, torch.bfloat16, steps=2 if section.small else 12, names=names):
        section.failed |= "failed" in row
        section.put(**row, **({"share_of_rate": row["flops_per_s"] / rate} if "flops_per_s" in row else {}))
    for rank in (None, 16):
        with section.part(f"profile of a pair's step, rank {rank}"):
            _profile(section, rank)
    small = replace(shape, batch=1)
    for row in measure(small, section.device, torch.bfloat16, steps=4, names=(*USUAL[:2], "pair, recomputed")):
        section.put(**row | {"name": f"{row['name']}, batch 1"})
    if section.small or torch.cuda.get_device_properties(section.device).total_memory > _SEVEN_B_BYTES:
        large = SMALL if section.small else SEVEN_B
        for row in measure(large, section.device, torch.bfloat16, steps=2, names=("pair, recomputed",)):
            section.failed |= "failed" in row
            section.put(**row | {"name": f"{row['name']}, of a 7B, batch {large.batch}"})
    section.end()


def _profile(section: Section, rank: int | None) -> None:
    from torch.profiler import ProfilerActivity, profile

    shape = SMALL if section.small else ONE_B
    made = pair(shape, section.device, torch.bfloat16, rank)
    run(made, shape, 2)
    activities = [ProfilerActivity.CPU] + ([] if section.small else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        run(made, shape, 2)
    order = "self_cpu_time_total" if section.small else "self_device_time_total"
    text = found.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=70)
    with (section.out.parent / "profile.txt").open("a") as file:
        file.write(f"two steps of a pair, rank {rank}\n{text}\n")
    made = None  # type: ignore[assignment]
    free(section.device)


if __name__ == "__main__":
    main()
