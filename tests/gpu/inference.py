"""A merged model's forward pass and generation against stock Transformers' FlexOlmo of the same sizes and top-k."""

from __future__ import annotations

from tests.benchmarks.inference import measure
from tests.benchmarks.shapes import ONE_B, SMALL
from tests.gpu.section import Section


def main() -> None:
    """Measure."""
    import torch

    section = Section()
    for row in measure(SMALL if section.small else ONE_B, section.device, torch.bfloat16):
        section.failed |= "failed" in row
        section.put(**row)
    section.end()


if __name__ == "__main__":
    main()
