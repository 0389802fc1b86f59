"""What serving needs beside the core."""

from __future__ import annotations

from importlib.util import find_spec

from flexctl.errors import UsageError

__all__ = ["require_server"]


def require_server() -> None:
    """Refuse where what serves is not installed.

    Raises:
        UsageError: It is not.
    """
    missing = [name for name in ("starlette", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {' and '.join(missing)}", hint="pip install 'flexctl[serve]'")
