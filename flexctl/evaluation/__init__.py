"""Scoring models on text."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "attacks.every_model": ("ANCHOR", "attack", "strongest"),
    "attacks.extraction": ("Beginning", "beginnings"),
    "attacks.findings": ("Recovery",),
    "attacks.trial": ("Effort", "Texts"),
    "baselines": ("Baselines", "Ingredients", "find_ingredients"),
    "bootstrap": ("Resampled", "gained_more", "resample"),
    "domains": ("Content", "Domain", "parse_domains", "read_domain", "score_domain", "window_length"),
    "measuring": ("Measured",),
    "passes": ("Passes", "Variant", "every_top_k", "one_left_out", "public_alone"),
    "records": ("read_results", "write_results", "write_samples"),
    "report.answers": ("in_words",),
    "report.audit": ("render_audit",),
    "report": ("Excerpt", "render"),
    "report.charts": ("require_matplotlib",),
    "report.excerpts": ("take_excerpt",),
    "report.template": ("require_jinja",),
    "report.trace": ("render_trace",),
    "scoring": ("Score", "held_out_losses", "score_documents"),
    "tasks": ("refuse_without_harness",),
    "tasks.harness": ("Task", "TaskRun", "read_tasks", "run_task"),
    "tasks.model": ("HarnessModel",),
    "tasks.scores": ("task_score",),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
