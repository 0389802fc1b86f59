"""Figures in words: how numbers read on the page, and the summary at its top."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.bootstrap import RESAMPLES
from flexctl.evaluation.figures import Comparison, Estimate, Figures, Lineage, TaskScore

__all__ = [
    "bits",
    "count",
    "digest",
    "interval",
    "joined",
    "percent",
    "plain",
    "settings",
    "share",
    "short",
    "signed",
    "summary",
    "visible",
    "who_differs",
]

_MINUS = "\u2212"
_DASH = "\u2013"
_SPACE = "\u00a0"
_SHOWN = 0.005
_TOLD = 3
_NAMED = 4
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def bits(value: float, digits: int = 3) -> str:
    """Return bits per byte as they stand in a table; a dash where a model failed to score a text."""
    return f"{value:.{digits}f}".replace("-", _MINUS) if math.isfinite(value) else _DASH


def signed(value: float, digits: int = 3) -> str:
    """Return a change with its sign; one that rounds to zero has none."""
    if not math.isfinite(value):
        return _DASH
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text).replace("-", _MINUS)


def percent(value: float) -> str:
    """Return a relative change: 0.013 is ``+1.3 %``."""
    return f"{signed(100 * value, 1)}{_SPACE}%"


def share(value: float) -> str:
    """Return a share of one in per cent: 0.7 is ``70 %``."""
    return f"{100 * value:.0f}{_SPACE}%"


def count(value: int) -> str:
    """Return a whole number with thousands apart."""
    return f"{value:,}"


def interval(estimate: Estimate, *, sign: bool = False) -> str:
    """Return ``low to high``, or nothing where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    write = signed if sign else bits
    return f"{write(estimate.low)} to {write(estimate.high)}"


def digest(value: str) -> str:
    """Return the beginning of a digest, enough to tell models apart."""
    return value.removeprefix("sha256:")[:12]


def plain(text: str) -> str:
    """Return anybody's words without the characters that no page may hold; a mark stands for each."""
    return _UNFIT.sub("\ufffd", text)


def visible(text: str) -> str:
    """Return a token's text with its blanks to be seen."""
    return text.replace(" ", "\u2423").replace("\t", "\u21e5").replace("\n", "\u21b5")


def short(text: str, length: int) -> str:
    """Return a name that fits beside a chart."""
    text = plain(text)
    return text if len(text) <= length else text[: length - 1] + "\u2026"


def joined(names: Iterable[str]) -> str:
    """Return ``a, b and c``."""
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def settings(figures: Figures) -> dict[str, str]:
    """Return how it was measured, a line each."""
    found, agreement, ratio = figures.settings, figures.router_agreement, figures.post_norm_ratio
    said = {
        "text": f"each document by itself, in windows of {found.seq_len} tokens that do not overlap",
        "special tokens": "in the text are read as plain text" if found.special_as_text else "",
        "intervals": f"95 %, of {RESAMPLES:,} draws of documents; for differences both models have the same draws",
        "precision": f"{found.dtype} on {found.device}",
        "bfloat16 routers": _agreeing(min(agreement.values())) if agreement else "",
        "post-norm ratio": f"at least {min(ratio):,.0f}; must be far above 1" if ratio else "",
        "software": ", ".join(f"{name} {version}" for name, version in figures.software.items()),
    }
    return {name: value for name, value in said.items() if value}


def _agreeing(share: float) -> str:
    return f"keep the same experts for {100 * share:.2f} % of tokens"


def summary(figures: Figures) -> list[str]:
    """Return what the figures say, a sentence each: what merging does, what each expert is worth, what is unsure."""
    rest = [*_worth(figures), *_tasks(figures), *(_beside(figures.compare) if figures.compare else [])]
    if not figures.lineage.closed or not figures.public_alone:
        return [_plain(figures), *rest]
    return [*_gain(figures), *_elsewhere(figures), *rest]


def who_differs(lineage: Lineage, other: Lineage) -> str:
    """Return which experts took part in one of two models alone, or in both but with different digests."""
    ours = {member.name: member.digest for member in lineage.members if not member.left_out}
    theirs = {member.name: member.digest for member in other.members}
    where = {
        "in this model alone": [name for name in ours if name not in theirs],
        "in the other alone": [name for name in theirs if name not in ours],
        "in both, with different digests": [name for name in ours if theirs.get(name, ours[name]) != ours[name]],
    }
    said = [f"{place}: {joined(names)}" for place, names in where.items() if names]
    return "; ".join(said) or "the same in both"


def _plain(figures: Figures) -> str:
    scores = [f"{bits(score.bits_per_byte, 2)} on {name}" for name, score in figures.perplexity.items()]
    return f"{figures.lineage.title} scores {joined(scores)}, in bits per byte; lower is better."


def _gain(figures: Figures) -> list[str]:
    alone, change, closed = figures.public_alone, figures.public_alone_change, figures.lineage.closed
    own = [name for name in figures.perplexity if name in closed and math.isfinite(change[name].value)]
    if not own:
        return [_plain(figures)]
    before = fmean(alone[name] for name in own)
    after = fmean(figures.perplexity[name].bits_per_byte for name in own)
    verb = "lowers" if after < before else "raises"
    what = "their own texts" if len(own) == len(closed) else _named(own, "domains named after them")
    what = f"{own[0]} text" if len(own) == 1 else f"the mean over {what}"
    done = "Merging" if figures.lineage.kind == "merged" else "Adding"
    by = f"from {bits(before, 2)} to {bits(after, 2)} bits per byte"
    share = f"{abs(after - before) / before * 100:.1f}{_SPACE}%"
    sentence = f"{done} {_named(closed, 'experts')} {verb} {what} {by}, by {share}."
    return [sentence, *_unsure([name for name in own if change[name].crosses_zero])]


