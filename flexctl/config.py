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
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flexctl import workspace
from flexctl.errors import UsageError

__all__ = ["config_name", "flag_name", "refuse_no_date", "refuse_out_of_range", "refuse_unwritable", "resolve"]

Config = TypeVar("Config")

# Fields that are not the flag of the same name: arguments (None), or a flag with another name.
_EXCEPTIONS: Mapping[str, Mapping[str, str | None]] = {
    "init_anchor": {"source": None},
    "import_expert": {"dense": None},
    "compress": {"expert": None},
    "merge": {"experts": None},
    "remove": {"names": None, "source": "from"},
    "replace": {"name": None, "expert": None, "source": "from"},
    "tune_router": {"merged": None},
    "evaluate": {"bundle": None},
    "generate": {"bundle": None},
    "inspect": {"path": None},
    "verify": {"path": None},
    "list": {"path": None},
    "push": {"path": None, "repository": None},
    "pull": {"repository": None},
}

_MOST_CHARACTERS = 10_000
_MOST_THREADS = max(256, 4 * (os.cpu_count() or 1))

# What separates paths in the environment; the colon of hf:// is no separator.
_PATH_SEPARATOR = re.escape(os.pathsep) + "(?!//)"


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """Where a value was given: its name in messages, and what relative paths count from."""

    name: str
    base: Path | None = None
    is_text: bool = True


def resolve(config_class: type[Config], command: str, given: Mapping[str, Any]) -> Config:
    """Return the Config of one run: flag > FLEXCTL_* environment > flexctl.toml > the field's default.

    Args:
        config_class: The command's dataclass.
        command: The command's name with underscores, which is its table in flexctl.toml.
        given: Field name -> value from the command line; None and empty lists mean "not given".

    Raises:
        UsageError: A value does not fit its field, a key of the command's table is unknown, or a field
            without a default was given nowhere.
    """
    space = workspace.find()
    table = space.defaults.get(command, {})
    annotations = typing.get_type_hints(config_class)
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    flags = {name: flag_name(command, name) for name in fields}
    _refuse_unknown(table, [flag for flag in flags.values() if flag], f"{space.file}: [{command}]")
    values = {}
    for name, field in fields.items():
        found = _look_up(name, flags[name], command, given, table, space)
        if found is not None:
            value, source = found
            values[name] = _coerce(value, annotations[name], source)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _missing(command, name, flags[name])
    return config_class(**values)


def refuse_out_of_range(config: object, *, above_zero: Sequence[str], from_zero: Sequence[str] = ()) -> None:
    """Refuse numbers that no run can use. None means "not given" and passes.

    Args:
        config: A command's Config.
        above_zero: Fields that must be above 0.
        from_zero: Fields that must not be below 0.

    Raises:
        UsageError: One is out of range, or not a number. ``threads`` may be at most 256, or four times the processors
            where that is more.
    """
    for name in (*above_zero, *from_zero):
        value = getattr(config, name)
        allowed = value is None or value > 0 or (name in from_zero and value == 0)
        if not allowed:
            limit = "is below 0" if name in from_zero else "is not above 0"
            raise UsageError(f"--{name.replace('_', '-')}: {value} {limit}")
        if name == "threads" and value is not None and value > _MOST_THREADS:
            raise UsageError(
                f"--threads: {value} is above {_MOST_THREADS}", hint=f"this machine has {os.cpu_count()} processors"
            )


def refuse_unwritable(config: object) -> None:
    """Refuse words about a bundle that no manifest can hold: ``license``, ``label``, ``contact`` and each ``purpose``.

    Raises:
        UsageError: One is longer than 10,000 characters, has a control character, or is no valid Unicode, as bytes that
            are not UTF-8 on a command line are not.
    """
    for name in ("license", "label", "contact", "purpose"):
        given = getattr(config, name, None) or ()
        for text in (given,) if isinstance(given, str) else given:
            if len(text) > _MOST_CHARACTERS:
                raise UsageError(f"--{name}: has {len(text)} characters; expected at most {_MOST_CHARACTERS}")
            for character in text:
                if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\r\t":
                    raise UsageError(f"--{name}: holds {character!a}, which is no character of a text")


def refuse_no_date(expires: str | None) -> None:
    """Refuse an --expires that is no date written YYYY-MM-DD. None means "never" and passes.

    Raises:
        UsageError: It is none.
    """
    try:
        is_date = expires is None or datetime.date.fromisoformat(expires).isoformat() == expires
    except ValueError:
        is_date = False
    if not is_date:
        raise UsageError(f"--expires: {expires!r} is no date", hint="write YYYY-MM-DD")


def config_name(command: str) -> str:
    """Return the name of a command's Config: ``train_expert`` has ``TrainExpertConfig``."""
    return "".join(word.capitalize() for word in command.split("_")) + "Config"


def flag_name(command: str, field: str) -> str | None:
    """Return the long flag of a command's field, written with underscores; None for an argument."""
    return _EXCEPTIONS.get(command, {}).get(field, field)


def _look_up(
    name: str,
    flag: str | None,
    command: str,
    given: Mapping[str, Any],
    table: Mapping[str, Any],
    space: workspace.Workspace,
) -> tuple[Any, _Source] | None:
    """Return the value that counts and its source, or None where the field was given nowhere."""
    value = given.get(name)
    if value is not None and value != []:
        return value, _Source(f"--{flag.replace('_', '-')}" if flag else name.upper())
    if flag is None:
        return None
    variable = f"FLEXCTL_{flag.upper()}"
    if os.environ.get(variable):
        return os.environ[variable], _Source(variable)
    if flag in table:
        return table[flag], _Source(f"{space.file}: [{command}] {flag}", base=space.root, is_text=False)
    return None


def _refuse_unknown(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise UsageError(f"{where}: unknown key {key!r}; known are {', '.join(sorted(known))}")


def _missing(command: str, name: str, flag: str | None) -> UsageError:
    shown = command.replace("_", "-")
    if flag is None:
        return UsageError(f"{shown} needs {name.upper()}", hint=f"flexctl {shown} --help")
    option = f"--{flag.replace('_', '-')}"
    return UsageError(f"{shown} needs {option}", hint=f"give {option}, or {flag} in flexctl.toml under [{command}]")


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
        return tuple(_coerce(part, arguments[0], source) for part in _parts(value, arguments[0], source))
    return _SCALARS[annotation](value, source)


def _coerce_union(value: Any, parts: list[Any], source: _Source) -> Any:
    for part in parts[:-1]:
        try:
            return _coerce(value, part, source)
        except UsageError:
            continue
    return _coerce(value, parts[-1], source)


def _parts(value: Any, item: Any, source: _Source) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return list(value)
    if source.is_text and isinstance(value, str):
        # Paths may hold commas; everything else is a name or a pair NAME=PATH.
        return [part for part in re.split(_PATH_SEPARATOR if item is Path else ",", value) if part]
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
        return value
    # TOML has dates of its own, and the dates of a manifest are written the same way.
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        return value.isoformat()
    raise _refuse(value, "text in quotes", source)


def _path(value: Any, source: _Source) -> Path:
    if not isinstance(value, (str, Path)) or not str(value):
        raise _refuse(value, "a path in quotes", source)
    path = Path(value).expanduser()
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
