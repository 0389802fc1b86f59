"""Names that become file names, and the one way to make a name out of a folder's."""

from __future__ import annotations

import re
import unicodedata

from flexctl.errors import BundleError, UsageError

__all__ = [
    "PUBLIC",
    "and_more",
    "check_anchor_name",
    "check_expert_name",
    "check_file_name",
    "is_file_name",
    "name_an_anchor",
    "name_an_expert",
    "shown",
    "slug",
]

PUBLIC = "public"
"""The anchor's own feed-forward network inside a merged model. No owner may take this name."""

_EXPERT = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_ANCHOR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


def shown(value: object) -> str:
    """Return ``value`` as a message shows it: quoted, printable, on one line, at most 80 characters."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def and_more(count: int) -> str:
    """Return how a message that names the first of ``count`` tells of the others: `` (and 2 more)``, or nothing."""
    return f" (and {count - 1} more)" if count > 1 else ""


def check_expert_name(name: str, where: str) -> str:
    """Return ``name`` if a closed expert may bear it.

    Args:
        name: Candidate.
        where: File and field, for the message.

    Raises:
        BundleError: It does not match ``[a-z0-9][a-z0-9_-]{0,62}``, or it is ``public``, which is reserved.
    """
    if fault := _fault_of_expert(name):
        raise BundleError(f"{where} {fault}")
    return name


def _fault_of_expert(name: str) -> str | None:
    if name == PUBLIC:
        return "is 'public', which is reserved for the anchor's own expert"
    if not _EXPERT.fullmatch(name):
        return f"is {shown(name)}; expected 1 to 63 of a-z, 0-9, _ and -, the first a letter or digit"
    return None


def check_anchor_name(name: str, where: str) -> str:
    """Return ``name`` if an anchor may bear it: ``[A-Za-z0-9][A-Za-z0-9._-]{0,95}``.

    Raises:
        BundleError: It may not.
    """
    if fault := _fault_of_anchor(name):
        raise BundleError(f"{where} {fault}")
    return name


def _fault_of_anchor(name: str) -> str | None:
    if _ANCHOR.fullmatch(name):
        return None
    return f"is {shown(name)}; expected 1 to 96 letters, digits, '.', '_' and '-', the first a letter or digit"


def is_file_name(name: str) -> bool:
    """Return whether ``name`` is a plain file name: ``[A-Za-z0-9][A-Za-z0-9._-]{0,254}``."""
    return _FILE.fullmatch(name) is not None


def check_file_name(name: str, where: str) -> str:
    """Return ``name`` if it names a file directly inside a bundle's directory and nothing else.

    Raises:
        BundleError: It has a slash, starts with a dot, or holds anything but letters, digits, '.', '_', '-'.
    """
    if not is_file_name(name):
        raise BundleError(f"{where} names the file {shown(name)}; expected a plain file name inside the bundle")
    return name


def name_an_expert(given: str | None, source: str, field: str = "name") -> str:
    """Return the name that a new expert gets: ``given`` in a ``field``, or one made of what its text is called.

    Raises:
        UsageError: No expert may bear it, or none can be made.
    """
    if given is None:
        return slug(source)
    if fault := _fault_of_expert(given):
        raise UsageError(fault, hint="take another name", field=field)
    return given


def name_an_anchor(given: str | None, source: str) -> str:
    """Return the name that a new anchor gets: ``given``, or what it is made of.

    Raises:
        UsageError: No anchor may bear it.
    """
    name = given or source
    if fault := _fault_of_anchor(name):
        raise UsageError(fault, hint="give another `name`", field="name")
    return name


def slug(text: str) -> str:
    """Return ``text``, for example a folder's name, as a closed expert's name.

    Raises:
        UsageError: Nothing usable is left, or what is left is the reserved name.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9_-]+", "-", plain).strip("-_")[:63].rstrip("-_")
    if not name or name == PUBLIC:
        raise UsageError(f"{shown(text)} gives no name for an expert", hint="give one with `name`")
    return name
