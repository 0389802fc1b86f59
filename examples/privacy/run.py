"""What a guarantee of privacy costs: experts of one owner at several epsilons, against one without, as a table.

    python examples/privacy/run.py --anchor DIR --data DIR -o OUT [--device cuda] [--jobs 4]

DATA holds a folder a domain with train.jsonl and test.jsonl (flexmix-mini). The owner's text is cut into pieces, which
are the documents here: what the guarantee is for. The learning rate is chosen on another domain's pieces, so that it
costs the owner nothing. Run it again after an interruption: every expert that was scored stays, as OUT/rows/NAME.json.
OUT/table.md and OUT/table.json come last, with what there is by then. --small makes one of each on little
text, to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import flexctl

OWNER, TUNED_ON = "math", "academic"
EPSILONS = (8.0, 4.0, 16.0, 1.0)
RANK = 8
DELTA_SHARE = 0.1
"""Delta is this share of one over the number of documents."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run on and how.

    Attributes:
        sizes: Numbers of documents.
        tuned_on: Documents of the other owner's.
        steps: Of a private run.
        tuning_steps: Of one on the other owner's.
        batch: Documents expected in a step.
        piece: Characters of a document, at least, where the text goes on.
        seq_len: Tokens of it at most.
        rates: Learning rates that are tried, as shares of the default one.
    """

    anchor: Path
    data: Path
    output: Path
    device: str = "auto"
    threads: int | None = None
    sizes: tuple[int, ...] = (20_000, 2_000)
    tuned_on: int = 12_000
    steps: int = 100
    tuning_steps: int = 40
    batch: int = 256
    piece: int = 120
    seq_len: int = 64
    micro_batch: int = 64
    rates: tuple[float, ...] = (0.3, 1.0, 3.0)
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """One expert.

    Attributes:
        domain: Whose text.
        documents: How many of its pieces.
        epsilon: None is ordinary training.
        rank: None is a full expert.
        rate: Share of the default learning rate; None for ordinary training's own.
        batch: Documents expected in a step; None is the plan's.
    """

    domain: str = OWNER
    documents: int
    epsilon: float | None
    rank: int | None
    seed: int = 0
    rate: float | None = None
    batch: int | None = None

    @property
    def name(self) -> str:
        """Of its file."""
        form = "full" if self.rank is None else f"rank-{self.rank}"
        parts = [self.domain, str(self.documents), form, "none" if self.epsilon is None else f"eps-{self.epsilon:g}"]
        parts += [] if self.rate is None else [f"lr-{self.rate:g}"]
        parts += [] if self.batch is None else [f"batch-{self.batch}"]
        return "-".join([*parts, f"seed-{self.seed}"])


def main(plan: Plan, jobs: int, deadline: float) -> None:
    plan.output.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(plan).items()}
    (plan.output / "plan.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_pieces(plan, TUNED_ON, plan.tuned_on)
    for size in plan.sizes:
        write_pieces(plan, OWNER, size)
    anchor = score(plan, plan.anchor, (OWNER, TUNED_ON))
    (plan.output / "anchor.json").write_text(json.dumps(anchor, indent=2) + "\n")
    run_all(plan, tuning_rows(plan), jobs, deadline)
    rates = {rank: best_rate(plan, rank) for rank in (None, RANK)}
    run_all(plan, table_rows(plan, rates), jobs, deadline)
    write_table(plan, anchor, rates)


def tuning_rows(plan: Plan) -> list[Row]:
    """On another owner's text: rates for either form at epsilon 8."""
    return [
        Row(domain=TUNED_ON, documents=plan.tuned_on, epsilon=8.0, rank=rank, rate=rate)
        for rank in (None, RANK)
        for rate in plan.rates
    ]


