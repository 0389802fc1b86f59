"""The report's charts, drawn by matplotlib, which nothing else imports. Lengths are CSS pixels of the finished page."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flexctl.errors import UsageError
from flexctl.evaluation.attacks.findings import Recovery
from flexctl.evaluation.figures import Comparison, Estimate, Figures
from flexctl.evaluation.report.svg import COLOURS, embed
from flexctl.evaluation.report.words import bits, interval, share, short, signed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ablation",
    "baselines",
    "before_and_after",
    "contrasts",
    "layers",
    "recovery",
    "require_matplotlib",
    "shares",
    "tasks",
    "top_k",
]

_WIDE, _PANEL = 420, 340
_ROW, _TALL_ROW, _CELL = 30, 42, 76
_LABEL = 13
_LEAST_SPAN = 0.1  # bits per byte from bottom to top, so that noise looks small
_NOTED = 6  # figures beside one line that do not meet
_UNDER_TEXT = 0.55  # the most opaque that a cell may be for its figure to be read
_DOT = 72  # dots an inch: one pixel each

_RC: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 12,
    "axes.unicode_minus": True,
    "axes.edgecolor": COLOURS["rule"],
    "axes.linewidth": 1,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["rule"],
    "ytick.color": COLOURS["rule"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "grid.color": COLOURS["rule"],
}


def require_matplotlib() -> None:
    """Refuse where matplotlib is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("matplotlib") is None:
        raise UsageError(
            "needs matplotlib, which is not installed", hint="pip install 'flexctl[report]'", field="report"
        )


def before_and_after(figures: Figures) -> str:
    """Return each domain's score of the public expert alone and of the model, with its interval, on one line each."""
    rows = list(figures.perplexity)
    with _drawing("before-and-after", _WIDE, _ROW * len(rows) + 40) as (figure, finish):
        axes = _axes(figure, left=112, right=14, top=8, bottom=32)
        colour = COLOURS["accent"]
        for y, name in zip(_rows(axes, rows), rows, strict=True):
            score = figures.perplexity[name].estimate
            if figures.public_alone:
                before = _drawable(figures.public_alone[name])
                axes.plot([before, score.value], [y, y], color=COLOURS["rule"], linewidth=4, clip_on=False)
                _mark(axes, before, y, COLOURS["muted"], hollow=True)
            _interval(axes, score, y, colour)
            _mark(axes, score.value, y, colour)
        axes.grid(axis="x", linewidth=1)
        axes.margins(x=0.06)
        return finish("Bits per byte on each domain", _describe_scores(figures))


def tasks(figures: Figures) -> str:
    """Return each task's main metric with its interval and what guessing gets; empty where no task has one."""
    shown = {name: (task.main, task) for name, task in figures.tasks.items() if task.main}
    if not shown:
        return ""
    with _drawing("tasks", _WIDE, _TALL_ROW * len(shown) + 32) as (figure, finish):
        axes = _axes(figure, left=126, right=14, top=0, bottom=32)
        metrics = [metric for metric, _ in shown.values()]
        told = []
        for y, (name, (metric, task)) in zip(_rows(axes, list(shown), 16, metrics), shown.items(), strict=True):
            score, chance = task.estimate(metric), task.chance.get(metric)
            if chance is not None:
                axes.plot([chance] * 2, [y - 0.3, y + 0.3], color=COLOURS["muted"], linewidth=2)
            _interval(axes, score, y, COLOURS["accent"])
            _mark(axes, score.value, y, COLOURS["accent"])
            guessing = "" if chance is None else f", guessing {bits(chance)}"
            told.append(f"{name} {metric} {bits(score.value)} ({interval(score)}{guessing})")
        axes.set_xlim(0, 1)
        axes.grid(axis="x", linewidth=1)
        return finish("Score on each task, from 0 to 1", "; ".join(told) + ".")


