"""Draws docs/scaling.svg, memory of a device by anchor and number of devices: part of ``make docs``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from flexctl.training.footprint import Sizes, Step, memory_of_step
from tools.record import ROOT

__all__ = ["ANCHORS", "DEVICES", "GROWTH", "RANK", "gigabytes", "growth"]

GROWTH = ROOT / "docs" / "scaling.svg"
DEVICES, RANK = (1, 2, 4, 8), 16
_OLMO = {"vocab": 100_352, "is_tied": False, "norms_queries": True}
ANCHORS = {
    "SmolLM2-135M": Sizes(
        hidden=576, inner=1536, layers=30, vocab=49_152, queries=576, keys=192, is_tied=True, norms_queries=False
    ),
    "OLMo-2-1B": Sizes(hidden=2048, inner=8192, layers=16, queries=2048, keys=2048, **_OLMO),
    "OLMo-2-7B": Sizes(hidden=4096, inner=11_008, layers=32, queries=4096, keys=4096, **_OLMO),
}
_COLOURS = ("#52606d", "#b65c00", "#00689d")
_CARDS = (24, 80)
_INK, _QUIET, _PAPER, _LINE = "#1f2933", "#52606d", "#ffffff", "#d5dbe1"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 420, 70, 560, 70, 370
_TICKS = (2, 4, 8, 16, 32, 64, 128)


def gigabytes(sizes: Sizes, rank: int | None, devices: int, *, recompute: bool = False) -> float:
    """Return memory of each card, GB, in bfloat16, one sequence of 1,024 tokens at a time, with CUDA's own 1.05."""
    step = Step(
        tokens=1024,
        seq_len=1024,
        item_bytes=2,
        rank=rank,
        recompute=recompute,
        accumulates=True,
        public_share=0.3,
        on_card=True,
        processes=devices,
    )
    return sum(memory_of_step(sizes, step).values()) / 1e9 + 1.05


def growth() -> str:
    """Return the picture as SVG, memory on a logarithmic scale."""
    title = "Memory of each card while an expert trains, by the formula"
    parts = [
        f'<text x="16" y="28" class="title">{title}</text>',
        '<text x="16" y="48" class="note">bfloat16, one sequence of 1,024 tokens on each; '
        f"lines: full experts, dashes: rank {RANK}</text>",
        *map(_tick, _TICKS),
        *map(_card, _CARDS),
        *(f'<text x="{_x(count)}" y="{_BOTTOM + 20}" class="middle">{count}</text>' for count in DEVICES),
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_BOTTOM + 40}" class="middle">devices</text>',
        *_lines(),
    ]
    style = (
        f"text{{font:14px sans-serif;fill:{_INK}}} .note,.middle,.end{{font-size:12px;fill:{_QUIET}}} "
        ".title{font-weight:bold} .middle{text-anchor:middle} .end{text-anchor:end}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="t">\n'
        f'<title id="t">{title}</title>\n<style>{style}</style>\n'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="{_PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _lines() -> Iterator[str]:
    for colour, (name, sizes) in zip(_COLOURS, ANCHORS.items(), strict=True):
        for rank, down, dashes in ((None, -1, ""), (RANK, 11, ' stroke-dasharray="6 4"')):
            found = [gigabytes(sizes, rank, count) for count in DEVICES]
            points = " ".join(f"{_x(count)},{_y(value)}" for count, value in zip(DEVICES, found, strict=True))
            yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
            what = name if rank is None else f"{name}, rank {RANK}"
            yield f'<text x="{_RIGHT + 10}" y="{_y(found[-1]) + down:.1f}" style="fill:{colour}">{what}</text>'


def _tick(value: int) -> str:
    y = _y(value)
    line = f'<line x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}" stroke="{_LINE}"/>'
    return f'{line}<text x="{_LEFT - 8}" y="{y + 4}" class="end">{value} GB</text>'


def _card(size: int) -> str:
    y = _y(size)
    line = f'<line x1="{_LEFT}" y1="{y}" x2="{_RIGHT}" y2="{y}" stroke="{_QUIET}" stroke-dasharray="2 3"/>'
    return f'{line}<text x="{(_LEFT + _RIGHT) // 2}" y="{y - 5:.1f}" class="middle">a card of {size} GB</text>'


def _scale(low: float, high: float, start: int, end: int) -> Callable[[float], float]:
    return lambda value: round(start + math.log(value / low) / math.log(high / low) * (end - start), 1)


_x = _scale(DEVICES[0], DEVICES[-1], _LEFT, _RIGHT)
_y = _scale(1, _TICKS[-1], _BOTTOM, _TOP)