def table_rows(plan: Plan, rates: dict[int | None, float]) -> list[Row]:
    """The table's, those that matter most first: what is cut off by a time limit is missing at the end."""
    forms: tuple[int | None, ...] = (None, RANK)
    plain = [Row(documents=size, epsilon=None, rank=rank) for size in plan.sizes for rank in forms]
    private = [
        Row(documents=size, epsilon=epsilon, rank=rank, rate=rates[rank])
        for epsilon in EPSILONS
        for size in plan.sizes
        for rank in forms
    ]
    first = private[0]
    again = [replace(first, seed=seed) for seed in range(1, plan.seeds)]
    batches = [replace(row, batch=batch) for row in private[:2] for batch in (plan.batch // 4, plan.batch * 4)]
    return [*plain, *private, *again, *batches]


def best_rate(plan: Plan, rank: int | None) -> float:
    """The rate with the lowest bits on the other owner's test text, of those that there was time to try."""
    tried = [row for row in tuning_rows(plan) if row.rank == rank and path_of(plan, row).exists()]
    best = min(tried, key=lambda row: read(plan, row)["bits"][TUNED_ON], default=None)
    return 1.0 if best is None or best.rate is None else best.rate


def write_pieces(plan: Plan, domain: str, count: int) -> None:
    """A domain's text in pieces that end at line ends, a seeded choice of them; each is a document from here on."""
    path = pieces_of(plan, domain, count)
    if path.exists():
        return
    pieces = []
    for line in (plan.data / domain / "train.jsonl").read_text(encoding="utf-8").splitlines():
        pieces += cut(json.loads(line)["text"], plan.piece)
    random.Random(0).shuffle(pieces)
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = pieces[:count]
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), encoding="utf-8")


def cut(text: str, at_least: int) -> list[str]:
    """Pieces of whole lines or sentences, each of at least so many characters but for the last."""
    pieces, current = [], ""
    for part in text.replace(". ", ".\0").replace("\n", "\n\0").split("\0"):
        current += part if current.endswith("\n") or not current else f" {part}"
        if len(current) >= at_least:
            pieces.append(current)
            current = ""
    return [piece for piece in [*pieces, current] if piece.strip()]


def pieces_of(plan: Plan, domain: str, count: int) -> Path:
    return plan.output / "pieces" / f"{domain}-{count}.jsonl"


def run_all(plan: Plan, rows: Sequence[Row], jobs: int, deadline: float) -> None:
    """Train and score what is not there yet, some at a time; none is begun after the deadline."""
    missing = [row for row in rows if not path_of(plan, row).exists()]
    if jobs == 1:
        for row in missing:
            run(plan, row, deadline)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run, plan, row, deadline) for row in missing]):
            done.result()


