"""Writes what follows from the commands: docs/cli.md, and the package's names for type checkers: ``make docs``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import flexctl
from flexctl.cli.help import examples, paragraphs, sections, usage
from flexctl.commands import COMMANDS, PUBLIC, Command

__all__ = ["ROOMS", "reference", "stubs"]

ROOMS = ("evaluation", "model", "privacy", "routing", "serving", "text", "tracing", "training")
"""Packages inside flexctl whose names are imported on first use, as those of flexctl itself."""

_HEAD = """# Command line

Written by `make docs` from the commands; a test checks that it is current.

A command of two words may be written with a space: `trace find` is `trace-find`.

Every flag may also come from the environment (`--max-tokens` is `FLEXCTL_MAX_TOKENS`) or from `flexctl.toml`
(`max_tokens` under `[train_expert]`); the order is flag, environment, flexctl.toml, default. Several values in one
variable are separated by commas; paths, a `NAME=PATH` too, as in `PATH`. Relative paths count from where you stand,
those in flexctl.toml from its own directory; a path inside other text (`NAME=PATH`, a router file) always from where
you stand. In Python the same options are fields of the command's Config, under the same names.

`flexctl.toml` is looked for here and upwards. Its table `[workspace]` says where things are (`anchor`, `experts`,
`merged`); `FLEXCTL_ANCHOR`, `FLEXCTL_EXPERTS` and `FLEXCTL_MERGED` override it.

The result goes to stdout; progress, warnings and errors go to stderr. With `--json` the result is one object on one
line, with `schema_version`, `command` and `warnings` (a list), and stderr stays empty; of a command that fails, stdout
stays empty and stderr has one object: `{"error": {"type", "message", "hint", "exit_code", "warnings"}}`.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | usage or configuration |
| 3 | a bundle is invalid, incompatible or fails verification |
| 130 | interrupted |
| 141 | who read the output closed it before its end, as `head` does; closed from the start, it goes nowhere |
| 143 | stopped by SIGTERM; a training run left a checkpoint |

`NO_COLOR` turns colours off; `FLEXCTL_DEBUG=1` shows the traceback of an error.
"""


def reference() -> str:
    """Return docs/cli.md."""
    index = [f"- [{row.shown}](#{row.shown}): {row.summary}" for row in COMMANDS]
    return "\n".join([_HEAD, "## Commands", "", *index, "", *(_page(row) for row in COMMANDS)])


def _page(row: Command) -> str:
    config_class = getattr(flexctl, row.config)
    lines = [f"## {row.shown}", ""]
    for paragraph in paragraphs(row, config_class):
        lines += [paragraph, ""]
    lines += ["```", f"flexctl {row.shown} {usage(config_class)}", "```", "", "Examples:", "", "```"]
    lines += [*examples(config_class), "```", ""]
    for title, entries in sections(config_class).items():
        lines += [f"| {title.lower()} | |", "|---|---|"]
        lines += [f"| `{_cell(flag)}` | {_cell(text)} |" for flag, text in entries]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return text as a cell of a table has it."""
    return text.replace("|", "\\|")


def stubs() -> dict[Path, str]:
    """Return each ``__init__.pyi``: the names that a package imports on first use, for type checkers."""
    tables = {"flexctl": PUBLIC, **{f"flexctl.{room}": _table(room) for room in ROOMS}}
    found = {Path(*package.split("."), "__init__.pyi"): _stub(package, names) for package, names in tables.items()}
    found[Path("flexctl", "__init__.pyi")] += "\n__version__: str\n"
    return found


def _table(room: str) -> Mapping[str, tuple[str, ...]]:
    names: Mapping[str, tuple[str, ...]] = importlib.import_module(f"flexctl.{room}").NAMES
    return names


def _stub(package: str, names: Mapping[str, tuple[str, ...]]) -> str:
    lines = ["# Written by `make docs`; a test checks that it is current.", ""]
    for module, found in sorted(names.items()):
        lines += [f"from {package}.{module} import {name} as {name}" for name in sorted(found, key=_as_sorted)]
    return "\n".join([*lines, ""])


def _as_sorted(name: str) -> tuple[bool, bool, str]:
    """Return what the linter sorts imports by: constants, classes, functions, each by name."""
    return not name.isupper(), name[0].islower(), name.lower()


if __name__ == "__main__":
    Path("docs/cli.md").write_text(reference(), encoding="utf-8")
    for file, content in stubs().items():
        file.write_text(content, encoding="utf-8")
