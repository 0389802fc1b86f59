"""Plain text for people: numbers, sizes, aligned lists and tables that look the same in a terminal and a file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "amount",
    "cell",
    "duration",
    "expert_colour",
    "local",
    "named",
    "number",
    "paint",
    "pairs",
    "printable",
    "progress_figures",
    "progress_line",
    "table",
]

# Readable on light and dark backgrounds; the public expert keeps the terminal's own colour.
_COLOURS = ("36", "33", "35", "32", "34", "31")
_DIGEST_SHOWN = len("sha256:") + 12


def printable(text: str) -> str:
    """Return text without the control characters that could drive a terminal; lines and tabs stay."""
    return "".join(f"\\x{ord(c):02x}" if _is_control(c) and c not in "\n\t" else c for c in text)


def named(text: str, names: Mapping[str, str]) -> str:
    """Return text whose names in backquotes are as the reader knows them, by ``names``; others stay."""
    return re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[0]), text)


def paint(text: str, code: str) -> str:
    """Return text wrapped in a terminal's colour ``code`` ("1;31" is bold red)."""
    return f"\x1b[{code}m{text}\x1b[0m"


def expert_colour(index: int) -> str:
    """Return the code of a closed expert's colour by its index, from 1."""
    return _COLOURS[(index - 1) % len(_COLOURS)]


def number(value: float) -> str:
    """Return a number with thousands apart and three decimals where they say something."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def amount(value: float, unit: str) -> str:
    """Return how much of a unit: ``1.5 GB``, ``12,000 tokens``. Bytes have decimal prefixes, as on the Hub."""
    if unit != "bytes" or value < 1000:
        return f"{value:,.0f} {unit}"
    exponent = min(int(math.log10(value) / 3), 4)
    return f"{value / 1000**exponent:.1f} {' kMGT'[exponent]}B"


def local(text: str) -> str:
    """Return text whose paths are as the user would type them here: relative below the current directory."""
    try:
        here = re.escape(str(Path.cwd()) + os.sep)
    except FileNotFoundError:  # it was deleted
        return text
    return re.sub(rf"(?<![^\s'\"(]){here}", "", text)


def cell(value: Any, *, name: str = "", whole: bool = False) -> str:
    """Return a field's value as one line.

    Args:
        value: Text, number, path, truth, None, or a list of these.
        name: The field's name; its unit decides how a number reads.
        whole: Show digests in full.
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return amount(value, "bytes") if "bytes" in name.split("_") else number(value)
    if isinstance(value, Path):
        return printable(local(str(value)))
    if isinstance(value, (list, tuple)):
        return ", ".join(cell(item, whole=whole) for item in value) or "-"
    text = printable(str(value)).replace("\n", " ")
    is_digest = text.startswith("sha256:") or name.endswith("sha256")
    return text if whole or not is_digest else text[:_DIGEST_SHOWN]


def pairs(values: Mapping[str, Any], *, whole: bool = False) -> list[str]:
    """Return names and values as two aligned columns; underscores in names become spaces."""
    width = max((len(_label(name)) for name in values), default=0)
    return [f"{_label(name):<{width}}  {cell(value, name=name, whole=whole)}" for name, value in values.items()]


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, whole: bool = False) -> list[str]:
    """Return rows under headers as aligned columns, numbers to the right."""
    rows = [list(row) for row in rows]
    columns = range(len(headers))
    given = [[row[c] for row in rows if row[c] is not None] for c in columns]
    right = [bool(values) and all(map(_is_number, values)) for values in given]
    names = [_label(header) for header in headers]
    cells = [[cell(row[c], name=headers[c], whole=whole) for c in columns] for row in rows]
    widths = [max(len(line[c]) for line in [names, *cells]) for c in columns]
    return [
        "  ".join(f"{line[c]:>{widths[c]}}" if right[c] else f"{line[c]:<{widths[c]}}" for c in columns).rstrip()
        for line in [names, *cells]
    ]


def progress_figures(done: float, unit: str, figures: Mapping[str, float | str]) -> list[str]:
    """Return how far a task is and its figures: ``9,000 tokens``, ``loss 3.214``, ``5,120 tokens/s``."""
    shown = [amount(done, unit)]
    for name, value in figures.items():
        text = value if isinstance(value, str) else number(value)
        label = name.replace("_per_", "/").replace("_", " ")
        shown.append(f"{text} {label}" if "/" in label else f"{label} {text}")
    return shown


def progress_line(title: str, figures: list[str], share: float | None, left_s: float | None) -> str:
    """Return a running task as one line of a log; ``share`` done is 0 to 1 or unknown."""
    parts = [f"{title}:", *figures]
    if share is not None:
        parts.insert(1, f"{100 * share:.0f} %")
    if left_s is not None and left_s >= 1:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def _label(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def duration(seconds: float) -> str:
    """Return seconds as a clock has them: ``4:05``, ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_control(character: str) -> bool:
    return ord(character) < 0x20 or 0x7F <= ord(character) < 0xA0
