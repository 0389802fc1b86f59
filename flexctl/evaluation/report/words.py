"""Figures in words: how numbers read on the page, and the summary at its top."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.report.data import Estimate, Other, Report, Shifts, TaskMetric

__all__ = [
    "bits",
    "count",
    "digest",
    "interval",
    "joined",
    "percent",
    "plain",
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


def summary(report: Report) -> list[str]:
    """Return what the figures say, a sentence each: what merging does, what each expert is worth, what is unsure."""
    rest = [*_worth(report), *_tasks(report), *(_beside(report.other) if report.other else [])]
    if not report.closed or report.alone is None:
        return [_plain(report), *rest]
    return [*_gain(report, report.alone), *_elsewhere(report, report.alone), *rest]


def who_differs(report: Report, other: Other) -> str:
    """Return which experts took part in one of two models alone, or in both but with different digests."""
    ours = {member.name: member.digest for member in report.members if not member.left_out}
    theirs = {member.name: member.digest for member in other.members}
    where = {
        "in this model alone": [name for name in ours if name not in theirs],
        "in the other alone": [name for name in theirs if name not in ours],
        "in both, with different digests": [name for name in ours if theirs.get(name, ours[name]) != ours[name]],
    }
    said = [f"{place}: {joined(names)}" for place, names in where.items() if names]
    return "; ".join(said) or "the same in both"


def _plain(report: Report) -> str:
    scores = [f"{bits(figures.bits_per_byte.value, 2)} on {name}" for name, figures in report.domains.items()]
    return f"{report.title} scores {joined(scores)}, in bits per byte; lower is better."


def _gain(report: Report, alone: Shifts) -> list[str]:
    own = [name for name in report.domains if name in report.closed and math.isfinite(alone[name].change.value)]
    if not own:
        return [_plain(report)]
    before = fmean(alone[name].bits_per_byte for name in own)
    after = fmean(report.domains[name].bits_per_byte.value for name in own)
    verb = "lowers" if after < before else "raises"
    what = "their own texts" if len(own) == len(report.closed) else _named(own, "domains named after them")
    what = f"{own[0]} text" if len(own) == 1 else f"the mean over {what}"
    done = "Merging" if report.kind == "merged" else "Adding"
    change = f"from {bits(before, 2)} to {bits(after, 2)} bits per byte"
    by = f"{abs(after - before) / before * 100:.1f}{_SPACE}%"
    sentence = f"{done} {_named(report.closed, 'experts')} {verb} {what} {change}, by {by}."
    return [sentence, *_unsure(own, alone)]


def _named(names: Sequence[str], what: str) -> str:
    return joined(names) if len(names) <= _NAMED else f"{len(names)} {what}"


def _unsure(own: Sequence[str], alone: Shifts) -> list[str]:
    names = [name for name in own if alone[name].change.crosses_zero]
    return [f"On {joined(names)} the interval of that difference crosses zero."] if names else []


def _elsewhere(report: Report, alone: Shifts) -> list[str]:
    parts = []
    for name, figures in report.domains.items():
        if name not in report.closed:
            before, after = alone[name].bits_per_byte, figures.bits_per_byte.value
            unsure = ", an interval that crosses zero" if alone[name].change.crosses_zero else ""
            label = "public text" if name == PUBLIC else name
            parts.append(f"{label} {percent((after - before) / before)} ({bits(before)} to {bits(after)}{unsure})")
    return [f"Elsewhere: {joined(parts)}."] if parts else []


def _worth(report: Report) -> list[str]:
    """Return what leaving each expert out does, the costliest first where there are many."""
    measured = {name: shifts for name, shifts in report.ablation.items() if name in shifts}
    told = {name: shifts for name, shifts in measured.items() if math.isfinite(shifts[name].change.value)}
    order = list(told)
    if len(order) > _TOLD:
        order.sort(key=lambda name: -told[name][name].change.value)
    parts = [_left_out(name, told[name]) for name in order[:_TOLD]]
    more = (
        [f"The other {len(order) - _TOLD}, and smaller changes, are in the table below."] if len(order) > _TOLD else []
    )
    return [*parts, *more]


def _left_out(name: str, shifts: Shifts) -> str:
    own = shifts[name].change
    if own.crosses_zero:
        ends = interval(own, sign=True)
        start = f"Leaving {name} out changes {name} by {signed(own.value, 2)}, with an interval of {ends} that crosses"
        return f"{start} zero: this text does not show what it is worth{_aside(name, shifts, '; it ')}."
    verb, size = ("costs", own.value) if own.value > 0 else ("gives", -own.value)
    back = "" if own.value > 0 else " back"
    return f"Leaving {name} out {verb} {name} {_size(size)} bits per byte{back}{_aside(name, shifts, ' and ')}."


def _aside(name: str, shifts: Shifts, link: str) -> str:
    """Return what it does to the other domains, but for changes that are small or whose interval crosses zero."""
    others = {other: shift.change for other, shift in shifts.items() if other != name and not shift.change.crosses_zero}
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


def _tasks(report: Report) -> list[str]:
    """Return the first tasks' main metrics, and whether their intervals leave out what guessing gets."""
    mains = {name: (task.main, task.metrics[task.main]) for name, task in report.tasks.items() if task.main}
    told = [
        f"{metric} {bits(found.score.value, 2)} on {name}{_beside_guessing(found)}"
        for name, (metric, found) in mains.items()
    ]
    more = [f"{len(told) - _TOLD} more in the table below"] if len(told) > _TOLD else []
    return [f"Tasks: {'; '.join([*told[:_TOLD], *more])}."] if told else []


def _beside_guessing(metric: TaskMetric) -> str:
    score, chance = metric.score, metric.chance
    if chance is None or score.low is None or score.high is None:
        return ""
    relation = "above" if score.low > chance else "below" if score.high < chance else "not told from"
    return f", {relation} guessing ({bits(chance, 2)})"


def _beside(other: Other) -> list[str]:
    """Return where this model is better and worse than another, as far as intervals leave zero out."""
    changes = {name: contrast.change for name, contrast in other.domains.items()}
    clear = {name: change.value for name, change in changes.items() if change.is_clear}
    unclear = [name for name in changes if name not in clear]
    sides = {"better on": _side(clear, -1), "worse on": _side(clear, 1)}
    said = [f"{verb} {_amounts(side)}" for verb, side in sides.items() if side]
    start = f"Beside another model ({other.kind}, {digest(other.digest)}):"
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
