"""Measurements, as ratios against a baseline in the same run: ``make bench``. They never fail on time.

Machines differ and are shared, so read the ratios and not the seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.text.documents import read_documents
from tests.benchmarks.copying import SMALL, compare
from tests.benchmarks.sending import bench_sending
from tests.benchmarks.serving import bench_serving
from tests.benchmarks.showing import show
from tests.builders import make_anchor

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    """Return the median wall time of ``work`` over REPEATS runs after one that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def bench_merge(root: Path) -> None:
    """Merge, remove, replace and verify against copying and hashing the same bytes; resident memory of each."""
    compare(root, experts=4, sizes=SMALL)
    show("--help", f"{seconds(lambda: run(['--help'])):.2f} s", "whole process")


def run(arguments: list[str]) -> None:
    """Run flexctl in a process of its own."""
    subprocess.run([sys.executable, "-m", "flexctl", *arguments], check=True, capture_output=True)


def peak_bytes(arguments: list[str]) -> int:
    """Return the largest resident size of a flexctl process."""
    code = (
        "import sys\nfrom flexctl.cli.app import main\nfrom flexctl.runtime import peak_rss_bytes\n"
        "assert main(sys.argv[1:]) == 0\n"
        "print(peak_rss_bytes(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return int(done.stderr.strip().splitlines()[-1])


def bench_steps() -> None:
    """Training steps of every kind on one thread, by its own time: against the dense step, the rate, and in memory."""
    from tests.benchmarks.shapes import CPU
    from tests.benchmarks.steps import USUAL

    dense = USUAL[2]
    for dtype in ("float32", "bfloat16"):
        rate, rows = step("rate", dtype), {name: step(name, dtype) for name in USUAL}
        show(f"matrix product of 2048, {dtype}", f"{rate / 1e9:.0f} GFLOP/s", "the measured rate, one thread")
        for name, row in rows.items():
            if "tokens_per_s" not in row:
                show(f"{name}, {dtype}", "-", row.get("skipped") or row["failed"])
                continue
            cost = rows[dense]["tokens_per_s"] / row["tokens_per_s"]
            predicted = row["flops_per_step"] / rows[dense]["flops_per_step"]
            show(
                f"{name}, {dtype}",
                f"{row['tokens_per_s']:.0f} tokens/s",
                f"{cost:.2f} dense steps where operations say {predicted:.2f}; "
                f"{row['flops_per_s'] / rate:.0%} of the rate; {row['peak_bytes'] / 1e6:.0f} MB",
            )
    show(
        "the anchor and the step", f"{CPU.hidden} wide", f"{CPU.layers} layers, {CPU.vocab} tokens; {CPU.tokens} a step"
    )


def step(name: str, dtype: str) -> Any:
    """Measure in a process of its own, with one thread."""
    command = [sys.executable, "-m", "tests.benchmarks.steps", name, dtype]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def bench_scoring(root: Path) -> None:
    """Scoring a pair against Transformers."""
    import torch

    from flexctl.evaluation.scoring import score_documents
    from flexctl.model.building import build_model, load_dense
    from flexctl.text.tokens import Framed
    from flexctl.training.pair import Pair

    anchor = make_anchor(root / "small", layers=6, hidden=192, inner=768, vocab=4096, dtype="F32")
    ids = torch.randint(0, 4096, (8, 257))
    dense = load_dense(anchor.path)
    model = build_model(anchor.weights(), device=torch.device("cpu"), dtype=torch.float32)
    Pair(model, torch.zeros(6, 192), public_match=1.0)
    documents = [Framed(tokens=row.numpy(), num_bytes=1) for row in ids]
    with torch.no_grad():
        plain = seconds(lambda: dense(ids[:, :-1], labels=ids[:, :-1]))
    ours = seconds(lambda: score_documents(model, documents, seq_len=256, batch_tokens=2048))
    show("scoring a pair / dense forward", f"{ours / plain:.2f}", f"{plain:.2f} s, 2048 tokens")


def bench_text(root: Path) -> None:
    """Resident memory of training on one long document, on many of a book's length, and on short ones."""
    tiny = ["--max-tokens", "3000", "--seq-len", "64", "--batch-tokens", "256", "--threads", "1", "--json"]
    line = "".join(
        f"In {year} the {year % 97} ships of the {year % 31}th fleet came home.\n" for year in range(1000, 2000)
    )
    shapes = {"3,000 of 4 kB": (3000, line[:4000]), "64 of 190 kB": (64, line * 4), "one of 12.6 MB": (1, line * 270)}
    for name, (count, text) in shapes.items():
        data = root / name
        data.mkdir()
        for number in range(count):
            (data / f"{number}.txt").write_text(f"{number}\n{text}")
        anchor = str(root / f"{name} anchor")
        made = peak_bytes(["init-anchor", "--data", str(data), "--preset", "nano", *tiny, "-o", anchor])
        expert = ["train-expert", "--data", str(data), "--anchor", anchor, "-o", str(root / "long.st"), "--overwrite"]
        trained = peak_bytes([*expert, "--name", "long", *tiny])
        show(f"init-anchor, documents: {name}", f"{made / 1e6:.0f} MB", "peak resident; limit 1000 MB")
        show(f"train-expert, documents: {name}", f"{trained / 1e6:.0f} MB", "peak resident; limit 1000 MB")


def bench_inference() -> None:
    """A merged model's forward pass and greedy answers against stock Transformers', on one thread."""
    import torch

    from tests.benchmarks.inference import EXPERTS, TOP_K, measure
    from tests.benchmarks.shapes import CPU

    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        for row in measure(CPU, torch.device("cpu"), dtype):
            show(
                f"{row['name']}, {row['dtype']}",
                f"{row['forward_tokens_per_s']:.0f} tokens/s",
                f"{row['generate_tokens_per_s']:.0f} tokens/s of answers; {EXPERTS} experts, {TOP_K} a token",
            )


def write_words(path: Path, size_bytes: int) -> None:
    """Write documents of made-up words, as unequally common as words are, one a line."""
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoinshrdlucmfwygpbvk", np.uint8)
    words = [bytes(rng.choice(letters, rng.integers(2, 11))).decode() for _ in range(50_000)]
    chances = 1 / np.arange(1, len(words) + 1)
    chances /= chances.sum()
    written = 0
    with path.open("w") as file:
        while written < size_bytes:
            drawn = rng.choice(len(words), (1000, 300), p=chances)
            lines = [json.dumps({"text": " ".join(words[i] for i in row)}) + "\n" for row in drawn]
            file.writelines(lines)
            written += sum(map(len, lines))


def bench_trace(root: Path, size_bytes: int = 100_000_000) -> None:
    """Time, size and memory of an index against reading and hashing the same text; time to trace an answer."""
    text, index = root / "text.jsonl", root / "text.index"
    write_words(text, size_bytes)
    started = time.perf_counter()
    for document in read_documents([text]):
        hashlib.sha256(document.encode())
    read = time.perf_counter() - started
    command = ["trace-index", "--data", str(text), "-o", str(index), "--json"]
    started = time.perf_counter()
    peak = peak_bytes(command)
    took = time.perf_counter() - started
    size = sum(file.stat().st_size for file in index.iterdir())
    amount = f"{size_bytes / 1e6:.0f} MB"
    show(f"trace-index of {amount} / (read + hash)", f"{took / read:.1f}", f"{read:.1f} s, {took:.0f} s in all")
    show(f"trace-index of {amount}: size / text", f"{size / size_bytes:.2f}", f"{size / 1e6:.0f} MB")
    show(f"trace-index of {amount}: peak resident", f"{peak / 1e6:.0f} MB", "bounded by --shard-bytes")
    answer = "\n".join(list(islice(read_documents([text]), 3)))[900:2900]
    find = ["trace-find", "--index", str(index), "--text", answer, "--json"]
    show(f"trace-find, 2,000 bytes in {amount}", f"{seconds(lambda: run(find)):.2f} s", "whole process")


SECTIONS = {
    "merge": bench_merge,
    "sending": bench_sending,
    "steps": lambda _root: bench_steps(),
    "scoring": bench_scoring,
    "inference": lambda _root: bench_inference(),
    "text": bench_text,
    "serving": bench_serving,
    "trace": bench_trace,
}


def main() -> None:
    """Run every measurement, or those whose names are given."""
    print(f"medians of {REPEATS} runs on {os.cpu_count()} cores")
    for name in sys.argv[1:] or SECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name](Path(folder))


if __name__ == "__main__":
    main()
