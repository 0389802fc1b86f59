"""Writes what README.md shows of the recorded run and of the comparison, and all pictures: part of ``make docs``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tools import compared
from tools.growth import GROWTH, growth
from tools.picture import PICTURE, life
from tools.record import RECORDED, ROOT

README = ROOT / "README.md"


def removed(recorded: Mapping[str, Any]) -> str:
    """Return the expert that the run removes."""
    return next(step["command"].split()[-1] for step in recorded["commands"] if " remove " in step["command"])


def transcript(recorded: Mapping[str, Any]) -> str:
    """Return the run as one console block; of several experts' training, that of the one that is removed."""
    name = removed(recorded)
    trainings = [step for step in recorded["commands"] if " train-expert " in step["command"]]
    hidden = [step for step in trainings if step["command"].split("--data ")[1] != name]
    shown = [step for step in recorded["commands"] if step not in hidden]
    return "```console\n" + "\n\n".join(f"$ {step['command']}\n{step['output'].rstrip()}" for step in shown) + "\n```"


def table(recorded: Mapping[str, Any]) -> str:
    """Return bits per byte, text by text, model by model, the lowest of a row in bold."""
    bits = recorded["bits_per_byte"]
    lines = [f"| text | {' | '.join(bits)} |", "|---" * (len(bits) + 1) + "|"]
    for text in bits["anchor"]:
        found = [scores.get(text) for scores in bits.values()]
        least = min(value for value in found if value is not None)
        cells = ["" if v is None else f"**{v:.3f}**" if v == least else f"{v:.3f}" for v in found]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    return "\n".join(lines)


def source(recorded: Mapping[str, Any]) -> str:
    """Return which run this is."""
    software = ", ".join(f"{name} {number}" for name, number in recorded["software"].items())
    return f"(Recorded on {recorded['date']} at commit {recorded['commit']}: {software}. Text: {recorded['text']}.)"


BLOCKS: Mapping[str, tuple[Path, Mapping[str, Callable[[Mapping[str, Any]], str]]]] = {
    "recorded": (RECORDED, {"transcript": transcript, "source": source, "table": table}),
    "compared": (compared.COMPARED, {"source": compared.source, "table": compared.table}),
}
"""Where a block's figures are from -> the file, and what makes each block."""


def filled(readme: str, kind: str, figures: Mapping[str, Any]) -> str:
    """Return README.md with every marked block of a kind made anew."""
    for name, make in BLOCKS[kind][1].items():
        blocks = re.findall(rf"<!-- {kind}: {name} -->\n.*?\n<!-- end -->", readme, re.DOTALL)
        if len(blocks) != 1:
            raise SystemExit(f"README.md has {len(blocks)} blocks for {kind}: {name}; expected one")
        readme = readme.replace(blocks[0], f"<!-- {kind}: {name} -->\n{make(figures)}\n<!-- end -->")
    return readme


def current(readme: str) -> str:
    """Return README.md with every marked block made anew."""
    for kind, (file, _) in BLOCKS.items():
        readme = filled(readme, kind, json.loads(file.read_text(encoding="utf-8")))
    return readme


def main() -> None:
    """Write README.md's blocks and the pictures of README.md and docs/scaling.md."""
    README.write_text(current(README.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(life(), encoding="utf-8")
    figures = json.loads(compared.COMPARED.read_text(encoding="utf-8"))
    compared.CHART.write_text(compared.chart(figures), encoding="utf-8")
    GROWTH.write_text(growth(), encoding="utf-8")


if __name__ == "__main__":
    main()
