"""Train pairs of random weights and print, as JSON, the peak resident bytes of each above what was there before.

The anchor and steps come as JSON in the first argument; each run has a row in the second: dtype, rank, recompute,
micro_batch. Linux alone: it resets the peak in /proc.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from flexctl.model.recompute import recompute_layers
from flexctl.runtime import SILENT, peak_rss_bytes
from flexctl.training.loop import LoopSettings, train
from tests.benchmarks.shapes import SMALL, Shape
from tests.benchmarks.steps import RandomBatches, pair


def main() -> None:
    """Measure."""
    torch.set_num_threads(1)
    for dtype in ("float32", "bfloat16"):  # what the first run of all loads and sets up is no run's
        for rank in (None, 4):
            grown(SMALL, dtype, rank, True, 2)
    shape = Shape(**json.loads(sys.argv[1]))
    print(json.dumps([grown(shape, *run) for run in json.loads(sys.argv[2])]))


def grown(shape: Shape, dtype: str, rank: int | None, recompute: bool, micro_batch: int) -> int:
    """Return the peak of two steps above the resident bytes before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = int(re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024  # type: ignore[index]
    made: Any = pair(shape, torch.device("cpu"), getattr(torch, dtype), rank)
    if recompute:
        recompute_layers(made.model)
    settings = LoopSettings(steps=2, lr=1e-4, warmup_steps=1, micro_batch=micro_batch, autocast=made.autocast)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    train(made.model, made.groups, RandomBatches(shape), settings, reporter=SILENT, match=made.match)
    return peak_rss_bytes() - before


if __name__ == "__main__":
    main()
