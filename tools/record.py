"""Goes through an expert's life by the command line and writes down what it said: ``make record``, some minutes.

docs/recorded.json is what the README's first screen is made of. The text is the demo's, all budgets are the defaults.
"""

from __future__ import annotations

import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexctl.text.found_text import DOMAINS, write_domain

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "docs" / "recorded.json"
PUBLIC_BYTES = 1_500_000
OWNERS_BYTES = 450_000
OWNERS = ("arithmetic", "code", "licenses")
REMOVED = "licenses"
TEXT = "what a Python installation carries, as in make demo; one pass over 0.4 MB an owner, all flags at their defaults"


def write_texts(folder: Path) -> None:
    """Write NAME/train.jsonl and tests/NAME.jsonl for public text and every owner's."""
    (folder / "tests").mkdir()
    for name, find in DOMAINS.items():
        name = name if name in OWNERS else "public"
        most = OWNERS_BYTES if name in OWNERS else PUBLIC_BYTES
        _, test = write_domain(folder / name, find(), most)
        test.rename(folder / "tests" / f"{name}.jsonl")


def run(folder: Path, line: str) -> str:
    """Return what a command says on stdout."""
    print(f"$ {line}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", *shlex.split(line)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{line}\n{done.stderr}")
    return done.stdout


def scores(folder: Path, bundle: str, *flags: str) -> dict[str, Any]:
    """Return evaluate's object for a bundle on all tests."""
    tests = " ".join(f"--data tests/{name}.jsonl" for name in ("public", *OWNERS))
    return json.loads(run(folder, " ".join(["flexctl evaluate", bundle, tests, *flags, "--json"])))


def bits_of(result: dict[str, Any]) -> dict[str, float]:
    """Return bits per byte, domain by domain."""
    return {name: round(score["bits_per_byte"], 3) for name, score in result["perplexity"].items()}


def record(folder: Path) -> dict[str, Any]:
    """Return what every command of the life said, and the scores of every model on the way."""
    write_texts(folder)
    said: list[dict[str, str]] = []

    def step(line: str) -> None:
        said.append({"command": line, "output": run(folder, line)})

    step("flexctl init-anchor --data public --preset nano")
    for name in OWNERS:
        step(f"flexctl train-expert --data {name}")
    step("flexctl merge " + " ".join(f"experts/{name}.st" for name in OWNERS))
    merged = scores(folder, "merged", "--ablate")
    bits = {"anchor": bits_of(scores(folder, "anchor"))}
    bits["own expert"] = {name: bits_of(scores(folder, f"experts/{name}.st"))[name] for name in OWNERS}
    bits["merged"] = bits_of(merged)
    for name in OWNERS:
        bits[f"without {name}"] = {domain: round(value, 3) for domain, value in merged["ablation"][name].items()}
    step(f"flexctl remove {REMOVED}")
    step(f"flexctl verify merged --absent {REMOVED}")
    return {"commands": said, "bits_per_byte": bits}


def main() -> None:
    """Write docs/recorded.json."""
    asked = ("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    commit = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        found = record(Path(folder))
    about = {
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "text": TEXT,
        "software": {name: version(name) for name in ("flexctl", "torch", "transformers")},
    }
    RECORDED.write_text(json.dumps({**about, **found}, indent=1, ensure_ascii=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