def contrasts(other: Comparison) -> str:
    """Return each domain's change from another model to this one with its interval, around a line at zero."""
    with _drawing("contrasts", _WIDE, _ROW * len(other.domains) + 40) as (figure, finish):
        axes = _axes(figure, left=112, right=14, top=8, bottom=32)
        for y, contrast in zip(_rows(axes, list(other.domains)), other.domains.values(), strict=True):
            change = contrast.change
            side = "worse" if change.value > 0 else "better"
            colour = COLOURS[side if change.is_clear else "muted"]
            _interval(axes, change, y, colour)
            _mark(axes, _drawable(change.value), y, colour, hollow=not change.is_clear)
        axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        axes.grid(axis="x", linewidth=1)
        axes.margins(x=0.06)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -_LEAST_SPAN / 2), max(high, _LEAST_SPAN / 2))
        axes.locator_params(axis="x", nbins=5)
        told = []
        for name, contrast in other.domains.items():
            ends = interval(contrast.change, sign=True)
            crosses = ", crosses zero" if contrast.change.crosses_zero else ""
            told.append(f"{name} {signed(contrast.change.value)}{f' ({ends}{crosses})' if ends else ''}")
        return finish("Change in bits per byte from the other model to this one", "; ".join(told) + ".")


def ablation(figures: Figures) -> str:
    """Return the heat map of what leaving each expert out changes: rows experts, columns domains."""
    experts, domains = list(figures.ablation_change), list(figures.perplexity)
    values = [[figures.ablation_change[expert][name].value for name in domains] for expert in experts]
    largest = _largest([abs(value) for row in values for value in row])
    with _drawing("ablation", 96 + _CELL * len(domains), 30 + _ROW * len(experts)) as (figure, finish):
        axes = _axes(figure, left=96, right=0, top=30, bottom=0)
        _grid(axes, experts, domains, columns_on_top=True)
        _tiles(
            axes, [[("worse" if x > 0 else "better", _UNDER_TEXT * abs(x) / largest) for x in row] for row in values]
        )
        for y, (expert, row) in enumerate(zip(experts, values, strict=True)):
            for x, (name, value) in enumerate(zip(domains, row, strict=True)):
                unsure = figures.ablation_change[expert][name].crosses_zero
                text = signed(value) + (" ?" if unsure else "")
                axes.text(x, y, text, ha="center", va="center_baseline", fontsize=_LABEL)
        told = [
            f"without {expert}: " + ", ".join(f"{name} {signed(x)}" for name, x in zip(domains, row, strict=True))
            for expert, row in zip(experts, values, strict=True)
        ]
        return finish("Change in bits per byte when an expert is left out", "; ".join(told) + ".")


