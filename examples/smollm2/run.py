"""A real pretrained model through the whole life: anchor, experts, merge, scores, chat, removal.

    python examples/smollm2/run.py --checkpoint smollm2 --data DIR

DIR holds a folder a domain with train.jsonl and test.jsonl, one of them `public`. Run again after an interruption: what
is finished stays. RESULTS.md in the output folder holds the tables.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import flexctl
from flexctl.cli.output import Output

QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "A pen costs 3 dollars. How much do 4 pens cost?",
)
Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Plan:
    """What to run on, how much of it, and where everything goes."""

    checkpoint: Path
    data: Path
    experts: tuple[str, ...]
    tokens: int
    anneal_tokens: int
    sample_tokens: int
    test_bytes: int
    threads: int | None
    output: Path

    @property
    def anchor(self) -> Path:
        """Where the anchor is."""
        return self.output / "anchor"

    @property
    def merged(self) -> Path:
        """Where the merged model is."""
        return self.output / "merged"

    def expert(self, name: str) -> Path:
        """Where an expert is."""
        return self.output / "experts" / f"{name}.st"


REPORTER = Output().reporter


def main(plan: Plan) -> None:
    plan.output.mkdir(parents=True, exist_ok=True)
    make_anchor(plan)
    for name in plan.experts:
        train(plan, name)
    if not plan.merged.exists():
        paths = tuple(map(plan.expert, plan.experts))
        flexctl.merge(flexctl.MergeConfig(experts=paths, anchor=plan.anchor, output=plan.merged), REPORTER)
    removed = remove_first(plan)
    scores = score_everything(plan)
    answers = ask_everyone(plan, removed)
    report = "\n".join([*score_lines(scores, plan.experts), "", *answer_lines(answers)])
    (plan.output / "RESULTS.md").write_text(report + "\n", encoding="utf-8")
    print(report)


def make_anchor(plan: Plan) -> None:
    """The checkpoint, annealed on public text where asked, with its router space."""
    if plan.anchor.exists():
        return
    flexctl.init_anchor(
        flexctl.InitAnchorConfig(
            source=str(plan.checkpoint),
            data=(plan.data / "public" / "train.jsonl",),
            output=plan.anchor,
            anneal_tokens=plan.anneal_tokens,
            batch_tokens=2048 if plan.anneal_tokens else None,
            sample_tokens=plan.sample_tokens,
            threads=plan.threads,
            resume=True,
        ),
        REPORTER,
    )


def train(plan: Plan, name: str) -> None:
    """One owner's expert."""
    if plan.expert(name).exists():
        return
    flexctl.train_expert(
        flexctl.TrainExpertConfig(
            data=(plan.data / name / "train.jsonl",),
            name=name,
            anchor=plan.anchor,
            output=plan.expert(name),
            max_tokens=plan.tokens,
            threads=plan.threads,
            resume=True,
        ),
        REPORTER,
    )


def remove_first(plan: Plan) -> Path:
    """Remove the first expert, and hold the result against a merge that never had it."""
    gone, *kept = plan.experts
    target, fresh = plan.output / f"without-{gone}", plan.output / f"never-had-{gone}"
    if not target.exists():
        flexctl.remove(flexctl.RemoveConfig(names=(gone,), source=plan.merged, output=target), REPORTER)
    if not fresh.exists():
        paths = tuple(map(plan.expert, kept))
        flexctl.merge(flexctl.MergeConfig(experts=paths, anchor=plan.anchor, output=fresh), REPORTER)
    names = sorted(path.name for path in fresh.iterdir() if path.name != "run.json")
    if any((target / name).read_bytes() != (fresh / name).read_bytes() for name in names):
        sys.exit(f"{target} is not {fresh}, byte for byte")
    return target


