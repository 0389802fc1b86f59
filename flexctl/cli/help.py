"""Help pages: a command's options in sections, with the defaults of its Config, and its examples."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from flexctl.cli.text import named
from flexctl.commands import Command
from flexctl.options import OUTPUT, SECTIONS, Config, Option, options, shown_names, switch

__all__ = ["Manner", "examples", "page", "paragraphs", "sections", "usage"]

_FIRST = 5
"""The first flags of a Config, those that most people need, stand first on its page."""

_HELP = ("--help", "Show this message and exit.")
_WIDEST, _FLAG_WIDTH = 100, 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Manner(Config):
    """How a result is said; every command can be told."""

    json: Annotated[bool, switch("Print one JSON object instead of text.", OUTPUT)] = False
    quiet: Annotated[bool, switch("Nothing on stderr but errors.", OUTPUT, short="-q")] = False
    verbose: Annotated[bool, switch("Show every figure of the result.", OUTPUT, short="-v")] = False


def page(row: Command, config_class: type) -> str:
    """Return a command's help page, as wide as the terminal."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = [f"Usage: flexctl {row.shown} {usage(config_class)}"]
    for paragraph in paragraphs(row, config_class):
        lines += ["", textwrap.fill(paragraph, width, initial_indent="  ", subsequent_indent="  ")]
    listed = sections(config_class)
    column = 4 + max(len(flag) for entries in listed.values() for flag, _ in entries if len(flag) <= _FLAG_WIDTH)
    for title, entries in listed.items():
        lines += ["", f"{title}:", *_listed(entries, column, width)]
    return "\n".join([*lines, "", "Examples:", *(f"  {example}" for example in examples(config_class))])


def usage(config_class: type) -> str:
    """Return what follows a command's name: its required arguments, optional ones in brackets, OPTIONS."""
    given = [option for option in options(config_class) if option.is_argument]
    shown = [f"{option.shown}{'...' if option.is_list else ''}" for option in given]
    parts = [text if option.is_required else f"[{text}]" for option, text in zip(given, shown, strict=True)]
    return " ".join([*parts, "[OPTIONS]"])


def paragraphs(row: Command, config_class: type) -> list[str]:
    """Return what a command does: its summary, then what the docstring of its Config says after its first line."""
    names = shown_names(config_class)
    return [row.summary, *(named(" ".join(part.split()), names) for part in _parts(config_class) if not _lists(part))]


def examples(config_class: type) -> list[str]:
    """Return the command lines under "Examples" in the docstring of a Config."""
    return [line.strip() for part in _parts(config_class) if _lists(part) for line in part.splitlines()[1:]]


def sections(config_class: type) -> dict[str, list[tuple[str, str]]]:
    """Return the sections of a help page: title -> (flag, text).

    The flags that most people need come first; the others stand in the sections that they name.
    """
    names = shown_names(config_class)
    own = options(config_class)
    flags = [option for option in own if not option.is_argument]
    first, others = flags[:_FIRST], [*flags[_FIRST:], *options(Manner)]
    title = "Most used" if len(flags) > _FIRST else "Options"
    found = {"Arguments": [option for option in own if option.is_argument], title: first}
    found |= {title: [option for option in others if option.section == title] for title in SECTIONS}
    shown = {title: [(_flag(option), _text(option, names)) for option in found[title]] for title in found}
    shown[OUTPUT].append(_HELP)
    return {title: entries for title, entries in shown.items() if entries}


def _parts(config_class: type) -> list[str]:
    return inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[1:]


def _lists(part: str) -> bool:
    return part.startswith("Examples:\n")


def _flag(option: Option) -> str:
    flags = [option.short, option.shown] if option.short else [option.shown]
    return " ".join([", ".join(flags), *([option.metavar] if option.metavar and not option.is_argument else [])])


def _text(option: Option, names: Mapping[str, str]) -> str:
    """Return an option's help with its default, where that says something that the help does not."""
    text = named(option.help, names)
    # Without a value, an empty one and a switch that is off need no words.
    if option.is_required or option.default is False or option.default in (None, "", ()):
        return text
    return f"{text.removesuffix('.')} (default: {option.default})."


def _listed(entries: Sequence[tuple[str, str]], column: int, width: int) -> list[str]:
    """Return flags and texts as two columns; a flag that is too long for its column has a line of its own."""
    indent = " " * column
    lines = []
    for flag, text in entries:
        wrapped = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
        if len(flag) <= _FLAG_WIDTH:
            lines += [f"  {flag}".ljust(column) + wrapped[0][column:], *wrapped[1:]]
        else:
            lines += [f"  {flag}", *wrapped]
    return lines
