"""A merged model's forward pass and generation against stock Transformers' FlexOlmo of the same sizes and top-k.

Then other ways of its experts by themselves, whatever the number of tokens: flexctl.model.routed.TOGETHER_ROWS and
flexctl.model.stacked.FEW_ROWS have to lie where they cross.
"""

from __future__ import annotations

import sys

from tests.benchmarks.inference import measure, ours
from tests.benchmarks.shapes import ONE_B, SMALL
from tests.gpu.section import Section


def main() -> None:
    """Measure."""
    import torch

    from flexctl.model import routed, stacked

    section = Section()
    shape = SMALL if section.small else ONE_B
    for row in measure(shape, section.device, torch.bfloat16):
        section.failed |= "failed" in row
        section.put(**row)
    stacked.FEW_ROWS = 0
    for name, rows in (("expert by expert", 0), ("all experts at once, sorted", sys.maxsize)):
        routed.TOGETHER_ROWS = rows
        for row in measure(shape, section.device, torch.bfloat16, {f"flexctl, {name}": ours}):
            section.failed |= "failed" in row
            section.put(**row)
    section.end()


if __name__ == "__main__":
    main()
