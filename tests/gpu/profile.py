"""Where the time of a pair's step goes: the kernels of two steps, most expensive first, in gpu-profile.txt."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.shapes import ONE_B, SMALL
from tests.benchmarks.steps import RANK, free, pair, run
from tests.gpu.section import Section


def main() -> None:
    """Profile a full expert's step, and a low-rank one's."""
    section = Section()
    for rank in (None, RANK):
        free(section.device)
        with section.part(f"profile of a pair's step, rank {rank}"):
            _profile(section, rank)
    section.end()


def _profile(section: Section, rank: int | None) -> None:
    shape = SMALL if section.small else ONE_B
    made = pair(shape, section.device, torch.bfloat16, rank)
    run(made, shape, 2)
    activities = [ProfilerActivity.CPU] + ([] if section.small else [ProfilerActivity.CUDA])
    with profile(activities=activities) as found:
        run(made, shape, 2)
    order = "self_cpu_time_total" if section.small else "self_device_time_total"
    text = found.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=70)
    with (section.out.parent / "gpu-profile.txt").open("a") as file:
        file.write(f"two steps of a pair, rank {rank}\n{text}\n")


if __name__ == "__main__":
    main()
