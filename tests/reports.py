"""A report to look at: the figures of docs/results.md, section 1, with intervals, layers and excerpts made up.

And a reader of pages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from flexctl.bundle.manifest import Tombstone
from flexctl.evaluation.explaining import Piece
from flexctl.evaluation.figures import (
    Comparison,
    DomainComparison,
    DomainScore,
    Estimate,
    Figures,
    Lineage,
    Member,
    Moved,
    Settings,
    TaskScore,
)
from flexctl.evaluation.report import Excerpt, render

EXPERTS = ("public", "code", "math", "news")
MERGED = {"public": 2.197, "code": 3.450, "math": 3.123, "news": 2.576}
ALONE = {"public": 2.169, "code": 6.186, "math": 4.446, "news": 2.691}
WITHOUT = {
    "code": {"public": 2.191, "code": 4.508, "math": 2.890, "news": 2.503},
    "math": {"public": 2.185, "code": 3.340, "math": 4.107, "news": 2.578},
    "news": {"public": 2.199, "code": 3.462, "math": 3.063, "news": 2.635},
}
ROUTING = {
    "public": (0.26, 0.05, 0.29, 0.40),
    "code": (0.03, 0.70, 0.20, 0.07),
    "math": (0.08, 0.18, 0.55, 0.19),
    "news": (0.16, 0.15, 0.28, 0.41),
}
TEXTS = {
    "public": "The harbour was built in the ninth century , and a wall of stone was added later .",
    "code": "def read ( self , path ) : \n return [ line . strip ( ) for line in open ( path ) ] \n",
    "math": "Let x be a real number with x ^ 2 = 2 . Then x is not rational , as was shown before .",
    "news": "The council said on Tuesday that the bridge would stay closed until the end of May .",
}


@dataclass(frozen=True, kw_only=True)
class Shift:
    """What another model scores on a domain, and how much that is above this one."""

    bits_per_byte: float
    change: Estimate


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a task."""

    score: Estimate
    stderr: float | None = None
    chance: float | None = None


def shifts(scores: dict[str, float], spread: float = 0.03) -> dict[str, Shift]:
    """Return scores beside the merged model's, with intervals."""
    return {name: shift(score, score - MERGED[name], spread) for name, score in scores.items()}


def shift(score: float, change: float, spread: float) -> Shift:
    """Return a score whose change has an interval of twice ``spread``."""
    return Shift(bits_per_byte=score, change=Estimate(value=change, low=change - spread, high=change + spread))


def contrast(other: float, change: Estimate, better: int = 0, worse: int = 0) -> DomainComparison:
    """Return another model's score beside this one's."""
    return DomainComparison(
        bits_per_byte=other,
        difference=change.value,
        difference_low=change.low,
        difference_high=change.high,
        documents_better=better,
        documents_worse=worse,
    )


def task(metrics: dict[str, Metric], items: int = 100, shots: int = 1, digest: str = "sha256:00") -> TaskScore:
    """Return the figures of a task."""
    return TaskScore(
        metrics={name: metric.score.value for name, metric in metrics.items()},
        stderr={name: metric.stderr for name, metric in metrics.items() if metric.stderr is not None},
        items=items,
        shots=shots,
        digest=digest,
        intervals={name: metric.score for name, metric in metrics.items() if metric.score.has_interval},
        chance={name: metric.chance for name, metric in metrics.items() if metric.chance is not None},
    )


def example_other(members: tuple[Member, ...]) -> Comparison:
    """Return a model of one expert less and an older code expert."""
    scores = {"public": 2.199, "code": 3.592, "math": 4.022, "news": 2.551}
    spreads = {"public": 0.011, "code": 0.03, "math": 0.09, "news": 0.014}
    changes = {name: MERGED[name] - score for name, score in scores.items()}
    public, code, _, news = members
    older = Member(name=code.name, digest="sha256:" + "5e5e7a10" * 8, license=code.license)
    return Comparison(
        digest="sha256:" + "0b5d3c9a" * 8,
        lineage=Lineage(
            kind="merged", anchor="micro-anchor", model_type="olmo2", license=None, members=(public, older, news)
        ),
        num_experts_per_tok=3,
        domains={
            name: contrast(
                score,
                shift(score, changes[name], spreads[name]).change,
                better=3 + (changes[name] < 0) * 100,
                worse=3 + (changes[name] > 0) * 100,
            )
            for name, score in scores.items()
        },
        moved=[
            Moved(domain=domain, index=index, difference=change)
            for domain, index, change in (("math", 17, -2.31), ("math", 3, -1.874), ("news", 101, 0.212))
        ],
    )


