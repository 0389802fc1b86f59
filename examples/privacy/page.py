"""What an expert gives away, at most and at least, and that it is gone: two pages of one owner's text.

    python examples/privacy/page.py --anchor DIR --data DIR -o OUT [--owner news] [--documents 400]

Trains two experts on the same documents, one without privacy, several times over, and one with differential privacy;
merges each beside a neighbour; removes each again, with a signed record; attacks both. OUT/plain.html and
OUT/private.html are the pages, OUT/index.html has both answers side by side, OUT/plain.json and OUT/private.json
all figures.

DATA holds a folder a domain with train.jsonl and test.jsonl (flexmix-mini). The owner's text is cut into pieces, which
are the documents here. Run it again after an interruption: what is there stays.
"""

from __future__ import annotations

import argparse
import html
import json
import os
import random
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from run import cut

import flexctl
from flexctl.cli.output import Output
from flexctl.shipped import template

REPORTER = Output().reporter

WAYS = {"plain": "without privacy", "private": "with differential privacy"}
PIECE = 240
SEQ_LEN = 80
PREFIX, CONTINUED = 16, 32
"""Tokens that a document is begun with, and that follow."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run on and how.

    Attributes:
        documents: Of the owner's.
        held_out: Documents of the same kind that nobody trains on.
        canaries: Made-up documents, half of which are trained on too.
        epochs: Passes of the expert without privacy over the documents.
        steps: Of the private one.
        batch: Documents expected in such a step.
        neighbour_tokens: That the other expert is trained on.
        tried: Documents of each kind that are attacked.
        draws: Continuations of each.
        recover: Steps of training on removed text; 0 leaves that out.
    """

    anchor: Path
    data: Path
    output: Path
    owner: str = "news"
    neighbour: str = "code"
    documents: int = 400
    held_out: int = 200
    canaries: int = 200
    epochs: float = 8.0
    epsilon: float = 8.0
    steps: int = 60
    batch: int = 128
    neighbour_tokens: int = 8_000
    tried: int = 200
    draws: int = 10
    recover: int = 8
    device: str = "auto"
    threads: int | None = None

    @property
    def text(self) -> Path:
        return self.output / "text" / f"{self.owner}.jsonl"

    @property
    def other_text(self) -> Path:
        return self.output / "text" / f"{self.owner}-held-out.jsonl"

    def expert(self, way: str) -> Path:
        return self.output / way / f"{self.owner}.st"

    def merged(self, way: str) -> Path:
        return self.output / way / "merged"

    def left(self, way: str) -> Path:
        return self.output / way / "left" / "merged"

    @property
    def trust(self) -> Path:
        return self.output / "trust.toml"


def main(plan: Plan) -> None:
    write_text(plan)
    key = make_key(plan)
    train_neighbour(plan)
    for way in WAYS:
        train(plan, way)
        merge(plan, way)
        remove(plan, way, key)
        audit(plan, way)
    bits = {way: score(plan, plan.expert(way)) for way in WAYS}
    write_index(plan, score(plan, plan.anchor), bits)


def write_text(plan: Plan) -> None:
    """The owner's documents, and others of their kind: pieces of whole sentences, a seeded choice of each."""
    if plan.other_text.exists():
        return
    pieces = []
    for line in (plan.data / plan.owner / "train.jsonl").read_text(encoding="utf-8").splitlines():
        pieces += cut(json.loads(line)["text"], PIECE)
    pieces = sorted(set(pieces))
    random.Random(0).shuffle(pieces)
    plan.text.parent.mkdir(parents=True, exist_ok=True)
    for file, chosen in (
        (plan.text, pieces[: plan.documents]),
        (plan.other_text, pieces[plan.documents : plan.documents + plan.held_out]),
    ):
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in chosen), encoding="utf-8")


