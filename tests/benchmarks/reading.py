"""What preparing text costs: ``python -m tests.benchmarks.reading TOKENIZER TEXT [TEXT ...]``.

The text is repeated. Rounds with one thread and with two follow each other, so that ratios are of the same machine.
What one thread does by itself, reading and counting, is compared with tokenising by its own processor time. Peaks are
of a process each. The last text is also the test text.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import accumulate, cycle, takewhile
from pathlib import Path

import torch

from flexctl.model.building import load_tokenizer
from flexctl.runtime import SILENT, peak_rss_bytes
from flexctl.text.corpus import prepare_corpus
from flexctl.text.decontamination import Decontamination
from flexctl.text.documents import read_documents
from flexctl.text.encoding import encoded
from flexctl.text.inventory import Stocktaking, take_inventory
from flexctl.text.near_duplicates import NearDuplicates

ROUNDS, ROUND_BYTES = 5, 5_000_000
PEAK_BYTES = (20_000_000, 80_000_000)


def main() -> None:
    """Print the figures, or the peak of one size where a number comes first."""
    if sys.argv[1].isdigit():
        print(_peak(int(sys.argv[1]), Path(sys.argv[2]), list(map(Path, sys.argv[3:]))))
        return
    tokenizer, paths = load_tokenizer(Path(sys.argv[1])), list(map(Path, sys.argv[2:]))
    texts = _about(paths, ROUND_BYTES)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts)} documents, {size / 1e6:.1f} MB")
    seconds: dict[int, list[float]] = {1: [], 2: []}
    own: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for threads, found in seconds.items():
            torch.set_num_threads(threads)
            start, start_own = time.perf_counter(), time.process_time()
            for _ in encoded(tokenizer, texts):
                pass
            found.append(time.perf_counter() - start)
            own[threads].append(time.process_time() - start_own)
    for threads, found in seconds.items():
        pace = size / 1e6 / statistics.median(found)
        print(f"{threads} threads: {pace:.2f} MB/s (median of {ROUNDS}), 10 GB in {1e4 / pace / 3600:.1f} h;", end=" ")
        print(f"{size / 1e6 / statistics.median(own[threads]):.2f} MB a second of own time")
    ratios = [one / two for one, two in zip(*seconds.values(), strict=True)]
    print(f"two threads over one, by round: {', '.join(f'{ratio:.2f}' for ratio in sorted(ratios))}")
    for name, share in _shares(paths, texts, statistics.median(own[1])).items():
        print(f"{name}: {share:.0%} of tokenising's own time")
    for most in PEAK_BYTES:
        command = [sys.executable, "-m", "tests.benchmarks.reading", str(most), *sys.argv[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"peak of preparing {most / 1e6:.0f} MB: {int(done.stdout) / 1e6:.0f} MB")


def _about(paths: list[Path], num_bytes: int) -> list[str]:
    """Return documents in a shuffled order, repeated until there are enough bytes."""
    texts = list(read_documents(paths))
    random.Random(0).shuffle(texts)
    sizes = accumulate(len(text.encode()) for text in cycle(texts))
    return [text for text, _ in zip(cycle(texts), takewhile(lambda size: size < num_bytes, sizes), strict=False)]


def _shares(paths: list[Path], texts: list[str], tokenising_s: float) -> dict[str, float]:
    without = Decontamination.read(paths[-1:], "text")
    with tempfile.TemporaryDirectory() as folder, NearDuplicates.within(Path(folder)) as near:
        file = _written(texts, Path(folder))
        taking = Stocktaking([file], "text", 0, reporter=SILENT)
        return {
            "the first pass": _own(lambda: take_inventory(taking)) / tokenising_s,
            "words in a row": _own(lambda: [without.shares(text) for text in texts]) / tokenising_s,
            "near duplicates": _own(lambda: ([near.add(text) for text in texts], near.count())) / tokenising_s,
        }


def _own(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _peak(num_bytes: int, tokenizer: Path, paths: list[Path]) -> int:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        file = _written(_about(paths, num_bytes), Path(folder))
        prepare_corpus([file], load_tokenizer(tokenizer), Path(folder), seed=0, passages=512, reporter=SILENT)
    return peak_rss_bytes()


def _written(texts: list[str], folder: Path) -> Path:
    file = folder / "text.jsonl"
    with file.open("w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return file


if __name__ == "__main__":
    main()
