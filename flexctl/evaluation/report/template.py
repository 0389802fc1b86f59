"""Filling a page: our own HTML and CSS, everything else escaped."""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from flexctl.errors import UsageError
from flexctl.evaluation.report import words
from flexctl.shipped import template

__all__ = ["fill", "require_jinja"]

_FILTERS = ("bits", "signed", "percent", "share", "count", "digest", "interval", "visible")


def require_jinja() -> None:
    """Refuse where jinja2 is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("jinja2") is None:
        raise UsageError("needs jinja2, which is not installed", hint="pip install 'flexctl[report]'", field="report")


def fill(page: str, **values: Any) -> str:
    """Return a page of ours, filled; all values are escaped but charts, which are our own markup.

    Args:
        page: The name of its file.
        values: Name -> value. Under ``charts`` are drawings: name -> svg, or name -> panel -> svg.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(_text),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_fit,
    )
    environment.filters |= {name: getattr(words, name) for name in _FILTERS}
    charts = {name: _marked(Markup, chart) for name, chart in values.pop("charts", {}).items()}
    return environment.get_template(page).render(
        style=Markup(template("pages.css") + _text("page.css")), charts=charts, **values
    )


def _marked(mark: Any, chart: Any) -> Any:
    return mark(chart) if isinstance(chart, str) else {name: mark(panel) for name, panel in chart.items()}


def _fit(value: Any) -> Any:
    return words.plain(value) if type(value) is str else value


def _text(name: str) -> str:
    return (files("flexctl.evaluation.report") / name).read_text(encoding="utf-8")