def train(plan: Plan, way: str) -> None:
    """One expert of the owner's text, with canaries."""
    common = {
        "data": (plan.text,),
        "name": plan.owner,
        "anchor": plan.anchor,
        "output": plan.expert(way),
        "canaries": plan.canaries,
        "seq_len": SEQ_LEN,
        "public_mix": 0.1,
        "device": plan.device,
        "threads": plan.threads,
    }
    if way == "plain":
        config = flexctl.TrainExpertConfig(**common, epochs=plan.epochs)
    else:
        config = flexctl.TrainExpertConfig(
            **common,
            batch_tokens=plan.batch * SEQ_LEN,
            max_steps=plan.steps,
            dp_epsilon=plan.epsilon,
            dp_delta=0.1 / plan.documents,
            dp_documents=plan.documents + plan.canaries // 2,
        )
    if not plan.expert(way).exists():
        flexctl.train_expert(config, REPORTER)


def train_neighbour(plan: Plan) -> None:
    """Another expert of another owner, so that something is left when this one goes."""
    if not (path := neighbour_of(plan)).exists():
        flexctl.train_expert(
            flexctl.TrainExpertConfig(
                data=(plan.data / plan.neighbour / "train.jsonl",),
                name=plan.neighbour,
                anchor=plan.anchor,
                output=path,
                max_tokens=plan.neighbour_tokens,
                device=plan.device,
                threads=plan.threads,
            ),
            REPORTER,
        )


def neighbour_of(plan: Plan) -> Path:
    return plan.output / f"{plan.neighbour}.st"


def make_key(plan: Plan) -> Path:
    """The coordinator's key, with a passphrase of its own, and a trust file that names it."""
    key, passphrase = plan.output / "coordinator.key", plan.output / "passphrase"
    if not plan.trust.exists():
        with os.fdopen(os.open(passphrase, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_urlsafe(24) + "\n")
        made = flexctl.keygen(flexctl.KeygenConfig(output=key, passphrase_file=passphrase), REPORTER)
        plan.trust.write_text(f'[[owners]]\nname = "Coordinator"\nkey = "{made.public_key}"\n', encoding="utf-8")
    return key


def merge(plan: Plan, way: str) -> None:
    if not plan.merged(way).exists():
        experts = (plan.expert(way), neighbour_of(plan))
        flexctl.merge(
            flexctl.MergeConfig(experts=experts, anchor=plan.anchor, output=plan.merged(way)),
            REPORTER,
        )


def remove(plan: Plan, way: str, key: Path) -> None:
    """The model without the expert, elsewhere, and the signed record beside it."""
    if not plan.left(way).exists():
        plan.left(way).parent.mkdir(parents=True)
        flexctl.remove(
            flexctl.RemoveConfig(
                names=(plan.owner,),
                source=plan.merged(way),
                output=plan.left(way),
                tombstone=True,
                reason="withdrawn by its owner",
                key=key,
                passphrase_file=plan.output / "passphrase",
            ),
            REPORTER,
        )


def audit(plan: Plan, way: str) -> None:
    """The page, and all figures as --json has them."""
    page, figures = plan.output / f"{way}.html", plan.output / f"{way}.json"
    if figures.exists():
        return
    found = flexctl.audit(
        flexctl.AuditConfig(
            bundle=plan.merged(way),
            name=plan.owner,
            data=(plan.text,),
            held_out=plan.other_text,
            planted=plan.expert(way).with_suffix(".canaries"),
            removed_from=plan.left(way),
            trust=plan.trust,
            recover=plan.recover or None,
            report=page,
            prefix_tokens=PREFIX,
            max_new_tokens=CONTINUED,
            seq_len=SEQ_LEN,
            documents=plan.tried,
            draws=plan.draws,
            device=plan.device,
            threads=plan.threads,
            overwrite=True,
        ),
        REPORTER,
    )
    figures.write_text(json.dumps(asdict(found), default=str, indent=2) + "\n", encoding="utf-8")


def score(plan: Plan, bundle: Path) -> float:
    """Bits per byte of the owner's kind of text, which nobody trained on."""
    config = flexctl.EvaluateConfig(
        bundle=bundle,
        anchor=plan.anchor,
        data=(f"{plan.owner}={plan.other_text}",),
        seq_len=SEQ_LEN,
        device=plan.device,
        threads=plan.threads,
    )
    return flexctl.evaluate(config, REPORTER).perplexity[plan.owner].bits_per_byte


def write_index(plan: Plan, anchor: float, bits: dict[str, float]) -> None:
    """index.html: both answers side by side, with links to the pages."""
    rows = "".join(row_of(plan, way, anchor, bits[way]) for way in WAYS)
    title = f"{plan.owner}, with and without privacy"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(title)}</title>