def example_tasks() -> dict[str, TaskScore]:
    """Return a task of each kind: choices above guessing and not, right answers, code."""

    def mean(value: float, spread: float, chance: float | None = None) -> Metric:
        ends = Estimate(value=value, low=value - spread, high=value + spread)
        return Metric(score=ends, stderr=spread / 2, chance=chance)

    found = {
        "arc_easy": {"acc": mean(0.46, 0.096, 0.25), "acc_norm": mean(0.35, 0.092, 0.25)},
        "winogrande_of_a_long_name": {"acc": mean(0.52, 0.097, 0.5)},
        "nq_open": {"exact_match": mean(0.07, 0.05), "bits_per_byte": Metric(score=Estimate(value=1.792))},
        "humaneval": {"edit_similarity": mean(0.31, 0.03), "bits_per_byte": Metric(score=Estimate(value=0.982))},
    }
    return {
        name: task(metrics, items=100 * i, shots=i % 2, digest="sha256:" + f"{i}f00d5e1" * 8)
        for i, (name, metrics) in enumerate(found.items(), start=1)
    }


def excerpt(domain: str) -> Excerpt:
    """Return a text whose words are tokens, with shares about those of the domain."""
    pieces = []
    for i, word in enumerate(TEXTS[domain].split(" ") * 3):
        weights = [0.02 + share * (1.2 + math.sin(1.7 * i + 2.1 * k)) for k, share in enumerate(ROUTING[domain])]
        total = sum(weights)
        shares = {name: weight / total for name, weight in zip(EXPERTS, weights, strict=True)}
        pieces.append(Piece(text=word if word == "\n" else f" {word}", shares=shares))
    return Excerpt(domain=domain, pieces=tuple(pieces))


def layered(domain: str, num_layers: int) -> dict[str, list[float]]:
    """Return shares a layer whose mean is about the domain's."""
    rows: dict[str, list[float]] = {name: [] for name in EXPERTS}
    for layer in range(num_layers):
        weights = [0.02 + share * (1 + 0.6 * math.sin(layer + 2 * k)) for k, share in enumerate(ROUTING[domain])]
        for name, weight in zip(EXPERTS, weights, strict=True):
            rows[name].append(weight / sum(weights))
    return rows


def draw(**changes: Any) -> str:
    """Return the page of an example, with excerpts; ``changes`` as of ``example_report``, and excerpts."""
    excerpts = changes.pop("excerpts", example_excerpts())
    return render(example_report(**changes), excerpts)


def example_excerpts() -> tuple[Excerpt, ...]:
    """Return an excerpt a domain."""
    return tuple(excerpt(domain) for domain in ROUTING)


def with_change(name: str, measured: dict[Any, Any]) -> dict[str, Any]:
    """Return what other models score, row by row, as the two fields that figures have of it."""
    rows = measured.items()
    return {
        name: {row: {domain: shift.bits_per_byte for domain, shift in found.items()} for row, found in rows},
        f"{name}_change": {row: {domain: shift.change for domain, shift in found.items()} for row, found in rows},
    }