def layers(figures: Figures, domain: str, name: str) -> str:
    """Return the heat map of one domain's routing: rows experts, columns layers."""
    shares = figures.routing_layers[domain]
    experts, count = list(shares), len(next(iter(shares.values())))
    left, right = 94, 44
    with _drawing(name, _PANEL, 22 * len(experts) + 44) as (figure, finish):
        axes = _axes(figure, left=left, right=right, top=4, bottom=40)
        _grid(axes, experts, [str(layer) for layer in range(count)], every=max(1, -(-count // 8)))
        axes.set_xlabel("layer", color=COLOURS["muted"])
        _tiles(axes, [[("heat", value) for value in shares[expert]] for expert in experts])
        for y, expert in enumerate(experts):
            mean = figures.routing[domain][expert]
            end = count - 0.5 + right * count / (_PANEL - left - right)
            axes.text(end, y, share(mean), ha="right", va="center_baseline", fontsize=_LABEL)
        told = [f"{expert} {', '.join(share(value) for value in shares[expert])}" for expert in experts]
        return finish(
            f"Routing on {domain}, layer by layer", "Shares from the first layer on: " + "; ".join(told) + "."
        )


def top_k(figures: Figures, domain: str, name: str) -> str:
    """Return one domain's bits per byte over the number of active experts."""
    scores = {k: row[domain] for k, row in figures.top_k.items()}
    with _drawing(name, _PANEL, 190) as (figure, finish):
        axes = _axes(figure, left=56, right=26, top=24, bottom=44)
        axes.plot(
            list(scores),
            [_drawable(value) for value in scores.values()],
            color=COLOURS["accent"],
            linewidth=2,
            clip_on=False,
        )
        for k, value in scores.items():
            _mark(axes, k, _drawable(value), COLOURS["accent"], hollow=k != figures.num_experts_per_tok)
            if len(scores) <= _NOTED or k in (1, len(scores), figures.num_experts_per_tok):
                _note(axes, bits(value), (k, _drawable(value)), away=(0, 9), ha="center", fontsize=12)
        axes.set_xticks(list(scores))
        axes.set_xlabel("experts active for a token", color=COLOURS["muted"])
        axes.locator_params(axis="y", nbins=4)
        axes.margins(x=0.09, y=0.2)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, (low + high - _LEAST_SPAN) / 2), max(high, (low + high + _LEAST_SPAN) / 2))
        axes.grid(axis="y", linewidth=1)
        told = ", ".join(f"{k}: {bits(value)}" for k, value in scores.items())
        return finish(f"Bits per byte on {domain} by experts active for a token", told + ".")


def baselines(figures: Figures, domain: str, name: str) -> str:
    """Return one domain's bits per byte of this model and of simpler ways, as bars from zero."""
    scores = {"this model": figures.perplexity[domain].bits_per_byte}
    scores |= {way: row[domain] for way, row in figures.baselines.items()}
    with _drawing(name, _PANEL, 26 * len(scores) + 8) as (figure, finish):
        axes = _axes(figure, left=168, right=46, top=2, bottom=2)
        for y, (way, value) in zip(_rows(axes, list(scores), 26), scores.items(), strict=True):
            colour = COLOURS["accent" if way == "this model" else "bar"]
            length = value if math.isfinite(value) else 0.0
            axes.barh(y, length, height=0.56, color=colour, linewidth=0)
            _note(axes, bits(value), (length, y), away=(6, 0), va="center_baseline", fontsize=_LABEL)
        axes.set_xticks([])
        axes.set_xlim(0, _largest(list(scores.values())))
        told = ", ".join(f"{way} {bits(value)}" for way, value in scores.items())
        return finish(f"Bits per byte on {domain}, this model and simpler ways", told + ".")


def shares(rows: Mapping[str, Estimate], name: str, title: str, *, chance: float | None = None) -> str:
    """Return shares from 0 to 1 with their intervals, one on a line, and a line at what guessing gets."""
    with _drawing(name, _WIDE, _ROW * len(rows) + 40) as (figure, finish):
        axes = _axes(figure, left=132, right=14, top=8, bottom=32)
        if chance is not None:
            axes.axvline(chance, color=COLOURS["muted"], linewidth=1)
        for y, found in zip(_rows(axes, list(rows), 17), rows.values(), strict=True):
            clear = chance is None or found.low is None or found.low > chance
            colour = COLOURS["accent" if clear else "muted"]
            _interval(axes, found, y, colour)
            _mark(axes, found.value, y, colour, hollow=not clear)
        axes.set_xlim(0, 1)
        axes.grid(axis="x", linewidth=1)
        told = [f"{row} {bits(found.value)} ({interval(found)})" for row, found in rows.items()]
        return finish(title, "; ".join(told) + ".")


def recovery(found: Recovery, name: str) -> str:
    """Return held-out bits per byte over steps of training on removed text, a line and its interval a model."""
    with _drawing(name, _WIDE, 240) as (figure, finish):
        axes = _axes(figure, left=56, right=118, top=14, bottom=44)
        places = list(range(len(found.steps)))
        told = []
        colours = (COLOURS["accent"], COLOURS["muted"])
        for colour, (model, curve) in zip(colours, found.bits_per_byte.items(), strict=True):
            values = [_drawable(point.value) for point in curve]
            lows, highs = ([_drawable_end(getattr(point, end)) for point in curve] for end in ("low", "high"))
            axes.fill_between(places, lows, highs, color=colour, alpha=0.15, linewidth=0)
            axes.plot(places, values, color=colour, linewidth=2, marker="o", markersize=5)
            side = 1 if values[-1] >= max(other[-1].value for other in found.bits_per_byte.values()) else -1
            _note(axes, model, (places[-1], values[-1]), away=(8, 7 * side), va="center", fontsize=12)
            told.append(f"{model}: " + ", ".join(f"{s} {bits(v)}" for s, v in zip(found.steps, values, strict=True)))
        axes.set_xticks(places, [str(step) for step in found.steps])
        axes.set_xlabel("steps of training on the removed text", color=COLOURS["muted"])
        axes.locator_params(axis="y", nbins=5)
        axes.grid(axis="y", linewidth=1)
        return finish("Held-out bits per byte while removed text is trained on again", "; ".join(told) + ".")


class _Finish:
    """Writes a figure as the page's svg element."""

    def __init__(self, figure: Figure, name: str) -> None:
        self._figure, self._name = figure, name

    def __call__(self, title: str, description: str) -> str:
        drawing = io.StringIO()
        with warnings.catch_warnings():
            # Glyphs that matplotlib's own font lacks: the page's fonts draw the text.
            warnings.simplefilter("ignore", UserWarning)
            self._figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return embed(drawing.getvalue(), self._name, title, description)


@contextmanager
def _drawing(name: str, width: float, height: float) -> Iterator[tuple[Figure, _Finish]]:
    """Give an empty figure of so many pixels and what writes it, under our settings and nobody else's."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_RC, "svg.hashsalt": name})
        figure = Figure(figsize=(width / _DOT, height / _DOT), dpi=_DOT)
        yield figure, _Finish(figure, name)


def _axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Return axes that leave so many pixels on each side, without a frame."""
    width, height = figure.get_size_inches() * _DOT
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    axes.spines[:].set_visible(False)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=6)
    return axes


