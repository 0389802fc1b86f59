"""What README.md shows of flexctl beside the alternatives, from docs/compared.json: a table and docs/compared.svg.

The figures are those of docs/results.md, section 8; a test holds them to it. Part of ``make docs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.record import ROOT

__all__ = ["CHART", "COMPARED", "chart", "source", "table"]

COMPARED = ROOT / "docs" / "compared.json"
CHART = ROOT / "docs" / "compared.svg"

_OURS = "flexctl"
_INK, _QUIET, _PAPER, _LINE = "#1f2933", "#52606d", "#ffffff", "#d5dbe1"
_ACCENT, _OTHER = "#b65c00", "#00689d"
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 900, 350, 850, 66, 27
_TICKS = (1.18, 1.19, 1.20, 1.21, 1.22, 1.23, 1.24, 1.25, 1.26)


def table(compared: Mapping[str, Any]) -> str:
    """Return every way to combine what owners have, best first, with intervals."""
    lines = ["| | mean | worse than flexctl by (95 %) | share of the experts' own gain kept |", "|---|---|---|---|"]
    for row in _ranked(compared):
        cells = [row["name"], f"{row['bits_per_byte']:.3f}", _interval(row["worse"], 3), _interval(row["kept"], 2)]
        lines.append(f"| {' | '.join(f'**{cell}**' if cell and _is_ours(row) else cell for cell in cells)} |")
    return "\n".join(lines)


def source(compared: Mapping[str, Any]) -> str:
    """Return what was measured, and when."""
    return f"({compared['model']}, measured on {compared['date']} at commit {compared['commit']}, {compared['note']}.)"


def chart(compared: Mapping[str, Any]) -> str:
    """Return the same as a picture: a dot each, with the interval of its distance from flexctl."""
    rows = _ranked(compared)
    bottom = _TOP + _ROW * len(rows)
    (ours,) = (row["bits_per_byte"] for row in rows if _is_ours(row))
    title = "Bits per byte of flexctl's merged model and of its alternatives; lower is better"
    parts = [
        f'<text x="16" y="28" class="title">{title}</text>',
        f'<text x="16" y="48" class="note">{compared["model"]}, seven owners, mean of eight sets of test text '
        "and three seeds; bars: 95 % of the distance from flexctl</text>",
        *(_tick(value, bottom) for value in _TICKS),
        f'<line x1="{_x(ours)}" y1="{_TOP}" x2="{_x(ours)}" y2="{bottom}" stroke="{_ACCENT}" stroke-dasharray="3 4"/>',
        *(_dot(row, _TOP + _ROW * place + _ROW // 2) for place, row in enumerate(rows)),
    ]
    style = (
        f"text{{font:14px sans-serif;fill:{_INK}}} .note,.tick{{font-size:12px;fill:{_QUIET}}} "
        ".title{font-weight:bold} .name{text-anchor:end} .tick{text-anchor:middle} .ours{font-weight:bold}"
    )
    height = bottom + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t">\n'
        f'<title id="t">{title}</title>\n<style>{style}</style>\n'
        f'<rect width="{_WIDTH}" height="{height}" fill="{_PAPER}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _ranked(compared: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(compared["rows"], key=lambda row: float(row["bits_per_byte"]))


def _is_ours(row: Mapping[str, Any]) -> bool:
    return bool(row["row"] == _OURS)


def _interval(estimate: Mapping[str, float] | None, decimals: int) -> str:
    if estimate is None:
        return ""
    value, *ends = (f"{estimate[name]:.{decimals}f}" for name in ("value", "low", "high") if name in estimate)
    return f"{value} ({ends[0]} to {ends[1]})" if ends else value


def _x(bits: float) -> float:
    share = (bits - _TICKS[0]) / (_TICKS[-1] - _TICKS[0])
    return round(_LEFT + share * (_RIGHT - _LEFT), 1)


def _tick(value: float, bottom: int) -> str:
    x = _x(value)
    line = f'<line x1="{x}" y1="{_TOP}" x2="{x}" y2="{bottom}" stroke="{_LINE}"/>'
    return f'{line}<text x="{x}" y="{bottom + 18}" class="tick">{value:.2f}</text>'


def _dot(row: Mapping[str, Any], y: int) -> str:
    bits, colour = row["bits_per_byte"], _ACCENT if _is_ours(row) else _OTHER
    name = f'<text x="{_LEFT - 16}" y="{y + 5}" class="name{" ours" if _is_ours(row) else ""}">{row["name"]}</text>'
    bar = ""
    if row["worse"]:
        low, high = (_x(bits + row["worse"][end] - row["worse"]["value"]) for end in ("low", "high"))
        bar = f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
    return f'{name}{bar}<circle cx="{_x(bits)}" cy="{y}" r="5" fill="{colour}"/>'
