"""Help pages: a command's flags with the defaults of its Config, and its examples."""

from __future__ import annotations

import dataclasses
from typing import Any

from typer.core import TyperCommand, TyperOption

import flexctl
from flexctl.config import config_name

__all__ = ["HelpPage", "rows", "usage"]


class HelpPage(TyperCommand):
    """A command whose help page shows real defaults and examples."""

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """Write the usage line."""
        formatter.write_usage(ctx.command_path, usage(self))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options with their defaults."""
        for title, entries in rows(self, ctx).items():
            with formatter.section(title):
                formatter.write_dl(entries)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples as they are, unwrapped, so that they can be copied."""
        del ctx
        with formatter.section("Examples"):
            for example in str(self.epilog).splitlines():
                formatter.write(f"  {example}\n")


def usage(command: TyperCommand) -> str:
    """Return what follows a command's name: its required arguments, optional ones in brackets, OPTIONS."""
    parts = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = f"{parameter.metavar}{'...' if parameter.nargs != 1 else ''}"
            parts.append(shown if parameter.required else f"[{shown}]")
    return " ".join([*parts, "[OPTIONS]"])


def rows(command: TyperCommand, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Return the sections of a help page: title -> (flag, text) in the order of the command's parameters."""
    defaults = _defaults(context.info_name.replace("-", "_"))
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        text = str(getattr(parameter, "help", ""))
        if parameter.name in defaults:
            text = f"{text.removesuffix('.')} (default: {defaults[parameter.name]})."
        if isinstance(parameter, TyperOption):
            flag = ", ".join(sorted(parameter.opts, key=len))
            sections["Options"].append((flag if parameter.is_flag else f"{flag} {parameter.metavar}", text))
        else:
            sections["Arguments"].append((str(parameter.metavar), text))
    return {title: entries for title, entries in sections.items() if entries}


def _defaults(command: str) -> dict[str, str]:
    """Return field -> default as text, for the fields of a command's Config whose default says something."""
    defaults = {field.name: field.default for field in dataclasses.fields(getattr(flexctl, config_name(command)))}
    # The text of a flag says already what happens without it.
    silent = (type(None), bool, tuple, type(dataclasses.MISSING))
    return {
        name: str(default) for name, default in defaults.items() if default != "" and not isinstance(default, silent)
    }
