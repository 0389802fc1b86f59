"""Scoring models on text."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "domains": ("Domain", "parse_domains", "score_domain", "window_length"),
    "scoring": ("held_out_losses", "score_documents"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
