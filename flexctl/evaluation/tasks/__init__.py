"""Downstream tasks through lm-evaluation-harness: task files, their templates, the model as the harness drives it."""

from __future__ import annotations

from importlib.util import find_spec

from flexctl.errors import UsageError

__all__ = ["refuse_without_harness"]


def refuse_without_harness() -> None:
    """Refuse where lm-evaluation-harness is not installed; nothing else here can be imported then.

    Raises:
        UsageError: It is not.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("lm-evaluation-harness is not installed", hint="pip install 'flexctl[eval]'", field="tasks")
