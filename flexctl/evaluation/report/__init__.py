"""The report: what evaluate found as one page that stands alone."""

from flexctl.evaluation.report.data import (
    DomainFigures,
    Estimate,
    Member,
    Passage,
    Report,
    Setting,
    Shift,
    Shifts,
)
from flexctl.evaluation.report.page import render

__all__ = [
    "DomainFigures",
    "Estimate",
    "Member",
    "Passage",
    "Report",
    "Setting",
    "Shift",
    "Shifts",
    "render",
]
