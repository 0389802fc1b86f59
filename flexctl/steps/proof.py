"""Checking all of a bundle before it is believed, sent or moved into place."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from flexctl.bundle import Anchor, Expert
from flexctl.bundle.checks import Check, check_bundle
from flexctl.bundle.index import is_index
from flexctl.runtime import Reporter
from flexctl.steps.claims import check_claims

__all__ = ["ProofConfig", "check_all"]


class ProofConfig(Protocol):
    """What a command's Config says about checking a bundle."""

    @property
    def allow_expired(self) -> bool:
        """Whether rights that are over are taken all the same."""


def check_all(
    path: Path,
    config: ProofConfig,
    reporter: Reporter,
    *,
    today: datetime.date | None,
    anchor: Anchor | None = None,
    absent: Mapping[str, Expert | None] | None = None,
) -> tuple[str | None, list[Check]]:
    """Hash a bundle behind a progress bar and check all that its format demands, by ``check_bundle``.

    Args:
        path: The bundle.
        config: Whether expired rights are taken.
        reporter: Where progress goes.
        today: The day that rights are compared with; the real one if None.
        anchor: The anchor that it must have been made of; None leaves that open.
        absent: Names that a merged model must not have, each with the expert's own file where it is at hand.

    Returns:
        The digest, None if the bundle cannot be opened, and the checks in the order in which they were made.
    """
    files = list(path.iterdir()) if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files if file.is_file())
    with reporter.progress("hashing", total, "bytes") as progress:
        digest, checks = check_bundle(
            path,
            anchor=anchor,
            absent=absent or {},
            today=None if config.allow_expired else today or datetime.date.today(),
            advance=progress.advance,
        )
    return digest, checks + ([] if digest is None or is_index(path) else check_claims(path))
