"""The tables: bits per byte of everything that was scored, averages, retained gains, intervals over documents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from recipes import DEFAULT, VARIANTS
from work import write_json

DRAWS = 1000
PUBLIC = "public"
REFERENCES = ("anchor", "own pair", DEFAULT, "own dense expert")

Array = np.ndarray[Any, np.dtype[np.float64]]
Scores = Mapping[str, Array]
"""Domain -> (documents, 3): nats, targets, bytes."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        seeds: How many the row has; only the default and the baselines have more than one.
        bits_per_byte: Domain -> mean over seeds.
        average: Over the closed sets.
        interval: Of the average, 95 %, over documents.
        spread: Standard deviation of the average over seeds; None with one seed.
        gains: Closed set -> (anchor - this) / (anchor - own pair); None where the pair gained nothing.
        retained: The same of the averages.
        retained_interval: Of that, 95 %.
        margin: How much worse the mean over all sets is than the default's, on the same seeds.
        margin_interval: Of that, 95 %.
        training: Operations of all training after the anchor's; None where it is not that simple.
    """

    name: str
    about: str
    seeds: int
    bits_per_byte: dict[str, float]
    average: float
    interval: tuple[float, float]
    spread: float | None
    gains: dict[str, float | None]
    retained: float | None
    retained_interval: tuple[float, float] | None
    margin: float
    margin_interval: tuple[float, float]
    training: float | None = None


def read_scores(root: Path) -> dict[str, Scores]:
    """Return {row: scores} of one seed's run; "pair RECIPE" holds each recipe's own pairs."""
    folder = root / "scores"
    found = {"anchor": read(folder / "anchor.json")}
    for path in sorted((folder / "pairs").glob("*.json")):
        found[f"pair {path.stem}"] = {PUBLIC: found["anchor"][PUBLIC], **read(path)}
    found["own pair"] = found["pair discriminant"]
    found |= {path.stem: read(path) for path in sorted((folder / "variants").glob("*.json"))}
    if (folder / "baselines.json").exists():
        baselines = json.loads((folder / "baselines.json").read_text())
        found |= {name: arrays(domains) for name, domains in baselines.items() if name != "public only"}
        own = {name: found[f"dense {name}"][name] for name in found["anchor"] if name != PUBLIC}
        found["own dense expert"] = {PUBLIC: found["anchor"][PUBLIC], **own}
    return found


def read(path: Path) -> Scores:
    return arrays(json.loads(path.read_text()))


def arrays(domains: Mapping[str, Any]) -> Scores:
    return {domain: np.array(documents, dtype=np.float64) for domain, documents in domains.items()}


def resampled(seeds: Sequence[Scores]) -> dict[str, Array]:
    """Return {domain: bits per byte}, (1 + DRAWS,): of all documents, then of as many drawn with replacement.

    The same documents are drawn for every model, so that differences are between paired figures; seeds are averaged.
    """
    found: dict[str, Array] = {}
    for domain, documents in seeds[0].items():
        count = len(documents)
        drawn = np.random.default_rng(count).integers(count, size=(DRAWS, count))
        chosen = np.concatenate([np.arange(count)[None], drawn])
        totals = [scores[domain][chosen].sum(axis=1) for scores in seeds]
        found[domain] = np.mean([total[:, 0] / math.log(2) / total[:, 2] for total in totals], axis=0)
    return found


def rows_of(seeds: Sequence[Mapping[str, Scores]], training: Mapping[str, float]) -> list[Row]:
    """Return the table's rows: references, baselines, variants. Each is held against the anchors of its own seeds.

    Args:
        seeds: What ``read_scores`` found for each seed.
        training: Row -> operations.
    """
    recipe_of = {variant.name: variant.recipe for variant in VARIANTS}
    about = {variant.name: variant.about for variant in VARIANTS}
    listed = [name for name in seeds[0] if not name.startswith("pair ")]
    first = [name for name in REFERENCES if name in listed]
    baselines = [name for name in listed if name not in first and name not in recipe_of]
    rows = []
    for name in [*first, *baselines, *(v.name for v in VARIANTS if v.name in listed and v.name not in first)]:
        having = [scores for scores in seeds if name in scores]
        pair = f"pair {recipe_of.get(name, 'discriminant')}"
        bits = {each: resampled([scores[each] for scores in having]) for each in ("anchor", name, pair, DEFAULT)}
        averages = [average_of(scores[name]) for scores in having]
        row = row_of(name, bits["anchor"], bits[name], bits[pair], bits[DEFAULT], averages)
        rows.append(replace(row, about=about.get(name, ""), training=training.get(name)))
    return rows


def row_of(
    name: str,
    anchor: Mapping[str, Array],
    own: Mapping[str, Array],
    pair: Mapping[str, Array],
    default: Mapping[str, Array],
    averages: Sequence[float],
) -> Row:
    closed = [domain for domain in anchor if domain != PUBLIC]
    mean = {key: np.mean([bits[d] for d in closed], axis=0) for key, bits in (("a", anchor), ("o", own), ("p", pair))}
    gained, possible = mean["a"] - mean["o"], mean["a"] - mean["p"]
    margin = np.mean([own[d] - default[d] for d in default], axis=0)
    sure = bool((possible > 0).all())
    retained = gained / possible if sure else None
    return Row(
        name=name,
        about="",
        seeds=len(averages),
        bits_per_byte={domain: float(bits[0]) for domain, bits in own.items()},
        average=float(mean["o"][0]),
        interval=interval(mean["o"]),
        spread=float(np.std(averages, ddof=1)) if len(averages) > 1 else None,
        gains={d: gain(anchor[d][0], own[d][0], pair[d][0]) for d in closed},
        retained=None if retained is None else float(retained[0]),
        retained_interval=None if retained is None else interval(retained),
        margin=float(margin[0]),
        margin_interval=interval(margin),
    )


def gain(anchor: float, own: float, pair: float) -> float | None:
    return float((anchor - own) / (anchor - pair)) if anchor > pair else None


def average_of(scores: Scores) -> float:
    totals = [documents.sum(axis=0) for domain, documents in scores.items() if domain != PUBLIC]
    return float(np.mean([total[0] / math.log(2) / total[2] for total in totals]))


def interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What leaving one expert out does, in bits per byte.

    Attributes:
        variant: The merged model.
        name: The expert, and its set.
        anchor: The anchor's score on that set.
        merged: The whole model's.
        without: That of the model without the expert.
        others: Every other set -> that model's score minus the anchor's.
    """

    variant: str
    name: str
    anchor: float
    merged: float
    without: float
    others: dict[str, float]

    @property
    def worst(self) -> str:
        """The other set that stands worst beside the anchor."""
        return max(self.others, key=lambda name: self.others[name])