def example_report(**changes: Any) -> Figures:
    """Return figures with everything in them.

    Args:
        changes: Replace fields of figures and of their lineage; what other models score is given as shifts.
    """
    digests = {name: "sha256:" + f"{i:x}3b1c5f0" * 8 for i, name in enumerate(EXPERTS, start=1)}
    licenses = {"public": "CC-BY-SA-3.0", "code": "PSF-2.0", "math": "GFDL-1.2-or-later", "news": "CC-BY-2.5"}
    labels = {"code": "Python's own documentation and library", "news": "Reports of one agency, 2005"}
    members = tuple(
        Member(
            name=name,
            digest=digests[name],
            license=licenses[name],
            purposes=("research",) if name == "news" else (),
            expires="2030-12-31" if name == "news" else None,
            privacy="epsilon 8, delta 1e-05" if name == "math" else None,
            label=labels.get(name),
        )
        for name in EXPERTS
    )
    figures = {
        name: DomainScore(
            nll=score * 1.7,
            perplexity=math.exp(score * 1.7),
            bits_per_byte=score,
            bits_per_byte_low=score - 0.04,
            bits_per_byte_high=score + 0.05,
            tokens=61_234 + 1000 * i,
            bytes=301_000,
            documents=120 + 7 * i,
        )
        for i, (name, score) in enumerate(MERGED.items())
    }
    whose: dict[str, Any] = {
        "kind": "merged",
        "anchor": "micro-anchor",
        "model_type": "olmo2",
        "license": "other",
        "members": members,
        "removed": (Tombstone(name="reddit", digest="sha256:" + "90aa31c2" * 8),),
    }
    others: dict[str, Any] = {
        "public_alone": shifts(ALONE, 0.02),
        "ablation": {name: shifts(scores) for name, scores in WITHOUT.items()},
        "top_k": {
            k: shifts({name: score * (1 + 0.05 * (4 - k) ** 2 / 9) for name, score in MERGED.items()})
            for k in range(1, 5)
        },
        "baselines": {
            "anchor": shifts(ALONE),
            "own expert alone": shifts({"public": 2.169, "code": 3.324, "math": 2.819, "news": 2.443}),
            "average of weights": shifts({"public": 2.31, "code": 4.92, "math": 3.87, "news": 2.66}),
        },
    }
    content: dict[str, Any] = {
        "digest": "sha256:" + "6f633a1e" * 8,
        "without": [],
        "num_experts_per_tok": 4,
        "settings": Settings(seq_len=256, device="cpu", dtype="float32"),
        "perplexity": figures,
        "tasks": example_tasks(),
        "routing": {domain: dict(zip(EXPERTS, shares, strict=True)) for domain, shares in ROUTING.items()},
        "routing_layers": {domain: layered(domain, 6) for domain in ROUTING},
        "compare": example_other(members),
        "data": {name: "sha256:" + f"{i:x}7d20e4a" * 8 for i, name in enumerate(MERGED)},
    }
    whose |= {name: changes.pop(name) for name in list(changes) if name in whose}
    others |= {name: changes.pop(name) for name in list(changes) if name in others}
    alone = with_change("public_alone", {"": others.pop("public_alone")})
    fields = {name: rows[""] for name, rows in alone.items()}
    for name, measured in others.items():
        fields |= with_change(name, measured)
    named = [member.name for member in whose["members"]]
    return Figures(**{**content, "experts": named, "lineage": Lineage(**whose), **fields, **changes})


@dataclass(frozen=True, kw_only=True)
class Page:
    """What stands on a page, for tests of how it came about."""

    heading: str
    text: str
    tables: dict[str, dict[str, list[str]]]
    excerpts: list[str]
    charts: int

    def table(self, caption: str) -> dict[str, list[str]]:
        """Return a table's rows by their headers."""
        return self.tables[caption]


class _Reader(HTMLParser):
    """Takes a page apart by its captions, row headers and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[str]] = {"h1": [], "excerpt": []}
        self.text: list[str] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.charts = 0
        self._row: list[str] | None = None
        self._into: list[str] | None = None
        self._caption: list[str] = []
        self._is_head = True

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.charts += tag == "svg"
        if tag == "caption":
            self._caption = self._into = [""]
        elif tag == "tr":
            self._row, self._is_head = [], True
        elif tag in ("th", "td") and self._row is not None:
            self._row.append("")
            self._into, self._is_head = self._row, self._is_head and tag == "th"
        elif tag == "h1" or (tag == "div" and ("class", "excerpt") in attrs):
            self._into = self.seen["h1" if tag == "h1" else "excerpt"]
            self._into.append("")
        elif tag == "br" and self._into:
            self._into[-1] += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("caption", "th", "td", "h1", "div"):
            self._into = None
        if tag == "tr" and self._row and not self._is_head:
            self.tables.setdefault(self._caption[0], {})[self._row[0]] = self._row[1:]

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._into:
            self._into[-1] += data


def page_of(path: Path) -> Page:
    """Return what stands on a page."""
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    (heading,) = reader.seen["h1"]
    text = " ".join("".join(reader.text).split())
    excerpts = reader.seen["excerpt"]
    return Page(heading=heading, text=text, tables=reader.tables, excerpts=excerpts, charts=reader.charts)
