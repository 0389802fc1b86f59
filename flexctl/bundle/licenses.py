"""Licenses that do not go together in one model, as far as their ids tell. No legal advice: it says where to look.

Four rules, each about what the ids and purposes say and nothing else:

1. A license that forbids commercial use (NC in its id) beside an expert whose owner lists the purpose commercial.
2. Two different licenses that each want the whole under themselves (SA, GPL, OSL, EUPL, CDLA-Sharing, ODbL).
3. One of those beside one that forbids commercial use or changes: the whole cannot be under both.
4. A license that forbids changes (ND) beside any other expert: a merged model may count as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from flexctl.bundle.rights import Rights

__all__ = ["conflicts"]

_NON_COMMERCIAL = re.compile(r"(?i)\bnc\b|non-?commercial|research-only")
_SHARE_ALIKE = re.compile(r"(?i)\bsa\b|gpl|^osl|^eupl|^cdla-sharing|^odbl|^gfdl")
_NO_CHANGES = re.compile(r"(?i)\bnd\b|no-?deriv")
COMMERCIAL = "commercial"


def conflicts(entries: Sequence[Rights]) -> list[str]:
    """Return what of some experts' licenses does not go together, a phrase each; none where nothing is seen.

    Args:
        entries: The experts, the public one too where its license counts.
    """
    closed = [entry for entry in entries if entry.license]
    not_commercial = [entry for entry in closed if _NON_COMMERCIAL.search(entry.license or "")]
    share_alike = [entry for entry in closed if _SHARE_ALIKE.search(entry.license or "")]
    unchanged = [entry for entry in closed if _NO_CHANGES.search(entry.license or "")]
    commercial = [entry for entry in entries if COMMERCIAL in (purpose.strip().lower() for purpose in entry.purposes)]
    found = []
    if not_commercial and commercial:
        names = ", ".join(entry.name for entry in commercial)
        found.append(f"{_shown(not_commercial)} forbids commercial use, {names} is for it")
    if len({(entry.license or "").lower() for entry in share_alike}) > 1:
        found.append(f"{_shown(share_alike)} each want the whole under themselves")
    limits = [entry for entry in (*not_commercial, *unchanged) if entry not in share_alike]
    if share_alike and limits:
        found.append(f"{_shown(share_alike)} wants the whole under itself, {_shown(limits)} forbids what it allows")
    if unchanged and len(entries) > len(unchanged):
        found.append(f"{_shown(unchanged)} forbids changes")
    return found


def _shown(entries: Sequence[Rights]) -> str:
    return ", ".join(dict.fromkeys(f"{entry.name} ({entry.license})" for entry in entries))
