"""Finding where a text stands in an owner's own."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "building": ("Built", "build_index", "require_divsufsort"),
    "near": ("near_spans", "require_rapidfuzz"),
    "spans": ("Place", "Span", "Traced", "copied", "find_spans", "segments"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
