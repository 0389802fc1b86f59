"""Merge, remove, replace and verify against copying and hashing the same bytes, in the same run.

``python -m tests.benchmarks merge`` takes 1.2 GB. ``python -m tests.benchmarks.copying FOLDER --gigabytes 20`` takes
any size, keeps bundles and measurements in FOLDER, and goes on from there when it is started again; it needs three
times the size on the disk.

The baseline is a process of its own that copies every file as cp does, in the kernel, hashes the copy and flushes it to
the disk: one file after the other, or a file a core at once. That of verify hashes the same files, a file a core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from flexctl.bundle import Anchor, RawTensor, open_anchor
from tests.benchmarks.showing import show
from tests.builders import make_anchor, make_expert, make_tensors

SMALL = {"layers": 16, "hidden": 768, "inner": 3072, "vocab": 4096, "dtype": "BF16"}
LARGE = {"layers": 16, "hidden": 2048, "inner": 5632, "vocab": 50_000, "dtype": "BF16"}
CORES = os.cpu_count() or 1
REPEATS = 5
ONE, MANY, HASH = "copy + hash", "copy + hash, a file a core", "hash, a file a core"

FLEXCTL = """
import json, os, sys
from flexctl.cli.app import main
from flexctl.runtime import peak_rss_bytes
assert main(sys.argv[1:]) == 0
print(json.dumps([peak_rss_bytes(), sum(os.times()[:2])]), file=sys.stderr)
"""


@dataclass(frozen=True)
class Cost:
    """What a process took: its wall time, its cores' time, its largest resident size; and the bytes it was about."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    bytes: int
    written: int = 0


def measure(command: list[str], size: int) -> Cost:
    """Run a process that ends stderr with its peak and cores' time."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    wall = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, cpu = json.loads(done.stderr.splitlines()[-1])
    told = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return Cost(wall, cpu, peak, size, told.get("bytes_written", 0))


def flexctl(*arguments: str | Path, size: int) -> Cost:
    """Run flexctl in a process of its own."""
    return measure(["-c", FLEXCTL, *map(str, arguments), "--json"], size)


def baseline(act: str, threads: int, sources: Iterable[Path], target: Path, size: int) -> Cost:
    """Copy and hash, or hash, in a process of its own."""
    command = ["-m", "tests.benchmarks.plain_copy", act, str(threads), str(target), *map(str, sources)]
    return measure(command, size)


def make_world(root: Path, experts: int, sizes: dict[str, object]) -> list[Path]:
    """Return the files that a merge takes, made as far as they are not there: random, and no two tensors alike."""
    made = root / "anchor"
    anchor = open_anchor(made) if (made / "flexctl.json").exists() else make_anchor(made, **sizes)
    shutil.rmtree(root / "anchor-checkpoint", ignore_errors=True)
    block = None
    for number in range(experts):
        path = root / f"expert-{number:02}.st"
        if not path.exists():
            block = block or make_tensors(anchor, 0)
            make_rolled(path, anchor, block, number)
    if not (root / "new.st").exists():
        make_rolled(root / "new.st", anchor, block or make_tensors(anchor, 0), experts, name="expert-01")
    return [made / "model.safetensors", *sorted(root.glob("expert-*.st"))]


def make_rolled(path: Path, anchor: Anchor, block: dict[str, RawTensor], by: int, name: str = "") -> None:
    """Write an expert whose weights are a random block's, moved on: quicker to make than new ones."""
    rolled = {key: RawTensor(one.dtype, one.shape, np.roll(one.data, 4 * by + 4)) for key, one in block.items()}
    make_expert(path, anchor, name or path.stem, tensors=rolled)


