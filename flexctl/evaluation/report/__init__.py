"""The report: what evaluate found as one page that stands alone."""

from flexctl.evaluation.report.page import Passage, render

__all__ = ["Passage", "render"]
