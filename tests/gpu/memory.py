"""Memory of a pair's step, at the sizes of OLMo-2-1B and 7B, against what ``--plan`` tells.

What a card cannot hold fails by itself, and says so; the formula may have said that before.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexctl.engine.train_expert import TrainExpertConfig
from flexctl.model.recompute import recompute_layers
from flexctl.steps.outlook import plan_training
from tests.benchmarks.shapes import ONE_B, SEVEN_B, SMALL, Shape, sizes
from tests.benchmarks.steps import RANK, free, pair, peak_bytes, reset_peak, run
from tests.gpu.section import Section

RUNS = [(RANK, False), (RANK, True), (None, True), (None, False)]
"""Rank, and whether layers compute again: the least first."""


def main() -> None:
    """Measure one sequence each, and a full expert of several: of a 7B that is what a card of 80 GB is to hold."""
    section = Section()
    for name, anchor in ({"small": SMALL} if section.small else {"1B": ONE_B, "7B": SEVEN_B}).items():
        for rank, recompute in RUNS:
            _try(section, name, replace(anchor, batch=1), rank, recompute=recompute)
    _try(section, name, anchor, None, recompute=True)
    section.end()


def _try(section: Section, name: str, shape: Shape, rank: int | None, *, recompute: bool) -> None:
    free(section.device)
    kind = f"{'full' if rank is None else f'rank {rank}'}{', recomputed' if recompute else ''}, batch {shape.batch}"
    with section.part(f"{name}, {kind}") as figures:
        figures["predicted_bytes"], figures["predicted_parts"] = predicted(shape, rank, recompute=recompute)
        try:
            _measure(section, shape, rank, recompute, figures)
        except torch.OutOfMemoryError as error:
            figures["out_of_memory"] = str(error)[:300]


def _measure(section: Section, shape: Shape, rank: int | None, recompute: bool, figures: dict[str, Any]) -> None:
    if not section.small:
        figures["free_bytes"], figures["card_bytes"] = torch.cuda.mem_get_info()
    made = pair(shape, section.device, torch.bfloat16, rank)
    if recompute:
        recompute_layers(made.model)
    reset_peak(section.device)
    rate, figures["loss"] = run(made, shape, 3)
    figures["measured_bytes"] = peak_bytes(section.device)
    figures["measured_over_predicted"] = figures["measured_bytes"] / figures["predicted_bytes"]
    figures["step_s"] = shape.tokens / rate
    if not section.small:
        figures["reserved_bytes"] = torch.cuda.max_memory_reserved()


def predicted(shape: Shape, rank: int | None, *, recompute: bool) -> tuple[int, dict[str, int]]:
    """Return the bytes of all tensors on a card, and by part, as ``train-expert --plan`` tells them."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], **sizes(shape)}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        plan = plan_training(
            TrainExpertConfig(
                data=(),
                anchor=Path(folder),
                rank=rank,
                recompute=recompute,
                seq_len=shape.seq_len,
                batch_tokens=shape.tokens,
                device="cuda",
                dtype="bfloat16",
                plan_tflops=1.0,
            )
        )
    parts = {name: taken for name, taken in plan.devices[0].parts_bytes.items() if name != "program" and taken}
    return sum(parts.values()), parts


if __name__ == "__main__":
    main()
