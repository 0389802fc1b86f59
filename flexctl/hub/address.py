"""How things on the Hub are named.

A bundle is ``hf://OWNER/NAME[@REVISION][/FILE.st]``, text is ``hf://datasets/OWNER/NAME[@REVISION]`` and then ``/PATH``
or ``:SUBSET:SPLIT``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from flexctl.errors import UsageError

__all__ = ["DATA_FORM", "Address", "DataAddress", "is_remote", "parse", "parse_data"]

_ADDRESS = re.compile(
    r"(?:hf:/{1,2})?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/]+|[^/]+))?"
    r"(?:/(?P<file>[A-Za-z0-9][\w.-]*\.st))?",
    re.ASCII,
)


DATA_FORM = "hf://datasets/OWNER/NAME[@REVISION], then /PATH or :SUBSET:SPLIT"
_DATA_ADDRESS = re.compile(
    r"hf:/{1,2}datasets/(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/\w+/[^/:]+|[^/:]+))?"
    r"(?:/(?P<path>[^:]+)|(?::(?P<subset>[^:/]*))?(?::(?P<split>[\w.]+))?)",
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


@dataclass(frozen=True, kw_only=True, slots=True)
class DataAddress:
    """Where text is on the Hub.

    Attributes:
        repository: ``owner/name``.
        revision: Branch, tag or commit; None is the main branch.
        path: A file or folder inside; None leaves the choice to subset and split.
        subset: One of the data set's configurations; None is its only or default one.
        split: As the data set names it.
    """

    repository: str
    revision: str | None = None
    path: str | None = None
    subset: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        split = f":{self.split}" if self.split != "train" else ""
        part = f"/{self.path}" if self.path else f":{self.subset or ''}{split}" if self.subset or split else ""
        return f"hf://datasets/{self.repository}{revision}{part}"


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


def parse_data(path: Path) -> DataAddress:
    """Return what an address of text on the Hub names.

    Raises:
        UsageError: It is no such address.
    """
    found = _DATA_ADDRESS.fullmatch(path.as_posix())
    if found is None:
        raise UsageError(f"{str(path)!r} is no data set on the Hub; expected {DATA_FORM}")
    revision, given = found["revision"], {"split": found["split"]} if found["split"] else {}
    return DataAddress(
        repository=found["repository"],
        revision=unquote(revision) if revision else None,
        path=found["path"],
        subset=found["subset"] or None,
        **given,
    )
