"""A stock checkpoint that is taken over: what of it is not."""

from __future__ import annotations

from pathlib import Path

from flexctl.bundle import left_out, named_code, unread_weights
from flexctl.bundle.names import shown
from flexctl.runtime import Reporter

__all__ = ["warn_of_left_behind"]


def warn_of_left_behind(source: Path, reporter: Reporter) -> None:
    """Say what of a checkpoint's directory does not go into an anchor: code that it names, files beside it."""
    for where, code in named_code(source).items():
        reporter.warn(
            f"{source}: {where} names code ({shown(code)}), which is neither run nor kept: Transformers' own classes "
            "stand in for it"
        )
    if names := [*unread_weights(source), *left_out(source)]:
        reporter.warn(f"{source}: {', '.join(names)}: left out, no part of an anchor")
