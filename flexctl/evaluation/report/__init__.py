"""The report: what evaluate found as one page that stands alone."""

from flexctl.evaluation.report.data import (
    Contrast,
    DomainFigures,
    Estimate,
    Member,
    MovedDocument,
    Other,
    Passage,
    Report,
    Setting,
    Shift,
    Shifts,
    TaskFigures,
    TaskMetric,
)
from flexctl.evaluation.report.page import render

__all__ = [
    "Contrast",
    "DomainFigures",
    "Estimate",
    "Member",
    "MovedDocument",
    "Other",
    "Passage",
    "Report",
    "Setting",
    "Shift",
    "Shifts",
    "TaskFigures",
    "TaskMetric",
    "render",
]
