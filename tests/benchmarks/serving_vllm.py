"""vLLM with masks against stock vLLM, on the same model and machine: ``python -m tests.benchmarks.serving_vllm``.

Both servers are up the whole time and asked in turn, round after round, so that whatever else the machine does falls on
all alike. Figures are medians of the rounds.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import openai

from flexctl.bundle import model_name
from tests.merged_models import NAMES, make_merged
from tests.vllm_server import Server

ROUNDS = 5
CLIENTS = (1, 4, 16)
REQUESTS = 16
"""Of each kind of load a round, each of NEW_TOKENS tokens behind a prompt of PROMPT_TOKENS."""

PROMPT_TOKENS, NEW_TOKENS = 64, 32
SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
MASKS = ((), ("code",), ("law",), ("code", "math"))


class Served(NamedTuple):
    """One way to be served: its name in the table, where, and the names of the models that are asked."""

    name: str
    address: str
    models: Sequence[str]


@dataclass(frozen=True, slots=True)
class Load:
    """What one load gave: tokens a second of all clients; seconds to each answer's first token, and to its last."""

    tokens_per_s: float
    first: list[float]
    whole: list[float]


async def answer(client: openai.AsyncOpenAI, model: str, number: int) -> tuple[float, float]:
    """Ask once; return the seconds to the first token and to the last."""
    numbers = random.Random(number)
    started, first = time.perf_counter(), 0.0
    stream = await client.completions.create(
        model=model,
        prompt=[numbers.randrange(4, 320) for _ in range(PROMPT_TOKENS)],
        max_tokens=NEW_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    async for _ in stream:
        first = first or time.perf_counter() - started
    return first, time.perf_counter() - started


async def load(served: Served, clients: int, round_number: int) -> Load:
    """Ask REQUESTS times, ``clients`` at once."""
    waiting = asyncio.Semaphore(clients)
    async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:

        async def one(number: int) -> tuple[float, float]:
            async with waiting:
                model = served.models[number % len(served.models)]
                return await answer(client, model, 1000 * round_number + number)

        started = time.perf_counter()
        times = await asyncio.gather(*map(one, range(REQUESTS)))
        seconds = time.perf_counter() - started
    return Load(REQUESTS * NEW_TOKENS / seconds, [first for first, _ in times], [whole for _, whole in times])


def measure(ways: Sequence[Served]) -> dict[tuple[str, int], list[Load]]:
    """Return (way, clients) -> what each round gave; a round before them is not counted."""
    found: dict[tuple[str, int], list[Load]] = {}
    for number in range(ROUNDS + 1):
        for clients in CLIENTS:
            for way in random.Random(number).sample(ways, len(ways)):
                result = asyncio.run(load(way, clients, number * 10 + CLIENTS.index(clients)))
                if number:
                    found.setdefault((way.name, clients), []).append(result)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of them are not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(ways: Sequence[Served], found: dict[tuple[str, int], list[Load]]) -> str:
    """Return the table: throughput and latencies, each the median of rounds, with the spread of the first."""
    lines = [
        "| clients | served by | tokens/s (least to most) | first token, ms, p50 | p99 | whole answer, ms, p50 | p99 |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for clients in CLIENTS:
        for way in ways:
            loads = found[way.name, clients]
            speeds = [each.tokens_per_s for each in loads]
            times = [
                1000 * statistics.median(percentile(values, share) for values in kind)
                for kind in ([each.first for each in loads], [each.whole for each in loads])
                for share in (0.5, 0.99)
            ]
            speed = f"{statistics.median(speeds):.0f} ({min(speeds):.0f} to {max(speeds):.0f})"
            lines.append(f"| {clients} | {way.name} | {speed} | " + " | ".join(f"{each:.0f}" for each in times) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        merged = make_merged(root, "llama", **SIZES)
        flags = ("--max-num-seqs", "16", "--no-enable-prefix-caching", *sys.argv[1:])
        stock = ("-m", "vllm.entrypoints.openai.api_server", "--model", str(merged), "--served-model-name", "merged")
        stock = (*stock, "--dtype", "float32")
        ours = ("-m", "flexctl", "serve", str(merged), "--engine", "vllm")
        with (
            Server(root / "stock.log", stock, flags) as without_us,
            Server(root / "ours.log", ours, ("--", *flags)) as with_us,
        ):
            masked = [model_name("merged", mask) for mask in MASKS]
            ways = (
                Served("stock vLLM", without_us.address, ("merged",)),
                Served("with masks, none used", with_us.address, ("merged",)),
                Served("with masks, four mixed", with_us.address, masked),
            )
            print(report(ways, measure(ways)))
            print(json.dumps({"rounds": ROUNDS, "requests": REQUESTS, "experts": len(NAMES) + 1, **SIZES}))


if __name__ == "__main__":
    main()
