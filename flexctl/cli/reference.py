"""Writes docs/cli.md from the commands themselves: ``make docs``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import cast

from typer import Context
from typer.core import TyperGroup
from typer.main import get_command

from flexctl.cli.commands import app
from flexctl.cli.help import HelpPage, rows, usage

__all__ = ["reference"]

_HEAD = """# Command line

Written by `make docs` from the commands; a test checks that it is current.

Every flag may also come from the environment (`--max-tokens` is `FLEXCTL_MAX_TOKENS`) or from `flexctl.toml`
(`max_tokens` under `[train_expert]`); the order is flag, environment, flexctl.toml, default. Several values in one
variable are separated by commas, paths as in `PATH`. Relative paths count from where you stand, those in
flexctl.toml from its own directory; a path inside other text (`NAME=PATH`, a router file) always from where you stand.

`flexctl.toml` is looked for here and upwards. Its table `[workspace]` says where things are (`anchor`, `experts`,
`merged`); `FLEXCTL_ANCHOR`, `FLEXCTL_EXPERTS` and `FLEXCTL_MERGED` override it.

The result goes to stdout; progress, warnings and errors go to stderr. With `--json` the result is one object on one
line, with `schema_version` and `command`, and an error is the last line of stderr:
`{"error": {"type", "message", "hint", "exit_code"}}`.

| exit code | means |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | usage or configuration |
| 3 | a bundle is invalid, incompatible or fails verification |
| 130 | interrupted |
| 141 | who read the output closed it before its end, as `head` does; closed from the start, it goes nowhere |

`NO_COLOR` turns colours off; `FLEXCTL_DEBUG=1` shows the traceback of an error.
"""


def reference() -> str:
    """Return docs/cli.md."""
    group = cast(TyperGroup, get_command(app))
    commands = [cast(HelpPage, command) for command in group.commands.values()]
    index = [f"- [{c.name}](#{c.name}): {_paragraphs(c)[0]}" for c in commands]
    return "\n".join([_HEAD, "## Commands", "", *index, "", *(_page(command) for command in commands)])


def _page(command: HelpPage) -> str:
    name = str(command.name)
    lines = [f"## {name}", ""]
    for paragraph in _paragraphs(command):
        lines += [paragraph, ""]
    lines += ["```", f"flexctl {name} {usage(command)}", "```", "", "Examples:", "", "```"]
    lines += [*str(command.epilog).splitlines(), "```", ""]
    for title, entries in rows(command, Context(command, info_name=name)).items():
        lines += [f"| {title.lower()} | |", "|---|---|"]
        lines += [f"| `{flag.replace('|', chr(92) + '|')}` | {text} |" for flag, text in entries]
        lines.append("")
    return "\n".join(lines)


def _paragraphs(command: HelpPage) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in str(command.help).split("\n\n")]


if __name__ == "__main__":
    (target,) = sys.argv[1:] or ["docs/cli.md"]
    Path(target).write_text(reference(), encoding="utf-8")
