"""The page of a trace: a text, what of it stands in each index, and where."""

from __future__ import annotations

from collections.abc import Sequence

from flexctl.evaluation.report.page import style_of
from flexctl.evaluation.report.template import fill
from flexctl.tracing.spans import Traced, segments

__all__ = ["render_trace"]


def render_trace(
    text: str, indexes: Sequence[Traced], *, least_bytes: int, prompt: str | None, digest: str | None
) -> str:
    """Return the page.

    Args:
        text: What was traced.
        indexes: What was found in each.
        least_bytes: Length of the shortest span that was looked for.
        prompt: What a model was asked, where the text is its answer.
        digest: Of that model.

    Raises:
        UsageError: jinja2 is not installed.
    """
    found = [
        (traced, [(piece, _style(number, traced), number) for piece, number in segments(text, traced.all)])
        for traced in indexes
    ]
    return fill(
        "trace.html",
        text=text,
        found=found,
        summary=_summary(indexes),
        least_bytes=least_bytes,
        prompt=prompt,
        digest_of_model=digest,
        style_of=style_of,
    )


def _style(number: int | None, traced: Traced) -> str:
    """Return the class of a piece: spans go round the page's colours, near matches have a line above too."""
    if number is None:
        return ""
    return style_of(number % 7 + 1) + (" again" if number >= len(traced.spans) else "")


def _summary(indexes: Sequence[Traced]) -> str:
    told = []
    for traced in indexes:
        count = len(traced.spans)
        if not count:
            told.append(f"Nothing of this text stands in {traced.name} word for word.")
            continue
        longest = max(len(span.text) for span in traced.spans)
        spans = f"{count} passage{'s' if count > 1 else ''}"
        told.append(
            f"{spans} of this text, {100 * traced.covered:.0f} % of it, "
            f"stand{'' if count > 1 else 's'} in {traced.name} word for word; the longest has {longest} characters."
        )
    return " ".join(told)
