"""What a command can be told: a field of its Config says it once, and everything else follows.

A field has its type and its default; its annotation says the rest:

    lr: Annotated[float | None, flag("X", "Peak learning rate.", TRAINING, above=0)] = None

From it are made the command line, the help pages, docs/cli.md, the FLEXCTL_* variable, the key in flexctl.toml and
the check of the range, which holds for Python users too. Options of several commands stand in ``flexctl.flags``.
Help texts name other fields in backquotes; the command line shows them as flags.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from flexctl.errors import UsageError

__all__ = [
    "DATA",
    "HARDWARE",
    "HUB",
    "MODEL",
    "OUTPUT",
    "PRIVACY",
    "RIGHTS",
    "ROUTER",
    "SECTIONS",
    "SERVER",
    "TRAINING",
    "TRUST",
    "Config",
    "Option",
    "argument",
    "flag",
    "options",
    "shown_names",
    "switch",
]

DATA = "Data"
TRAINING = "Training"
PRIVACY = "Privacy"
ROUTER = "Router"
MODEL = "Model"
RIGHTS = "Rights"
TRUST = "Trust"
HUB = "Hub"
HARDWARE = "Hardware"
SERVER = "Server"
OUTPUT = "Output"
SECTIONS = (DATA, TRAINING, PRIVACY, ROUTER, MODEL, RIGHTS, TRUST, HUB, SERVER, HARDWARE, OUTPUT)
"""The sections of a help page, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One thing that a command can be told.

    Attributes:
        help: What it does, one line.
        metavar: Stands for its value on help pages; empty for a switch.
        section: Where it stands on help pages.
        is_argument: Given by its place on the command line, not by a flag.
        name: The flag with underscores where it is not the field's name.
        short: A second flag of one letter.
        above: The value must be above this.
        at_least: The value must not be below this.
        below: The value must be below this.
        check: Refuses other values: called with the value and the field's name, it raises.
        paths: Values are paths, or have one inside: in the environment they are separated as in PATH.
        field: Name of the field.
        type: Its type.
        default: Its default; None where it has none.
        is_required: It has none, and must be given.
    """

    help: str = ""
    metavar: str = ""
    section: str = OUTPUT
    is_argument: bool = False
    name: str | None = None
    short: str | None = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    check: Callable[[Any, str], None] | None = None
    paths: bool = False
    field: str = ""
    type: Any = None
    default: Any = None
    is_required: bool = False

    @property
    def key(self) -> str:
        """Its name in flexctl.toml, and in capitals behind FLEXCTL_ in the environment."""
        return self.name or self.field

    @property
    def shown(self) -> str:
        """How the command line calls it: ``--max-tokens``, or ``EXPERT``."""
        if self.is_argument:
            return self.metavar or self.field.upper()
        return f"--{self.key.replace('_', '-')}"

    @property
    def item(self) -> Any:
        """The type of one value: its type without None, and without the tuple around it."""
        inner = [part for part in _parts(self.type) if part is not type(None)]
        found = inner[0] if len(inner) == 1 else self.type
        return typing.get_args(found)[0] if typing.get_origin(found) is tuple else found

    @property
    def is_list(self) -> bool:
        """Whether it may be given several times."""
        return typing.get_origin(self.type) is tuple

    def refuse(self, value: Any) -> None:
        """Refuse a value that no run can use. None means "not given" and passes.

        Raises:
            UsageError: It is out of range, or none of the choices.
        """
        choices = typing.get_args(self.type) if typing.get_origin(self.type) is typing.Literal else ()
        if choices and value not in choices:
            raise UsageError(f"{value!r} is not one of {', '.join(map(str, choices))}", field=self.field)
        if self.check is not None and value is not None:
            self.check(value, self.field)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return
        # Written so that NaN is out of every range.
        if self.above is not None and not value > self.above:
            raise UsageError(f"{value} is not above {self.above}", field=self.field)
        if self.at_least is not None and not value >= self.at_least:
            raise UsageError(f"{value} is below {self.at_least}", field=self.field)
        if self.below is not None and not value < self.below:
            raise UsageError(f"{value} is not below {self.below}", field=self.field)


def flag(
    metavar: str,
    help: str,
    section: str,
    *,
    name: str | None = None,
    short: str | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    check: Callable[[Any, str], None] | None = None,
    paths: bool = False,
) -> Option:
    """Return an option with a value, given by a flag: see ``Option``."""
    return Option(
        metavar=metavar,
        help=help,
        section=section,
        name=name,
        short=short,
        above=above,
        at_least=at_least,
        below=below,
        check=check,
        paths=paths,
    )


def switch(help: str, section: str, *, short: str | None = None) -> Option:
    """Return an option that is on or off, given by a flag."""
    return Option(help=help, section=section, short=short)


def argument(metavar: str, help: str) -> Option:
    """Return an option that is given by its place on the command line."""
    return Option(metavar=metavar, help=help, is_argument=True)


class Config:
    """Base of every command's Config: its values are within their ranges."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: One is; the error names its field.
        """
        for option in options(type(self)):
            option.refuse(getattr(self, option.field))


def options(config_class: type[Any]) -> tuple[Option, ...]:
    """Return the options of a Config, one a field, in the order of its fields; a bare field is a flag too."""
    return _read(config_class)  # type: ignore[arg-type]  # a class is hashable


def shown_names(config_class: type) -> Mapping[str, str]:
    """Return field -> how the command line calls it, for a Config."""
    return {option.field: option.shown for option in options(config_class)}


@functools.cache
def _read(config_class: type[Any]) -> tuple[Option, ...]:
    hints = typing.get_type_hints(config_class, include_extras=True)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(config_class))


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    kind, said = hint, Option()
    if typing.get_origin(hint) is typing.Annotated:
        kind, *notes = typing.get_args(hint)
        said = next((note for note in notes if isinstance(note, Option)), said)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    needed = default is MISSING
    found = dataclasses.replace(
        said, field=field.name, type=kind, default=None if needed else default, is_required=needed
    )
    return dataclasses.replace(found, paths=found.paths or found.item is Path)


def _parts(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)
