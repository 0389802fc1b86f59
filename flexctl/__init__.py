"""flexctl: the life of an expert in FlexOlmo-style language models.

Every command of the command line is one function here, with one Config and one Result:

    >>> import flexctl
    >>> result = flexctl.merge(flexctl.MergeConfig(experts=(Path("law.st"),), output=Path("merged")))
    >>> result.digest

Everything is imported on first use, so that ``import flexctl`` costs nothing. The names stand in
``flexctl.commands``; type checkers read them from ``__init__.pyi``, which ``make docs`` writes.
"""

from __future__ import annotations

from typing import Any

from flexctl.commands import PUBLIC
from flexctl.faces import face

_imported, __dir__, _names = face(__name__, PUBLIC)

__all__ = sorted([*_names, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flexctl")
    return _imported(name)
