"""The texts in templates/, which lies beside the package in a checkout and inside it once installed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["template"]

_PACKAGE = Path(__file__).parent


def template(name: str) -> str:
    """Return the text of a template.

    Args:
        name: Its file in templates/, such as ``flexctl.toml`` or ``launch/slurm.sbatch``.
    """
    installed = _PACKAGE / "templates" / name
    file = installed if installed.is_file() else _PACKAGE.parent / "templates" / name
    return file.read_text(encoding="utf-8")
