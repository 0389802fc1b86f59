"""The page: one HTML document without scripts and without requests, a pure function of figures and excerpts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.explaining import Piece
from flexctl.evaluation.figures import Figures
from flexctl.evaluation.report import charts, words
from flexctl.evaluation.report.template import fill

__all__ = ["Excerpt", "render"]

_COLOURS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Excerpt:
    """The beginning of a domain's text, token by token with each expert's share, mean over layers."""

    domain: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class _Token:
    """A piece as the page shows it: its leading expert, how strongly, in which of the page's styles."""

    text: str
    leading: str
    share: float
    style: str
    shares: dict[str, float]


def render(figures: Figures, excerpts: Sequence[Excerpt] = ()) -> str:
    """Return the page.

    Args:
        figures: What to show. Names, licenses and texts in it are anybody's words; all of them are escaped.
        excerpts: Excerpts, which figures do not hold; without them the page says that they are left out.

    Raises:
        UsageError: matplotlib is not installed.
    """
    charts.require_matplotlib()
    styles = {name: style_of(index) for index, name in enumerate(figures.experts)}
    return fill(
        "page.html",
        figures=figures,
        lineage=figures.lineage,
        summary=words.summary(figures),
        settings=words.settings(figures),
        who_differs=words.who_differs(figures.lineage, figures.compare.lineage) if figures.compare else "",
        charts=_charts(figures),
        guessed=any(task.chance for task in figures.tasks.values()),
        styles=styles,
        excerpts=[(excerpt, _tokens(excerpt, styles), _leading(excerpt)) for excerpt in excerpts],
        public=PUBLIC,
    )


def style_of(index: int) -> str:
    """Return an expert's classes: e0 is the public one's alone, the others go round, then with a line above too."""
    if index == 0:
        return "e0"
    rounds, colour = divmod(index - 1, _COLOURS)
    return f"e{colour + 1} again" if rounds else f"e{colour + 1}"


def _charts(figures: Figures) -> dict[str, str | dict[str, str]]:
    """Return chart -> svg; those with a panel a domain: chart -> domain -> svg. Empty is what was not measured."""
    panels = {
        "layers": (charts.layers, figures.routing_layers),
        "top_k": (charts.top_k, figures.top_k if figures.lineage.closed else {}),
        "baselines": (charts.baselines, figures.baselines),
    }
    drawn: dict[str, str | dict[str, str]] = {
        "before_and_after": charts.before_and_after(figures),
        "tasks": charts.tasks(figures),
        "ablation": charts.ablation(figures) if figures.ablation else "",
        "contrasts": charts.contrasts(figures.compare) if figures.compare else "",
    }
    for chart, (draw, measured) in panels.items():
        places = enumerate(figures.perplexity if measured else ())
        drawn[chart] = {name: draw(figures, name, f"{chart.replace('_', '-')}-{i}") for i, name in places}
    return drawn


def _tokens(excerpt: Excerpt, styles: Mapping[str, str]) -> list[_Token]:
    """Return an excerpt's tokens; those that hold only part of a letter go with the token that ends it."""
    tokens = []
    for piece in excerpt.pieces:
        if piece.text:
            leading = _leader(piece)
            tokens.append(_Token(piece.text, leading, piece.shares[leading], styles[leading], piece.shares))
    return tokens


def _leading(excerpt: Excerpt) -> dict[str, float]:
    """Return expert -> share of the tokens that it leads in, the largest first."""
    leaders = [_leader(piece) for piece in excerpt.pieces]
    shares = {name: leaders.count(name) / len(leaders) for name in dict.fromkeys(leaders)}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _leader(piece: Piece) -> str:
    return max(piece.shares, key=lambda name: piece.shares[name])