def _rows(axes: Axes, names: Sequence[str], length: int = 12, below: Sequence[str] = ()) -> list[int]:
    """Label one line a name at the figure's left edge, the first on top, and return where the lines are.

    Names longer than ``length`` are cut; tables have them in full. Words ``below`` them are muted.
    """
    from matplotlib.transforms import blended_transform_factory

    places = list(range(len(names)))
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks([])
    edge = blended_transform_factory(axes.figure.transFigure, axes.transData)
    write = partial(axes.text, transform=edge, va="center_baseline")
    up = 0.2 if below else 0
    for place, name in enumerate(names):
        write(0, place - up, short(name, length), fontsize=_LABEL)
    for place, name in enumerate(below):
        write(0, place + up, short(name, length), fontsize=12, color=COLOURS["muted"])
    return places


def _grid(
    axes: Axes, rows: Sequence[str], columns: Sequence[str], *, columns_on_top: bool = False, every: int = 1
) -> None:
    """Label a heat map; every so many columns have a label."""
    _rows(axes, rows)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    places = range(0, len(columns), every)
    labels = [short(columns[place], 10) for place in places]
    axes.set_xticks(list(places), labels, fontsize=_LABEL if columns_on_top else 12)
    if columns_on_top:
        axes.tick_params(axis="x", labelcolor=COLOURS["ink"])
        axes.xaxis.tick_top()


def _tiles(axes: Axes, cells: Sequence[Sequence[tuple[str, float]]]) -> None:
    """Fill a heat map's cells, rows from the top: a colour each, and from 0 to 1 how opaque it is."""
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgba

    places = [(x, y) for y, row in enumerate(cells) for x in range(len(row))]
    squares = [[(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5)] for x, y in places]
    strengths = [round(strength, 3) if math.isfinite(strength) else 0.0 for row in cells for _, strength in row]
    colours = [COLOURS[colour] for row in cells for colour, _ in row]
    faces = [to_rgba(colour, strength) for colour, strength in zip(colours, strengths, strict=True)]
    axes.axhspan(-0.5, len(cells) - 0.5, facecolor=to_rgba(COLOURS["rule"], 0.35), linewidth=0)
    axes.add_collection(PolyCollection(squares, facecolors=faces, edgecolors=COLOURS["paper"], linewidths=1.5))


def _largest(values: Sequence[float]) -> float:
    """Return the largest number among values, to divide by; not each is one where a model fails to score a text."""
    return max((value for value in values if math.isfinite(value) and value > 0), default=1.0)


def _drawable_end(value: float | None) -> float:
    return math.nan if value is None else value


def _drawable(value: float) -> float:
    return value if math.isfinite(value) else math.nan


def _note(axes: Axes, text: str, place: tuple[float, float], *, away: tuple[float, float], **looks: Any) -> None:
    """Write text so many pixels away from a place."""
    axes.annotate(text, place, xytext=away, textcoords="offset points", annotation_clip=False, **looks)


def _interval(axes: Axes, estimate: Estimate, y: float, colour: str) -> None:
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [y, y], color=colour, linewidth=2, clip_on=False)


def _mark(axes: Axes, x: float, y: float, colour: str, *, hollow: bool = False) -> None:
    fill = COLOURS["paper"] if hollow else colour
    axes.plot(
        [x], [y], "o", markersize=9, color=colour, markerfacecolor=fill, markeredgewidth=2, clip_on=False, zorder=5
    )


def _describe_scores(figures: Figures) -> str:
    parts = []
    for name, score in figures.perplexity.items():
        ends = interval(score.estimate)
        before = f", public expert alone {bits(figures.public_alone[name])}" if figures.public_alone else ""
        parts.append(f"{name} {bits(score.bits_per_byte)}{f' ({ends})' if ends else ''}{before}")
    return "; ".join(parts) + "."