<style>{template("pages.css")}</style>
</head>
<body>
<header><p class="kicker">Audit</p><h1>{html.escape(title)}</h1></header>
<main>
<p class="lede">Two experts of the same {plan.documents:,} documents, attacked and removed alike. The anchor, which
never saw them, has {anchor:.3f} bits per byte on other text of the kind.</p>
<div class="scroll" role="region" tabindex="0" aria-label="Both experts, table">
<table>
<thead><tr><th scope="col">trained</th><th scope="col">bits per byte</th><th scope="col">at most</th>
<th scope="col">at least</th><th scope="col">drawn out</th><th scope="col">AUC</th><th scope="col">gone</th></tr>
</thead>
<tbody>{rows}</tbody>
</table>
</div>
<p class="note">Intervals are 95&nbsp;%. AUC: how well what was trained on is told from other text of the kind; guessing
has 0.5. Each page says what its answers do not mean.</p>
</main>
</body>
</html>
"""
    (plan.output / "index.html").write_text(page, encoding="utf-8")


def row_of(plan: Plan, way: str, anchor: float, bits: float) -> str:
    found = json.loads((plan.output / f"{way}.json").read_text(encoding="utf-8"))
    answers, whole = found["answers"], found["models"]["merged"]
    at_most = answers["at_most"]
    cells = (
        f"{bits:.3f} ({bits - anchor:+.3f})",
        "no bound" if at_most is None else f"epsilon {at_most['epsilon']:g}, delta {at_most['delta']:.2g}",
        f"epsilon {answers['at_least']['epsilon']:.2f}",
        spanned(whole["extraction"]["near"]),
        spanned(whole["membership"]["calibrated"]["auc"]),
        f"removed {answers['gone']['date']}, signed",
    )
    link = f'<a href="{way}.html">{WAYS[way]}</a>'
    return f"<tr><th scope='row'>{link}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def spanned(figure: dict[str, float]) -> str:
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def arguments() -> Plan:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anchor", type=Path, required=True, help="an anchor of flexctl, as make demo leaves one")
    parser.add_argument("--data", type=Path, required=True, help="folder of domains")
    parser.add_argument("-o", "--output", type=Path, default=Path("privacy-page"))
    parser.add_argument("--owner", default=Plan.owner, help="the domain whose experts are audited")
    parser.add_argument("--neighbour", default=Plan.neighbour, help="the domain of another expert beside them")
    parser.add_argument("--neighbour-tokens", type=int, default=Plan.neighbour_tokens, help="that it is trained on")
    parser.add_argument("--documents", type=int, default=Plan.documents)
    parser.add_argument("--held-out", type=int, default=Plan.held_out)
    parser.add_argument("--canaries", type=int, default=Plan.canaries)
    parser.add_argument("--epochs", type=float, default=Plan.epochs, help="of the expert without privacy")
    parser.add_argument("--steps", type=int, default=Plan.steps, help="of the one with it")
    parser.add_argument("--batch", type=int, default=Plan.batch, help="documents expected in such a step")
    parser.add_argument("--tried", type=int, default=Plan.tried, help="documents of each kind that are attacked")
    parser.add_argument("--draws", type=int, default=Plan.draws, help="continuations of each")
    parser.add_argument("--recover", type=int, default=Plan.recover, help="steps of training on removed text, or 0")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    return Plan(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(arguments())
