"""The page: one HTML document without scripts and without requests, a pure function of its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.explaining import Piece
from flexctl.evaluation.report import charts, words
from flexctl.evaluation.report.data import Passage, Report

__all__ = ["render"]

_COLOURS = 7


@dataclass(frozen=True, slots=True)
class _Token:
    """A piece as the page shows it: its leading expert, how strongly, in which of the page's styles."""

    text: str
    leading: str
    share: float
    style: str
    shares: dict[str, float]


def render(report: Report) -> str:
    """Return the page.

    Args:
        report: What to show. Names, licenses and texts in it are anybody's words; all of them are escaped.

    Raises:
        UsageError: matplotlib is not installed.
    """
    charts.require_matplotlib()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_fit
    )
    environment.filters |= {
        "bits": words.bits,
        "signed": words.signed,
        "percent": words.percent,
        "share": words.share,
        "count": words.count,
        "digest": words.digest,
        "interval": words.interval,
        "visible": words.visible,
    }
    styles = {name: style_of(index) for index, name in enumerate(report.experts)}
    # Charts are our own markup, their texts escaped where they were made; the style is a file of ours.
    drawn = {name: _marked(Markup, chart) for name, chart in _charts(report).items()}
    return environment.from_string(_text("page.html")).render(
        report=report,
        style=Markup(_text("page.css")),
        summary=words.summary(report),
        who_differs=words.who_differs(report, report.other) if report.other else "",
        charts=drawn,
        guessed=any(found.chance is not None for task in report.tasks.values() for found in task.metrics.values()),
        styles=styles,
        passages=[(passage, _tokens(passage, styles), _leading(passage)) for passage in report.passages],
        public=PUBLIC,
    )


def style_of(index: int) -> str:
    """Return an expert's classes: e0 is the public one's alone, the others go round, then with a line above too."""
    if index == 0:
        return "e0"
    rounds, colour = divmod(index - 1, _COLOURS)
    return f"e{colour + 1} again" if rounds else f"e{colour + 1}"


def _fit(value: Any) -> Any:
    return words.plain(value) if type(value) is str else value


def _text(name: str) -> str:
    return (files("flexctl.evaluation.report") / name).read_text(encoding="utf-8")


def _charts(report: Report) -> dict[str, str | dict[str, str]]:
    """Return chart -> svg; those with a panel a domain: chart -> domain -> svg. Empty is what was not measured."""
    panels = {
        "layers": (charts.layers, report.routing_layers),
        "top_k": (charts.top_k, report.top_k),
        "baselines": (charts.baselines, report.baselines),
    }
    drawn: dict[str, str | dict[str, str]] = {
        "before_and_after": charts.before_and_after(report),
        "tasks": charts.tasks(report),
        "ablation": charts.ablation(report) if report.ablation else "",
        "contrasts": charts.contrasts(report.other) if report.other else "",
    }
    for chart, (draw, measured) in panels.items():
        places = enumerate(report.domains if measured else ())
        drawn[chart] = {name: draw(report, name, f"{chart.replace('_', '-')}-{i}") for i, name in places}
    return drawn


def _marked(mark: Any, chart: str | Mapping[str, str]) -> Any:
    return mark(chart) if isinstance(chart, str) else {name: mark(panel) for name, panel in chart.items()}


def _tokens(passage: Passage, styles: Mapping[str, str]) -> list[_Token]:
    """Return a passage's tokens; those that hold only part of a letter go with the token that ends it."""
    tokens = []
    for piece in passage.pieces:
        if piece.text:
            leading = _leader(piece)
            tokens.append(_Token(piece.text, leading, piece.shares[leading], styles[leading], piece.shares))
    return tokens


def _leading(passage: Passage) -> dict[str, float]:
    """Return expert -> share of the tokens that it leads in, the largest first."""
    leaders = [_leader(piece) for piece in passage.pieces]
    shares = {name: leaders.count(name) / len(leaders) for name in dict.fromkeys(leaders)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _leader(piece: Piece) -> str:
    return max(piece.shares, key=lambda name: piece.shares[name])