def measurements(root: Path, sources: list[Path]) -> dict[str, Callable[[], Cost]]:
    """Return what is measured, in the order in which it must be; only the merged model stays."""
    size = sum(source.stat().st_size for source in sources)
    rest = size - sources[-1].stat().st_size
    copied, merged, less, other = (root / name for name in ("copied", "merged", "less", "other"))
    merge = ("merge", *sources[1:], "--anchor", root / "anchor", "-o", merged)
    replace = ("replace", "expert-01", root / "new.st", "--from", merged, "-o", other)
    remove = ("remove", "expert-00", "--from", merged)

    def afresh(folder: Path, work: Callable[[], Cost]) -> Callable[[], Cost]:
        def measured() -> Cost:
            shutil.rmtree(folder, ignore_errors=True)
            cost = work()
            if folder != merged:
                shutil.rmtree(folder)
            return cost

        return measured

    return {
        ONE: afresh(copied, lambda: baseline("copy", 1, sources, copied, size)),
        MANY: afresh(copied, lambda: baseline("copy", CORES, sources, copied, size)),
        "merge": afresh(merged, lambda: flexctl(*merge, size=size)),
        HASH: lambda: baseline("hash", CORES, merged.glob("*.safetensors"), merged, size),
        "verify": lambda: flexctl("verify", merged, size=size),
        "remove": afresh(less, lambda: flexctl(*remove, "-o", less, size=rest)),
        "replace": afresh(other, lambda: flexctl(*replace, size=size)),
        "remove in place, --trust-cache": lambda: flexctl(*remove, "--overwrite", "--trust-cache", size=rest),
    }


def compare(root: Path, *, experts: int, sizes: dict[str, object], repeats: int = REPEATS) -> None:
    """Measure all of it, as far as it is not in the folder already, and show medians and ratios."""
    root.mkdir(parents=True, exist_ok=True)
    starts = run_all(root / "tiny", experts=2, sizes={}, repeats=3)
    report(run_all(root, experts=experts, sizes=sizes, repeats=repeats), starts)


def run_all(root: Path, *, experts: int, sizes: dict[str, object], repeats: int) -> dict[str, list[Cost]]:
    """Return what each measurement took, repeat by repeat; a repeat that was broken off begins again."""
    sources = make_world(root, experts, sizes)
    log = root / "measured.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for _ in range(len(rows), repeats):
        row = {name: asdict(work()) for name, work in measurements(root, sources).items()}
        rows.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return {name: [Cost(**row[name]) for row in rows] for name in rows[0]}


def report(costs: dict[str, list[Cost]], starts: dict[str, list[Cost]]) -> None:
    """Show medians, and ratios a byte, in wall time and in the cores' time."""

    def median(name: str, field: str) -> float:
        start = statistics.median(getattr(cost, field) for cost in starts[name])
        return statistics.median((getattr(cost, field) - start) / cost.bytes for cost in costs[name])

    print(f"medians of {len(costs[ONE])}; ratios a byte, without what the same takes for next to nothing")
    for name, found in costs.items():
        wall, cpu = (statistics.median(getattr(cost, field) for cost in found) for field in ("wall_s", "cpu_s"))
        words = f"{cpu:.2f} s of cores; {max(cost.peak_bytes for cost in found) / 1e6:.0f} MB; "
        words += f"{found[0].bytes / 1e9:.2f} GB, {found[0].written / 1e6:.1f} MB written"
        for against in () if name in (ONE, MANY, HASH) else (HASH,) if name == "verify" else (ONE, MANY):
            ratios = [median(name, field) / median(against, field) for field in ("wall_s", "cpu_s")]
            words += f"; {ratios[0]:.2f} (cores' time {ratios[1]:.2f}) of {against}"
        show(name, f"{wall:.2f} s", words)


def main() -> None:
    """Measure at any size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    expert = 2 * 3 * LARGE["layers"] * LARGE["hidden"] * LARGE["inner"]  # type: ignore[operator]
    experts = max(2, round(arguments.gigabytes * 1e9 / expert) - 1)
    compare(arguments.folder, experts=experts, sizes=LARGE, repeats=arguments.repeats)


if __name__ == "__main__":
    main()
