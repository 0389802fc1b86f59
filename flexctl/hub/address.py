"""How a bundle on the Hub is named: ``hf://OWNER/NAME[@REVISION][/FILE.st]``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from flexctl.errors import UsageError

__all__ = ["Address", "is_remote", "parse"]

_ADDRESS = re.compile(
    r"(?:hf:/{1,2})?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?"
    r"(?:/(?P<file>[A-Za-z0-9][\w.-]*\.st))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Address:
    """Where something is on the Hub.

    Attributes:
        repository: ``owner/name``.
        revision: Branch, tag or commit; None is the main branch.
        file: One expert's file; None is what the repository holds.
    """

    repository: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{self.repository}{revision}{f'/{self.file}' if self.file else ''}"


def is_remote(path: Path) -> bool:
    """Return whether a path that a user gave is an address on the Hub; ``Path`` makes ``hf:/`` of ``hf://``."""
    return path.parts[:1] == ("hf:",)


def parse(text: str | Path) -> Address:
    """Return what ``hf://OWNER/NAME[@REVISION][/FILE.st]``, with or without ``hf://``, names.

    Raises:
        UsageError: It names nothing.
    """
    found = _ADDRESS.fullmatch(str(text))
    if found is None:
        raise UsageError(f"{str(text)!r} is no repository on the Hub; expected OWNER/NAME, or hf://OWNER/NAME@REVISION")
    revision = found["revision"]
    return Address(repository=found["repository"], revision=unquote(revision) if revision else None, file=found["file"])
