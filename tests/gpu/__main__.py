"""One prepared run on a CUDA device: ``make gpu``, or ``python -m tests.gpu --out FOLDER --limit SECONDS``.

Each section is a process of its own with a time limit of its own, so that one that fails or hangs leaves the others
their time. In FOLDER there are then gpu-figures.json with all figures, gpu-log.txt with everything that was printed,
gpu-table.md, and gpu-profile.txt where that was asked for; what other sections left there before stays. ``--small``
runs the same on a CPU with tiny sizes: the rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SECTIONS = {
    "machine": 30,
    "steps": 75,
    "memory": 75,
    "inference": 90,
    "kernels": 100,
    "tests": 180,
    "life": 120,
    "profile": 60,
}
"""Section -> the most seconds that it may take."""

_LEFT_FOR_THE_END_S, _LEAST_S = 4, 5


def main() -> None:
    """Run the sections asked for inside the limit: one after the other, those joined by + side by side."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + options.limit
    kept = options.out / "gpu-figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    with (options.out / "gpu-log.txt").open("a") as log:
        for names in options.only:
            left = ends - time.monotonic() - _LEFT_FOR_THE_END_S
            with ThreadPoolExecutor(len(names)) as pool:
                found = list(pool.map(lambda name: _section(name, options, left), names))  # noqa: B023
            for name, section in zip(names, found, strict=True):
                log.write(f"\n######## {name}: {section['state']}\n{section.pop('log')}")
                log.flush()
                figures[name] = section
                print(f"{name:<10} {section['state']:<14} {section['seconds']:7.1f} s", flush=True)
            kept.write_text(json.dumps(figures, indent=1))
    table = _table(figures)
    (options.out / "gpu-table.md").write_text(table)
    print(table)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for figures and logs")
    parser.add_argument("--limit", type=float, default=480, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=1, help="factor on every section's own limit")
    parser.add_argument(
        "--only",
        default="machine,steps,memory,inference,kernels,tests+life",
        help="sections, + for side by side: " + ",".join(SECTIONS),
    )
    parser.add_argument("--layers", type=int, default=4, help="layers of the anchor of the section life")
    parser.add_argument("--small", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    options.only = [names.split("+") for names in options.only.split(",")]
    if unknown := {name for names in options.only for name in names} - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    return options


def _section(name: str, options: argparse.Namespace, left_s: float) -> dict[str, Any]:
    """Run one section in a process; return its figures with ``state``, ``seconds`` and ``log``."""
    if left_s < _LEAST_S:
        return {"state": "no time left", "seconds": 0.0, "log": ""}
    limit_s = min(SECTIONS[name] * options.patience, left_s)
    figures, log = options.out / f"gpu-{name}.figures", options.out / f"gpu-{name}.log"
    command = [sys.executable, "-m", f"tests.gpu.{name}", "--out", str(figures), "--layers", str(options.layers)]
    command += ["--small"] if options.small else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "true", "FLEXCTL_DEBUG": "1"}
    started = time.monotonic()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s, env=environment, check=False
            )
            state = "done" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            state = f"past {limit_s:.0f} s"
    found: dict[str, Any] = {"state": state, "seconds": time.monotonic() - started, "log": log.read_text()}
    log.unlink()
    if figures.exists():
        found["figures"] = [json.loads(line) for line in figures.read_text().splitlines()]
        figures.unlink()
    return found


def _table(figures: dict[str, Any]) -> str:
    """Return every figure in lines that a page can show."""
    lines = []
    for name, section in figures.items():
        lines.append(f"\n{name}: {section['state']}, {section['seconds']:.1f} s\n")
        for row in section.get("figures", ()):
            shown = ", ".join(f"{key} {_short(value)}" for key, value in row.items() if key != "name")
            lines.append(f"- {row.get('name', '')}: {shown}")
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10**7:
        return f"{value / 1e9:.3g} G"
    return str(value)


if __name__ == "__main__":
    main()
