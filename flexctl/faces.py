"""Packages whose names are imported on first use.

What is above such a package says ``from flexctl import model`` at its top and ``model.build_model(...)`` where it is
needed: the package itself costs nothing, and torch is there from the first use on. Type checkers read the same names
from the package's ``__init__.pyi``, which ``make docs`` writes from its table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["face"]


def face(
    package: str, names: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported on first use.

    Args:
        package: Its full name.
        names: Module of the package -> the names of it that the package itself has.
    """
    module_of = {name: f"{package}.{module}" for module, found in names.items() for name in found}

    def get(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(module_of[name]), name)

    def listed() -> list[str]:
        module = sys.modules[package]
        return sorted({*vars(module), *module.__all__})

    return get, listed, sorted(module_of)
