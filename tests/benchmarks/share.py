"""Which part of a short train-expert is not training: ``python -m tests.benchmarks.share FOLDER [DTYPE]``.

On one thread, by its own time. The anchor is 768 wide with 8 layers and has random weights. init-anchor is shown too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timeline import Timeline
from tests.gpu.life import make_checkpoint, make_text

SHAPE = Shape(layers=8, hidden=768, heads=12, inner=3072, vocab=8192, batch=1, seq_len=1)


def main() -> None:
    """Make what is missing in the folder, train an expert on 50,000 tokens, and say where the time went."""
    root, dtype = Path(sys.argv[1]), (sys.argv[2:] or ["float32"])[0]
    torch.set_num_threads(1)
    if not (root / "checkpoint").exists():
        make_checkpoint(root / "checkpoint", SHAPE, torch.device("cpu"))
        make_text(root / "public.jsonl", SHAPE.vocab, documents=800, words=500, seed=0)
        make_text(root / "law.jsonl", SHAPE.vocab, documents=200, words=500, seed=1)
    if not (root / "anchor").exists():
        timeline = Timeline(time.process_time)
        init_anchor(
            InitAnchorConfig(
                source=str(root / "checkpoint"), data=(root / "public.jsonl",), output=root / "anchor", threads=1
            ),
            timeline,
        )
        _show("init-anchor", timeline)
    timeline = Timeline(time.process_time)
    train_expert(
        TrainExpertConfig(
            data=(root / "law.jsonl",),
            anchor=root / "anchor",
            output=root / "law.st",
            max_tokens=50_000,
            threads=1,
            dtype=dtype,
            overwrite=True,
        ),
        timeline,
    )
    _show(f"train-expert, {dtype}", timeline)


def _show(command: str, timeline: Timeline) -> None:
    timeline.mark("the rest")
    total = sum(timeline.seconds.values())
    for name, seconds in timeline.seconds.items():
        print(f"{seconds:8.2f} s  {name}")
    training = timeline.seconds.get("training", 0.0)
    print(f"{total:8.2f} s  {command}; not training: {1 - training / total:.1%}", flush=True)


if __name__ == "__main__":
    main()
