"""flexctl: the life of an expert in FlexOlmo-style language models.

Every command of the command line is one function here, with one Config and one Result:

    >>> import flexctl
    >>> result = flexctl.merge(flexctl.MergeConfig(experts=(Path("law.st"),), output=Path("merged")))
    >>> result.digest

Everything is imported on first use, so that ``import flexctl`` costs nothing. The names stand in
``flexctl.commands``; type checkers read them from ``__init__.pyi``, which ``make docs`` writes.
"""

from __future__ import annotations

import importlib
from typing import Any

from flexctl.commands import PUBLIC

_MODULE_OF = {name: f"flexctl.{module}" for module, names in PUBLIC.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("flexctl")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'flexctl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