def _named(names: Sequence[str], what: str) -> str:
    return joined(names) if len(names) <= _NAMED else f"{len(names)} {what}"


def _unsure(names: Sequence[str]) -> list[str]:
    return [f"On {joined(names)} the interval of that difference crosses zero."] if names else []


def _elsewhere(figures: Figures) -> list[str]:
    parts = []
    for name, score in figures.perplexity.items():
        if name not in figures.lineage.closed:
            before, after = figures.public_alone[name], score.bits_per_byte
            crosses = figures.public_alone_change[name].crosses_zero
            unsure = ", an interval that crosses zero" if crosses else ""
            label = "public text" if name == PUBLIC else name
            parts.append(f"{label} {percent((after - before) / before)} ({bits(before)} to {bits(after)}{unsure})")
    return [f"Elsewhere: {joined(parts)}."] if parts else []


def _worth(figures: Figures) -> list[str]:
    """Return what leaving each expert out does, the costliest first where there are many."""
    measured = {name: changes for name, changes in figures.ablation_change.items() if name in changes}
    told = {name: changes for name, changes in measured.items() if math.isfinite(changes[name].value)}
    order = list(told)
    if len(order) > _TOLD:
        order.sort(key=lambda name: -told[name][name].value)
    parts = [_left_out(name, told[name]) for name in order[:_TOLD]]
    more = (
        [f"The other {len(order) - _TOLD}, and smaller changes, are in the table below."] if len(order) > _TOLD else []
    )
    return [*parts, *more]


def _left_out(name: str, changes: Mapping[str, Estimate]) -> str:
    own = changes[name]
    if own.crosses_zero:
        ends = interval(own, sign=True)
        start = f"Leaving {name} out changes {name} by {signed(own.value, 2)}, with an interval of {ends} that crosses"
        return f"{start} zero: this text does not show what it is worth{_aside(name, changes, '; it ')}."
    verb, size = ("costs", own.value) if own.value > 0 else ("gives", -own.value)
    back = "" if own.value > 0 else " back"
    return f"Leaving {name} out {verb} {name} {_size(size)} bits per byte{back}{_aside(name, changes, ' and ')}."


def _aside(name: str, changes: Mapping[str, Estimate], link: str) -> str:
    """Return what it does to the other domains, but for changes that are small or whose interval crosses zero."""
    others = {other: change for other, change in changes.items() if other != name and not change.crosses_zero}
    clear = {other: c.value for other, c in others.items() if math.inf > abs(c.value) >= _SHOWN}
    said = []
    for verb, back, side in (("costs", "", _side(clear, 1)), ("gives", " back", _side(clear, -1))):
        if side:
            largest = list(side.items())[:2]
            said.append(f"{verb} {joined(f'{other} {_size(size)}' for other, size in largest)}{back}")
    return link + " and ".join(said) if said else ""


def _side(changes: Mapping[str, float], sign: int) -> dict[str, float]:
    """Return the changes of one sign, by size."""
    sizes = {name: sign * change for name, change in changes.items() if sign * change > 0}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _tasks(figures: Figures) -> list[str]:
    """Return the first tasks' main metrics, and whether their intervals leave out what guessing gets."""
    mains = {name: (task.main, task) for name, task in figures.tasks.items() if task.main}
    told = [
        f"{metric} {bits(task.metrics[metric], 2)} on {name}{_beside_guessing(task, metric)}"
        for name, (metric, task) in mains.items()
    ]
    more = [f"{len(told) - _TOLD} more in the table below"] if len(told) > _TOLD else []
    return [f"Tasks: {'; '.join([*told[:_TOLD], *more])}."] if told else []


def _beside_guessing(task: TaskScore, metric: str) -> str:
    score, chance = task.estimate(metric), task.chance.get(metric)
    if chance is None or score.low is None or score.high is None:
        return ""
    relation = "above" if score.low > chance else "below" if score.high < chance else "not told from"
    return f", {relation} guessing ({bits(chance, 2)})"


def _beside(other: Comparison) -> list[str]:
    """Return where this model is better and worse than another, as far as intervals leave zero out."""
    changes = {name: row.change for name, row in other.domains.items()}
    clear = {name: change.value for name, change in changes.items() if change.is_clear}
    unclear = [name for name in changes if name not in clear]
    sides = {"better on": _side(clear, -1), "worse on": _side(clear, 1)}
    said = [f"{verb} {_amounts(side)}" for verb, side in sides.items() if side]
    start = f"Beside another model ({other.lineage.kind}, {digest(other.digest)}):"
    parts = [f"in bits per byte this one is {', and '.join(said)}"] if said else []
    if unclear:
        parts.append(f"no difference is shown on {_named(unclear, 'domains') if said else 'any domain'}")
    return [f"{start} {'; '.join(parts)}."]


def _amounts(sizes: Mapping[str, float]) -> str:
    """Return the first of some domains with how much each, and how many more there are."""
    first = [f"{name} by {_size(size)}" for name, size in list(sizes.items())[:_TOLD]]
    return joined([*first, *([f"{len(sizes) - _TOLD} more"] if len(sizes) > _TOLD else [])])


def _size(value: float) -> str:
    return f"{value:.2f}" if value >= _SHOWN else "less than 0.01"
