"""What the sections share: where figures go, the device, and how a step of one that fails is passed over."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


class Section:
    """A section's options and its file of figures, a JSON object a line, written as soon as each is known."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--layers", type=int, default=4)
        parser.add_argument("--small", action="store_true")
        options = parser.parse_args()
        self.small: bool = options.small
        self.layers: int = options.layers
        self.out: Path = options.out
        self.device = torch.device("cpu" if self.small else "cuda")
        self.failed = False

    def put(self, **figures: Any) -> None:
        """Write one line of figures, and show it."""
        print(figures, flush=True)
        with self.out.open("a") as file:
            file.write(json.dumps(figures) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """Time a part and write its figures; one that fails says why, and the next goes on."""
        figures: dict[str, Any] = {}
        started = time.monotonic()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield figures
        except (Exception, SystemExit) as error:
            self.failed = True
            traceback.print_exc()
            figures["failed"] = f"{type(error).__name__}: {error}"[:300]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            figures["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        self.put(name=name, seconds=time.monotonic() - started, **figures)

    def end(self) -> None:
        """Leave with 1 where a part failed."""
        raise SystemExit(int(self.failed))