def run(plan: Plan, row: Row, deadline: float) -> None:
    """One expert: trained, scored on its own and on public test text, and deleted."""
    if time.time() > deadline:
        return
    started, expert = time.monotonic(), plan.output / "experts" / f"{row.name}.st"
    result = flexctl.train_expert(config_of(plan, row, expert))
    trained = time.monotonic()
    bits = score(plan, expert, (row.domain,))
    found = {
        **asdict(row),
        "bits": bits,
        "held_out": result.held_out,
        "privacy": None if result.privacy is None else asdict(result.privacy),
        "steps": result.steps,
        "bytes": result.bytes_written,
        "bias": sum(result.bias) / len(result.bias),
        "train_s": trained - started,
        "score_s": time.monotonic() - trained,
    }
    path = path_of(plan, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    for file in expert.parent.glob(f"{row.name}.*"):
        file.unlink()
    shown = ", ".join(f"{name} {value:.4f}" for name, value in bits.items())
    print(f"{row.name}: {shown} bits per byte; {found['train_s']:.0f} + {found['score_s']:.0f} s", flush=True)


def config_of(plan: Plan, row: Row, expert: Path) -> flexctl.TrainExpertConfig:
    common = {
        "data": (pieces_of(plan, row.domain, row.documents),),
        "name": row.domain,
        "anchor": plan.anchor,
        "output": expert,
        "rank": row.rank,
        "seed": row.seed,
        "device": plan.device,
        "threads": plan.threads,
        "overwrite": True,
    }
    if row.epsilon is None:
        return flexctl.TrainExpertConfig(**common, seq_len=256)
    batch = row.batch or plan.batch
    return flexctl.TrainExpertConfig(
        **common,
        seq_len=plan.seq_len,
        batch_tokens=batch * plan.seq_len,
        micro_batch=min(plan.micro_batch, batch),
        max_steps=plan.tuning_steps if row.domain == TUNED_ON else plan.steps,
        lr=None if row.rate is None else row.rate * default_rate(plan),
        dp_epsilon=row.epsilon,
        dp_delta=DELTA_SHARE / row.documents,
        dp_documents=row.documents,
    )


def default_rate(plan: Plan) -> float:
    """train-expert's own for a full expert of this width."""
    from flexctl.bundle import open_anchor
    from flexctl.training.budget import default_lr

    return default_lr(open_anchor(plan.anchor).manifest.architecture.hidden_size)


def score(plan: Plan, bundle: Path, domains: Iterable[str]) -> dict[str, float]:
    """Bits per byte by domain, public text among them."""
    data = tuple(f"{name}={plan.data / name / 'test.jsonl'}" for name in ("public", *domains))
    config = flexctl.EvaluateConfig(
        bundle=bundle, anchor=plan.anchor, data=data, device=plan.device, threads=plan.threads, seq_len=256
    )
    return {name: found.bits_per_byte for name, found in flexctl.evaluate(config).perplexity.items()}


def path_of(plan: Plan, row: Row) -> Path:
    return plan.output / "rows" / f"{row.name}.json"


def read(plan: Plan, row: Row) -> dict:
    return json.loads(path_of(plan, row).read_text())


def write_table(plan: Plan, anchor: dict[str, float], rates: dict[int | None, float]) -> None:
    """table.md and table.json: bits, what is kept of the gain without privacy, and what public text lost."""
    rows = [row for row in table_rows(plan, rates) if path_of(plan, row).exists()]
    lines = [
        f"anchor: {OWNER} {anchor[OWNER]:.4f}, public {anchor['public']:.4f} bits per byte; "
        f"learning rates {rates[None]:g} (full) and {rates[RANK]:g} (rank {RANK}) of the default",
        "",
        "| documents | form | epsilon | batch | seed | noise | own text | gain kept | public text |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [line_of(plan, row, anchor) for row in rows]
    (plan.output / "table.md").write_text("\n".join(lines) + "\n")
    figures = {"anchor": anchor, "rates": {str(rank): rate for rank, rate in rates.items()}}
    tried = [read(plan, row) for row in tuning_rows(plan) if path_of(plan, row).exists()]
    table = {**figures, "tuning": tried, "rows": [read(plan, row) for row in rows]}
    (plan.output / "table.json").write_text(json.dumps(table, indent=2) + "\n")
    print("\n".join(lines))


def line_of(plan: Plan, row: Row, anchor: dict[str, float]) -> str:
    found = read(plan, row)
    plain = Row(documents=row.documents, epsilon=None, rank=row.rank)
    whole = anchor[OWNER] - read(plan, plain)["bits"][OWNER] if path_of(plan, plain).exists() else float("nan")
    kept = (anchor[OWNER] - found["bits"][OWNER]) / whole
    noise = "" if found["privacy"] is None else f"{found['privacy']['noise_multiplier']:.3f}"
    cells = (
        f"{row.documents:,}",
        "full" if row.rank is None else f"rank {row.rank}",
        "none" if row.epsilon is None else f"{row.epsilon:g}",
        "" if row.epsilon is None else f"{row.batch or plan.batch}",
        str(row.seed),
        noise,
        f"{found['bits'][OWNER]:.4f}",
        f"{kept:.2f}",
        f"{found['bits']['public'] - anchor['public']:+.4f}",
    )
    return "| " + " | ".join(cells) + " |"


SMALL = {
    "sizes": (120,),
    "tuned_on": 120,
    "tuning_steps": 2,
    "steps": 2,
    "batch": 16,
    "seq_len": 32,
    "micro_batch": 16,
    "rates": (1.0,),
    "seeds": 1,
}


def arguments() -> tuple[Plan, int, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor", type=Path, required=True, help="an anchor of flexctl")
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("-o", "--output", type=Path, default=Path("privacy-run"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--jobs", type=int, default=1, help="experts that are trained at once")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no expert is begun")
    parser.add_argument("--small", action="store_true", help="see that it runs")
    given = parser.parse_args()
    plan = Plan(anchor=given.anchor, data=given.data, output=given.output, device=given.device, threads=given.threads)
    changes = {**(SMALL if given.small else {}), **{k: v for k in ("steps", "batch") if (v := getattr(given, k))}}
    return replace(plan, **changes), given.jobs, time.time() + given.limit


if __name__ == "__main__":
    main(*arguments())
