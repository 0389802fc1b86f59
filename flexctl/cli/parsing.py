"""The command line, made from the table of commands and the options of their Configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import flexctl
from flexctl.cli.help import Manner, page
from flexctl.cli.output import print_text, print_version
from flexctl.commands import Command
from flexctl.options import Option, options

__all__ = ["Call", "make_app"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What the command line asks for.

    Attributes:
        row: The command.
        given: Field of its Config -> value as given; None where it was not.
        manner: How the result is to be said.
    """

    row: Command
    given: dict[str, Any]
    manner: Manner

    @property
    def command(self) -> str:
        """The command's name with underscores."""
        return self.row.name


def make_app(rows: Iterable[Command], asked: Container[str]) -> typer.Typer:
    """Return the command line of some commands. It returns the Call, or None where it has answered by itself.

    Args:
        rows: The commands, in the order of the first help page.
        asked: Names, as typed, of those that may be run; only their modules are imported.
    """
    app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback()(_flexctl)
    for row in rows:
        function = _function(row) if row.shown in asked else _not_asked
        app.command(row.shown, help=row.summary, add_help_option=False)(function)
    return app


def _flexctl(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=lambda asked: _print_version(asked), is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Train experts on text that may not be shared, merge them into one model, remove them again exactly.

    A coordinator publishes an anchor, every owner trains an expert at home, anyone merges them.
    Start with: flexctl demo
    """


def _print_version(asked: bool) -> None:
    if asked:
        print_version()
        raise typer.Exit


def _not_asked() -> None:
    """Stand on the first help page."""


def _function(row: Command) -> Callable[..., Call]:
    """Return the function that Typer makes a command of: its parameters are the options of the Config."""
    config_class = getattr(flexctl, row.config)

    def show_help(asked: bool) -> None:
        if asked:
            print_text(page(row, config_class))
            raise typer.Exit

    def command(**values: Any) -> Call:
        manner = Manner(**{option.field: bool(values.pop(option.field)) for option in options(Manner)})
        del values["help"]
        return Call(row=row, given=values, manner=manner)

    parameters = [_parameter(option) for option in (*options(config_class), *options(Manner))]
    asks_for_help = Annotated[bool, typer.Option("--help", callback=show_help, is_eager=True)]
    parameters.append(
        inspect.Parameter("help", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=asks_for_help)
    )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(option: Option) -> inspect.Parameter:
    """Return an option as Typer reads it.

    Numbers and choices stay text: ``config.resolve`` turns the text of flags, environment and flexctl.toml into the
    field's type, with one rule and one message for all three. The default is None, so that "given" is known.
    """
    kind: Any = bool if option.item is bool else Path if option.item is Path else str
    if option.is_list:
        kind = list[kind]
    if option.is_argument:
        declared = typer.Argument(metavar=option.metavar)
        default = inspect.Parameter.empty if option.is_required else None
    else:
        declared = typer.Option(option.shown, *([option.short] if option.short else []), metavar=option.metavar or None)
        default = None
    annotation: Any = Annotated[kind if default is not None else kind | None, declared]
    return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
