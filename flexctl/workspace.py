"""The workspace: a directory with ``flexctl.toml``, which says where anchor, experts and merged model are.

```toml
[workspace]
anchor = "anchor"
experts = "experts"
merged = "merged"

[train_expert]        # optional: defaults of any command, named as its flags
max_tokens = 2_000_000
```

Relative paths in the file count from its own directory. FLEXCTL_ANCHOR, FLEXCTL_EXPERTS and FLEXCTL_MERGED
override the three places; they count from where the user stands.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexctl import commands
from flexctl.errors import UsageError
from flexctl.shipped import template

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["COMMANDS", "FILE_NAME", "Workspace", "ensure", "expanded", "find", "read_toml", "start"]

FILE_NAME = "flexctl.toml"

COMMANDS = tuple(row.name for row in commands.COMMANDS)
"""Every command, in the order of an expert's life; each may have a table of defaults in flexctl.toml."""

_PLACES = {"anchor": "anchor", "experts": "experts", "merged": "merged"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workspace:
    """Where things are, unless a flag says otherwise.

    Attributes:
        root: Directory of flexctl.toml, or the current directory where there is none. All paths are absolute.
        anchor: Directory of the anchor.
        experts: Directory that holds the experts' files.
        merged: Directory of the merged model.
        defaults: Table name -> the table's keys and values, as they stand in the file.
    """

    root: Path
    anchor: Path
    experts: Path
    merged: Path
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def file(self) -> Path:
        """The workspace's flexctl.toml, whether or not it exists."""
        return self.root / FILE_NAME


def find(start: Path | None = None) -> Workspace:
    """Return the workspace of the nearest flexctl.toml at or above ``start``, or the current directory.

    Without such a file the places have their usual names beneath ``start``.

    Raises:
        UsageError: The file cannot be read, is not TOML, or has an unknown table or key; or the current directory was
            deleted.
    """
    try:
        start = Path(start or "").absolute()
    except FileNotFoundError as error:
        raise UsageError("the folder that you are in is gone", hint="go to another: cd") from error
    root = next((folder for folder in (start, *start.parents) if (folder / FILE_NAME).is_file()), None)
    tables = {} if root is None else _read(root / FILE_NAME)
    root = root or start
    places = {**_PLACES, **tables.pop("workspace", {})}
    return Workspace(root=root, defaults=tables, **{name: _place(root, name, places[name]) for name in _PLACES})


def ensure(root: Path) -> Workspace:
    """Return the workspace around ``root``; where there is none, write ``root``/flexctl.toml first.

    Raises:
        UsageError: There is a flexctl.toml, and it is not valid.
    """
    around = find(root)
    start(around.root)
    return around


def start(root: Path, defaults: str = "") -> bool:
    """Write ``root``/flexctl.toml where there is none, and return whether there was none.

    Args:
        root: Directory of the workspace.
        defaults: Tables of commands, as they are to stand in the file.
    """
    file = root / FILE_NAME
    is_new = not file.is_file()
    if is_new:
        temporary = file.with_name(f".{FILE_NAME}.tmp")
        try:
            temporary.write_text(template(FILE_NAME) + defaults, encoding="utf-8")
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    return is_new


def _place(root: Path, name: str, value: str) -> Path:
    override = os.environ.get(f"FLEXCTL_{name.upper()}")
    if override:
        return expanded(override, f"FLEXCTL_{name.upper()}").absolute()
    return root / expanded(value, f"{root / FILE_NAME}: [workspace] {name}")


def expanded(path: str | Path, where: str) -> Path:
    """Return a path with the home of ``~`` or ``~user`` in its place.

    Args:
        path: As somebody wrote it.
        where: What they gave it for, for the message.

    Raises:
        UsageError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{where} is {str(path)!r}; there is no such user", hint="write ./~ for a folder") from error


def read_toml(file: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        UsageError: It cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is no TOMLDecodeError
        raise UsageError(f"{file}: not valid TOML: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    tables = read_toml(file)
    known = ("workspace", *COMMANDS)
    for table, content in tables.items():
        if table not in known:
            raise UsageError(f"{file}: unknown table [{table}]; known are {', '.join(known)}")
        if not isinstance(content, dict):
            raise UsageError(f"{file}: {table} must be a table, written [{table}]")
    for key, value in tables.get("workspace", {}).items():
        if key not in _PLACES:
            raise UsageError(f"{file}: unknown key {key!r} in [workspace]; known are {', '.join(_PLACES)}")
        if not isinstance(value, str) or not value:
            raise UsageError(f"{file}: [workspace] {key} is {value!r}; expected a path in quotes")
    return tables
