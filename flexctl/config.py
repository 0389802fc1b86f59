"""Settings: a command's Config from flags, environment, flexctl.toml and its own defaults, in that order.

A flag's name is its field's name with hyphens. Text becomes the type that the field is annotated with, by the
same rules and with the same messages for all three sources.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from flexctl import workspace
from flexctl.errors import UsageError
from flexctl.options import Config, Option, options

__all__ = ["resolve"]

Chosen = TypeVar("Chosen", bound=Config)

# What separates paths in the environment, as they may hold commas; the colon of hf:// is no separator.
_PATH_SEPARATOR = re.escape(os.pathsep) + "(?!//)"


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """Where a value was given: its name in messages, and what relative paths count from.

    ``separator`` is a pattern between several values in one text; None where values have types of their own.
    """

    name: str
    base: Path | None = None
    separator: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether values are text that is to be read."""
        return self.separator is not None


def resolve(config_class: type[Chosen], command: str, given: Mapping[str, Any]) -> Chosen:
    """Return the Config of one run: flag > FLEXCTL_* environment > flexctl.toml > the field's default.

    Args:
        config_class: The command's Config.
        command: The command's name with underscores, which is its table in flexctl.toml.
        given: Field name -> value from the command line; None and empty lists mean "not given".

    Raises:
        UsageError: A value does not fit its field, is out of range, a key of the command's table is unknown, or a
            field without a default was given nowhere.
    """
    space = workspace.find()
    table = space.defaults.get(command, {})
    known = options(config_class)
    _refuse_unknown(table, [option.key for option in known if not option.is_argument], f"{space.file}: [{command}]")
    values = {}
    for option in known:
        found = _look_up(option, command, given, table, space)
        if found is not None:
            value, source = found
            values[option.field] = _coerce(value, option.type, source)
        elif option.is_required:
            raise _missing(command, option)
    return config_class(**values)


def _look_up(
    option: Option, command: str, given: Mapping[str, Any], table: Mapping[str, Any], space: workspace.Workspace
) -> tuple[Any, _Source] | None:
    """Return the value that counts and its source, or None where the field was given nowhere."""
    value = given.get(option.field)
    separator = _PATH_SEPARATOR if option.paths else ","
    if value is not None and value != []:
        return value, _Source(option.shown, separator=separator)
    if option.is_argument:
        return None
    variable = f"FLEXCTL_{option.key.upper()}"
    if os.environ.get(variable):
        return os.environ[variable], _Source(variable, separator=separator)
    if option.key in table:
        place = f"{space.file}: [{command}] {option.key}"
        return table[option.key], _Source(place, base=space.root, separator=None)
    return None


def _refuse_unknown(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")


def _missing(command: str, option: Option) -> UsageError:
    shown = command.replace("_", "-")
    if option.is_argument:
        return UsageError(f"{shown} needs {option.shown}", hint=f"flexctl {shown} --help")
    hint = f"give {option.shown}, or {option.key} in flexctl.toml under [{command}]"
    return UsageError(f"{shown} needs {option.shown}", hint=hint)


def _coerce(value: Any, annotation: Any, source: _Source) -> Any:
    """Return ``value`` as the annotation's type; text is read, anything else must fit as it is."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, [part for part in arguments if part is not type(None)], source)
    if origin is typing.Literal:
        if value not in arguments:
            raise _refuse(value, "one of " + ", ".join(map(str, arguments)), source)
        return value
    if origin is tuple:
        return tuple(_coerce(part, arguments[0], source) for part in _parts(value, source))
    return _SCALARS[annotation](value, source)


def _coerce_union(value: Any, parts: list[Any], source: _Source) -> Any:
    for part in parts[:-1]:
        try:
            return _coerce(value, part, source)
        except UsageError:
            continue
    return _coerce(value, parts[-1], source)


def _parts(value: Any, source: _Source) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if source.separator is not None and isinstance(value, str):
        return [part for part in re.split(source.separator, value) if part]
    return [value]


def _integer(value: Any, source: _Source) -> int:
    if isinstance(value, str) and source.is_text:
        try:
            return int(value)
        except ValueError:
            raise _refuse(value, "a whole number", source) from None
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _refuse(value, "a whole number", source)


def _number(value: Any, source: _Source) -> float:
    if isinstance(value, str) and source.is_text:
        try:
            value = float(value)
        except ValueError:
            raise _refuse(value, "a number", source) from None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _refuse(value, "a number", source)


def _truth(value: Any, source: _Source) -> bool:
    if isinstance(value, str) and source.is_text and value.lower() in _TRUTHS:
        return _TRUTHS[value.lower()]
    if isinstance(value, bool):
        return value
    raise _refuse(value, "true or false", source)


def _string(value: Any, source: _Source) -> str:
    if isinstance(value, str):
        # A byte that is not UTF-8 comes from the terminal as half a surrogate pair.
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise _refuse(value, "text in UTF-8", source)
        return value
    # TOML has dates of its own, and the dates of a manifest are written the same way.
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise _refuse(value, "text in quotes", source)


def _path(value: Any, source: _Source) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise _refuse(value, "a path in quotes", source)
    path = workspace.expanded(value, source.name)
    # An address on the Hub, hf://owner/name, counts from nowhere.
    return path if source.base is None or path.parts[:1] == ("hf:",) else source.base / path


_TRUTHS = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}
_SCALARS: Mapping[Any, Any] = {int: _integer, float: _number, bool: _truth, str: _string, Path: _path}


def _refuse(value: Any, expected: str, source: _Source) -> UsageError:
    return UsageError(f"{source.name} is {str(value)!r}; expected {expected}")