def score_everything(plan: Plan) -> Table:
    """Bits per byte of every domain: the anchor, each pair, the merged model, and with each expert left out.

    evaluate keeps what it scored, so a second run need not repeat it.
    """
    table = {domain: {"anchor": found.bits_per_byte} for domain, found in score(plan, plan.anchor).perplexity.items()}
    for name in plan.experts:
        table[name]["own pair"] = score(plan, plan.expert(name)).perplexity[name].bits_per_byte
    merged = score(plan, plan.merged, ablate=True)
    for domain, found in merged.perplexity.items():
        table[domain]["merged"] = found.bits_per_byte
        for left_out in plan.experts:
            table[domain][f"without {left_out}"] = merged.ablation[left_out][domain]
    return table


def score(plan: Plan, bundle: Path, ablate: bool = False) -> flexctl.EvaluateResult:
    """Score one bundle on every domain."""
    asked = tuple(f"{folder.name}={test_file(plan, folder)}" for folder in domains(plan))
    return flexctl.evaluate(
        flexctl.EvaluateConfig(bundle=bundle, anchor=plan.anchor, data=asked, ablate=ablate, threads=plan.threads),
        REPORTER,
    )


def domains(plan: Plan) -> list[Path]:
    """Public text, the experts' own, and one domain that has no expert where there is one."""
    others = sorted(path for path in plan.data.iterdir() if (path / "test.jsonl").exists())
    known = [path for path in others if path.name in ("public", *plan.experts)]
    return known + [path for path in others if path not in known][:1]


def test_file(plan: Plan, domain: Path) -> Path:
    """The first documents of a domain's test file, as many as fit into the bytes that are scored."""
    clipped = plan.output / "test" / f"{domain.name}.jsonl"
    if not clipped.exists():
        clipped.parent.mkdir(exist_ok=True)
        kept, room = [], plan.test_bytes
        for line in (domain / "test.jsonl").read_text(encoding="utf-8").splitlines():
            if room > 0:
                kept.append(line)
                room -= len(line.encode())
        clipped.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return clipped


def ask_everyone(plan: Plan, removed: Path) -> dict[str, dict[str, str]]:
    """The same questions before the merge, after it, and after the removal."""
    models = {"anchor": plan.anchor, "merged": plan.merged, removed.name.replace("-", " ", 1): removed}
    answers: dict[str, dict[str, str]] = {}
    for question in QUESTIONS:
        answers[question] = {}
        for label, bundle in models.items():
            config = flexctl.GenerateConfig(
                prompt=question, bundle=bundle, chat=True, max_new_tokens=48, threads=plan.threads
            )
            answers[question][label] = " ".join(flexctl.generate(config, REPORTER).text.split())
    return answers


def score_lines(scores: Table, experts: tuple[str, ...]) -> list[str]:
    columns = list(scores[experts[0]])
    lines = [f"| bits per byte | {' | '.join(columns)} | retained gain |", "|---" * (len(columns) + 2) + "|"]
    for domain, row in scores.items():
        cells = [f"{row[column]:.3f}" if column in row else "" for column in columns]
        lines.append(f"| {domain} | {' | '.join(cells)} | {retained_gain(row)} |")
    return lines


def retained_gain(row: dict[str, float]) -> str:
    """(anchor - merged) / (anchor - own pair)."""
    return f"{(row['anchor'] - row['merged']) / (row['anchor'] - row['own pair']):.2f}" if "own pair" in row else ""


def answer_lines(answers: dict[str, dict[str, str]]) -> list[str]:
    lines = []
    for question, by_model in answers.items():
        lines += [f"**{question}**", "", *(f"- {label}: {text}" for label, text in by_model.items()), ""]
    return lines


def arguments() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="directory of a stock dense checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("--experts", nargs="+", default=["code", "math"], help="domains that get an expert")
    parser.add_argument("--tokens", type=int, default=12_000, help="own tokens an expert")
    parser.add_argument("--anneal-tokens", type=int, default=0, help="public tokens to train the checkpoint on first")
    parser.add_argument("--sample-tokens", type=int, default=65_536, help="size of the anchor's public sample")
    parser.add_argument("--test-bytes", type=int, default=24_000, help="bytes scored a domain")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("smollm2-run"))
    given = vars(parser.parse_args())
    return Plan(**{**given, "experts": tuple(given["experts"])})


if __name__ == "__main__":
    main(arguments())
