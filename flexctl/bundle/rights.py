"""What the owners allow: which closed experts may answer for a purpose, on a day."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import NamedTuple

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.expert import Expert
from flexctl.bundle.manifest import has_expired
from flexctl.bundle.merged import Merged
from flexctl.bundle.names import PUBLIC, shown

__all__ = ["Rights", "forbidden", "rights_of"]


class Rights(NamedTuple):
    """What the owner of one closed expert allows.

    Attributes:
        name: The expert's.
        license: SPDX id or text; None is unknown.
        purposes: What it may be used for; none listed means not restricted.
        expires: Last day of its use, YYYY-MM-DD; None is never.
    """

    name: str
    license: str | None
    purposes: tuple[str, ...]
    expires: str | None


def rights_of(bundle: Anchor | Expert | Merged) -> tuple[Rights, ...]:
    """Return the rights in the closed experts of a bundle, in its order; an anchor has none."""
    if isinstance(bundle, Expert):
        data = bundle.manifest.data
        return (Rights(bundle.manifest.name, data.license, data.purposes, data.expires),)
    if isinstance(bundle, Merged):
        entries = (entry for entry in bundle.manifest.experts if entry.name != PUBLIC)
        return tuple(Rights(entry.name, entry.license, entry.purposes, entry.expires) for entry in entries)
    return ()


def forbidden(entries: Iterable[Rights], purpose: str | None, today: datetime.date) -> dict[str, str]:
    """Return the closed experts that may not be used, and why, a phrase each.

    Args:
        entries: As from ``rights_of``.
        purpose: What for; case and spaces around it do not count. None is no purpose in particular: then only a day
            that is past forbids.
        today: The day that rights are compared with.
    """
    reasons = {}
    for entry in entries:
        if has_expired(entry.expires, today):
            reasons[entry.name] = f"its rights ended on {entry.expires}"
        elif purpose is not None and entry.purposes and _plain(purpose) not in map(_plain, entry.purposes):
            reasons[entry.name] = f"it is for {', '.join(entry.purposes)}, not for {shown(purpose)}"
    return reasons


def _plain(purpose: str) -> str:
    return purpose.strip().casefold()
