"""What can go wrong, as one tree. Each class carries the exit code that the command line ends with.

FlexctlError            1  the command failed
  UsageError            2  a flag, a setting or an argument is wrong
  BundleError           3  a bundle is invalid, incompatible or fails verification
  Interrupted         130  the user stopped it
    Terminated        143  SIGTERM did, as schedulers send it

A message says what happened, with the value and the file; the hint says what to do about it. What a Config was
told is named by its field, never by a flag: ``field`` is what the error is about, and others stand in backquotes
(``give a smaller `seq_len` ``). The command line shows all of them as its flags.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

__all__ = ["BundleError", "FlexctlError", "Interrupted", "Saving", "Terminated", "UsageError", "system_error"]


class FlexctlError(Exception):
    """A failure that a person can act on.

    Args:
        message: What happened and what was expected, naming file and value.
        hint: What to do about it, a command where there is one.
        field: The field of the Config that it is about; the message then begins with it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None, *, field: str | None = None) -> None:
        self.message = message if field is None else f"{field}: {message}"
        super().__init__(self.message)
        self.hint = hint
        self.field = field


class UsageError(FlexctlError):
    """The command line, the environment or flexctl.toml asks for something that is not there."""

    exit_code = 2


class BundleError(FlexctlError):
    """A bundle is invalid, does not fit the others, or fails verification."""

    exit_code = 3


class Interrupted(FlexctlError):
    """The user stopped the command; what was written before is still whole."""

    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM stopped the command; what was written before is still whole."""

    exit_code = 143


def system_error(error: BaseException) -> OSError | None:
    """Return what the operating system said, where ``error`` is a Rust library's account of it; else None.

    safetensors and tokenizers end their messages with "(os error 28)".
    """
    found = re.search(r"\(os error (\d+)\)$", str(error).strip())
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


class Saving(AbstractContextManager[None]):
    """Let a Rust library write inside the ``with`` statement: what the system refuses is an OSError with the place.

    Args:
        path: What is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = None if error is None else system_error(error)
        if found is not None:
            found.filename = str(self._path)
            raise found from None
