"""The report: what evaluate found as one page that stands alone."""

from flexctl.evaluation.report.page import Excerpt, render

__all__ = ["Excerpt", "render"]
