"""Files that git-lfs left a pointer for: a clone without git-lfs has a few lines of text in their place."""

from __future__ import annotations

from flexctl.errors import BundleError

__all__ = ["refuse_pointer"]

_BEGINNING = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(start: bytes, where: str) -> None:
    """Refuse a file that is a git-lfs pointer.

    Args:
        start: How it begins, 40 bytes or more.
        where: File, for the message.

    Raises:
        BundleError: It is one.
    """
    if start.startswith(_BEGINNING):
        raise BundleError(
            f"{where}: is a pointer of git-lfs, not the file itself", hint="run git lfs pull there, or download it"
        )
