"""The server under load: tokens a second, time to the first and to the last: ``python -m tests.benchmarks.serving``.

One, four and sixteen clients at once, each with one request after the other, against a plain generate loop of stock
Transformers over the same checkpoint, which answers one request at a time, and where TRANSFORMERS names that command
(of an environment with transformers[serving]) `transformers serve`, with continuous batching and without. Everything
has one thread. CPU time a token is what the process itself used, so it can be read where other work keeps the cores
busy; seconds cannot.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests import tiny
from tests.benchmarks.showing import show
from tests.builders import make_expert

PROMPT_TOKENS = 64
NEW_TOKENS = 32
CLIENTS = (1, 4, 16)
SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
NAMES = ("code", "law", "math")
WAYS = {"all experts": ("merged",), "a mask each": ("merged", *(f"merged-without-{name}" for name in NAMES))}


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: its tokens, and seconds to the first and to the last."""

    tokens: int
    first_s: float
    whole_s: float


def make_model(root: Path) -> Path:
    """Return a random merged model with a tokenizer."""
    from flexctl.bundle import open_anchor
    from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
    from flexctl.engine.merge import MergeConfig, merge
    from flexctl.text.tokenizer import train_tokenizer

    pages = sorted(Path("docs").glob("*.md"))
    stock, anchor = root / "stock", root / "anchor"
    train_tokenizer(
        [page.read_text() for page in pages], SIZES["vocab_size"], SIZES["max_position_embeddings"]
    ).save_pretrained(stock)
    tiny.make_dense(tiny.dense_config(**SIZES)).save_pretrained(stock)
    init_anchor(InitAnchorConfig(data=tuple(pages), source=str(stock), output=anchor, sample_tokens=4000, threads=1))
    made = open_anchor(anchor)
    experts = tuple(make_expert(root / f"{name}.st", made, name, seed=i).path for i, name in enumerate(NAMES))
    merge(MergeConfig(experts=experts, anchor=anchor, output=root / "merged"))
    return root / "merged"


def make_prompts(bundle: Path) -> list[str]:
    """Return texts of PROMPT_TOKENS tokens."""
    from flexctl.model import load_tokenizer

    tokenizer = load_tokenizer(bundle)
    ids = tokenizer(Path("docs/architecture.md").read_text(), verbose=False)["input_ids"]
    return [tokenizer.decode(ids[i : i + PROMPT_TOKENS]) for i in range(100, 900, 100)]


async def one_client(client: object, model: str, prompts: list[str], requests: int, timed: list[Timed]) -> None:
    """Ask for one answer after the other."""
    for number in range(requests):
        started = time.perf_counter()
        prompt = prompts[number % len(prompts)]
        stream = await client.completions.create(  # type: ignore[attr-defined]
            model=model, prompt=prompt, max_tokens=NEW_TOKENS, temperature=1.0, seed=number, stream=True
        )
        times = [time.perf_counter() - started async for _ in stream]
        # The last piece says why it ended.
        timed.append(Timed(len(times) - 1, times[0], times[-1]))


async def load(
    address: str, clients: int, models: tuple[str, ...], prompts: list[str], requests: int
) -> tuple[float, list[Timed]]:
    """Return the seconds that all answers took together, and each one's."""
    import openai

    timed: list[Timed] = []
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
        started = time.perf_counter()
        works = (one_client(client, models[i % len(models)], prompts, requests, timed) for i in range(clients))
        await asyncio.gather(*works)
        return time.perf_counter() - started, timed


def bench_server(bundle: Path) -> None:
    """Measure our server."""
    command = [sys.executable, "-m", "flexctl", "serve", str(bundle), "--port", "0", "--threads", "1"]
    measure("serve", command, r"(http://\S+/v1);", WAYS, make_prompts(bundle))


def bench_transformers_serve(executable: str, bundle: Path) -> None:
    """Measure `transformers serve`."""
    command = [executable, "serve", str(bundle), "--port", "8765", "--device", "cpu", "--dtype", "float32"]
    for name, flags in (("transformers serve", []), ("the same, continuous batching", ["--continuous-batching"])):
        measure(name, [*command, *flags], r"(http://\S+:8765)", {"": (str(bundle),)}, make_prompts(bundle))


def measure(name: str, command: list[str], says: str, ways: dict[str, tuple[str, ...]], prompts: list[str]) -> None:
    """Start a server, load it and show what came; ``says`` finds its address in what it says on stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as out:
        server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=out, text=True, env=environment)
        try:
            assert server.stderr is not None
            address = next(found[1] for line in server.stderr if (found := re.search(says, line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()
            address = address if address.endswith("/v1") else f"{address}/v1"
            first = next(iter(ways.values()))[:1]
            asyncio.run(load(address, 2, first, prompts, 1))
            for clients in CLIENTS:
                for way, models in ways.items():
                    before = cpu_seconds(server.pid)
                    seconds, timed = asyncio.run(load(address, clients, models, prompts, max(1, 8 // clients)))
                    tokens = sum(each.tokens for each in timed)
                    cost = 1000 * (cpu_seconds(server.pid) - before) / tokens
                    firsts, wholes = ([getattr(each, part) for each in timed] for part in ("first_s", "whole_s"))
                    seen = f"{tokens / seconds:.0f} tokens/s; first token {spread(firsts)}; answer {spread(wholes)}"
                    show(f"{name}, {clients} clients, {way}".rstrip(", "), f"{cost:.1f} ms", seen)
        finally:
            server.terminate()
            server.wait(timeout=60)


def cpu_seconds(process: int) -> float:
    """Return how much of the processors a process has used so far (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def spread(seconds: list[float]) -> str:
    """Return the median and the 99th percentile, which of so few is the highest."""
    return f"p50 {statistics.median(seconds):.2f} s, p99 {max(seconds):.2f} s"


LOOP = """
import json, sys, time, torch, transformers
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([[10 + i % 4000 for i in range(int(sys.argv[2]))]])
def answer():
    new = int(sys.argv[3])
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=True, top_k=0)
answer()
started, used = time.perf_counter(), time.process_time()
for _ in range(4):
    answer()
print(json.dumps(((time.perf_counter() - started) / 4, (time.process_time() - used) / 4)))
"""


def bench_loop(bundle: Path) -> None:
    """Measure stock Transformers, one request at a time."""
    command = [sys.executable, "-c", LOOP, str(bundle), str(PROMPT_TOKENS), str(NEW_TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, used = json.loads(done.stdout)
    cost = f"{1000 * used / NEW_TOKENS:.1f} ms"
    show("plain generate loop: CPU a token", cost, f"{NEW_TOKENS / seconds:.0f} tokens/s; answer {seconds:.2f} s")


def bench_serving(root: Path) -> None:
    """Measure all on one model; figures are CPU time a token."""
    bundle = make_model(root)
    bench_loop(bundle)
    bench_server(bundle)
    if executable := os.environ.get("TRANSFORMERS"):
        bench_transformers_serve(executable, bundle)
    bench_loop(bundle)


if __name__ == "__main__":
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        bench_serving(Path(folder))