def read_removals(root: Path) -> list[Removed]:
    """Return what one seed's run found on leaving experts out."""
    anchor = bits_of(json.loads((root / "scores" / "anchor.json").read_text()))
    found = []
    for path in sorted((root / "scores" / "removal").glob("*.json")):
        merged = bits_of(json.loads((root / "scores" / "variants" / path.name).read_text()))
        for name, scores in json.loads(path.read_text()).items():
            bits = bits_of(scores)
            others = {domain: bits[domain] - anchor[domain] for domain in bits if domain != name}
            removed = Removed(
                variant=path.stem,
                name=name,
                anchor=anchor[name],
                merged=merged[name],
                without=bits[name],
                others=others,
            )
            found.append(removed)
    return found


def bits_of(scores: Mapping[str, Any]) -> dict[str, float]:
    totals = {domain: documents.sum(axis=0) for domain, documents in arrays(scores).items()}
    return {domain: float(total[0] / math.log(2) / total[2]) for domain, total in totals.items()}


def write_results(root: Path, rows: Sequence[Row], removals: Sequence[Removed], settings: Mapping[str, Any]) -> None:
    """Write results.json and RESULTS.md."""
    found = {"rows": [asdict(row) for row in rows], "removals": [asdict(removed) for removed in removals]}
    write_json(root / "results.json", {"settings": settings, **found})
    closed = [domain for domain in rows[0].bits_per_byte if domain != PUBLIC]
    gains = [[row.name, *(shown(row.gains[d], 2) for d in closed)] for row in rows if row.name != "anchor"]
    notes = [f"- **{row.name}**: {row.about}" for row in rows if row.about]
    text = [
        "# Results",
        "",
        f"Settings: {', '.join(f'{name} {value}' for name, value in settings.items())}.",
        "",
        "Bits per byte on test text, lower is better. Intervals are over documents (paired bootstrap). `training` is",
        "in 10^12 operations, the anchor's not counted. Rows of one seed stand beside those of several: compare them",
        "by retained gain and margin, which are within seeds. The margin is that of the mean over all sets. What each",
        "baseline is: docs/baselines.md.",
        "",
        *bits_table(rows),
        "",
        "Retained gain of each set, (anchor - this) / (anchor - own pair):",
        "",
        *markdown(["", *closed], gains),
        "",
        *(removal_table(removals) if removals else []),
        *notes,
        "",
    ]
    (root / "RESULTS.md").write_text("\n".join(text))


def bits_table(rows: Sequence[Row]) -> list[str]:
    domains = list(rows[0].bits_per_byte)
    head = ["", *domains, "mean of all", "mean of closed", "95 %", "seeds", "over seeds", "retained gain", "95 %"]
    return markdown([*head, "worse than flexctl by", "95 %", "training"], [line_of(row, domains) for row in rows])


def removal_table(removals: Sequence[Removed]) -> list[str]:
    head = ["", "left out", "its set: anchor", "merged", "without", "worst other set", "against the anchor"]
    lines = [
        [
            removed.variant,
            removed.name,
            *(shown(bits, 3) for bits in (removed.anchor, removed.merged, removed.without)),
            removed.worst,
            f"{removed.others[removed.worst]:+.3f}",
        ]
        for removed in removals
    ]
    return ["With an expert left out:", "", *markdown(head, lines), ""]


def line_of(row: Row, domains: Sequence[str]) -> list[str]:
    bits = [shown(row.bits_per_byte[domain], 3) for domain in domains]
    training = "" if row.training is None else f"{row.training / 1e12:.3g}"
    overall = sum(row.bits_per_byte.values()) / len(row.bits_per_byte)
    seeds = [str(row.seeds), shown(row.spread, 3)]
    summary = [shown(overall, 3), shown(row.average, 3), between(row.interval, 3), *seeds]
    retained = [shown(row.retained, 2), between(row.retained_interval, 2)]
    margin = [f"{row.margin:+.3f}", between(row.margin_interval, 3)]
    return [row.name, *bits, *summary, *retained, *margin, training]


def shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def between(ends: tuple[float, float] | None, digits: int) -> str:
    return "" if ends is None else f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]
