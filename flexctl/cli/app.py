"""The way in: read the command line, call the engine once, show the result. The one place that catches."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
import warnings
from contextlib import nullcontext
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn, cast

import typer

import flexctl
from flexctl.cli.output import Output
from flexctl.cli.parsing import Call, make_app
from flexctl.commands import COMMANDS
from flexctl.config import resolve
from flexctl.errors import FlexctlError, Interrupted, Terminated, UsageError, system_error
from flexctl.options import shown_names
from flexctl.processes import launched, refuse_many
from flexctl.runtime import handling

__all__ = ["main", "run"]

_BROKEN_PIPE = 141
_COMPLETING = "_FLEXCTL_COMPLETE"
"""Variable with which a shell asks what may come next."""

_HINTS = {
    errno.ENOSPC: "free some space, or write to another disk with -o",
    errno.EDQUOT: "your quota is used up: free some space, or write to another disk with -o",
    errno.EFBIG: "the file system or ulimit -f allows no larger file; write to another place with -o",
    errno.EROFS: "write to another place with -o",
    errno.EACCES: "choose a place with -o that you may write to",
}

# The libraries beneath talk to the terminal by themselves, and phone home, unless told before import.
_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Sigterm(BaseException):
    """SIGTERM came where nothing that a command does listens for it itself; nobody but ``main`` catches it."""


def run() -> None:
    """Run the console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A model's text and a user's file names hold characters that not every terminal has.
        cast(TextIOWrapper, stream).reconfigure(errors="backslashreplace")
    cast(TextIOWrapper, sys.stdin).reconfigure(errors="replace")
    code = main()
    # All is done: who presses Ctrl-C again would only see how an interpreter ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _open_closed_streams() -> None:
    """Lead the streams that the caller closed to nowhere, so that no file which a command opens takes their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: Arguments after the program's name; the process's own when None.

    Returns:
        0 done, 1 failed, 2 usage or configuration, 3 an invalid bundle, 130 interrupted, 141 the reader went,
        143 stopped by SIGTERM.
    """
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    arguments = _joined(list(sys.argv[1:] if argv is None else argv))
    output = Output(json="--json" in arguments)
    try:
        rank, processes = launched()
        # What is wrong with a command line is wrong in every process that got it; the first one says so.
        output = Output(json="--json" in arguments, is_mute=rank > 0)
        call = _read(arguments)
        if call is None:
            return 0
        config_class = getattr(flexctl, call.row.config)
        manner = call.manner
        names = shown_names(config_class)
        if not call.row.is_shared:
            refuse_many(call.row.shown)
        output = Output(json=manner.json, quiet=manner.quiet, verbose=manner.verbose, names=names, process=rank)
        # A launcher's SIGTERM ends all its processes, and one that somebody else hears already is theirs.
        hears = processes == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with handling(_end, signal.SIGTERM) if hears else nullcontext():
            return _execute(call, config_class, output)
    except BrokenPipeError:
        _discard_output()
        return _BROKEN_PIPE
    except (Exception, KeyboardInterrupt, _Sigterm) as error:
        if os.environ.get("FLEXCTL_DEBUG"):
            traceback.print_exc()
        return output.error(*_explain(error))


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End the command as Ctrl-C does, so that it clears up behind itself; launchers may send two."""
    signal.signal(number, signal.SIG_IGN)
    raise _Sigterm


def _joined(arguments: list[str]) -> list[str]:
    """Return arguments with a command's name of two words as one: ``trace find`` is ``trace-find``."""
    name = "-".join(arguments[:2])
    return [name, *arguments[2:]] if len(arguments) > 1 and name in {row.shown for row in COMMANDS} else arguments


def _read(arguments: list[str]) -> Call | None:
    """Return what the command line asks for, or None where Typer has answered it (--help, --version).

    Without arguments the answer is the help page.
    """
    asked = {row.shown for row in COMMANDS} if _COMPLETING in os.environ else arguments
    app = make_app(COMMANDS, asked)
    call = app(args=arguments or ["--help"], prog_name="flexctl", standalone_mode=False)
    return call if isinstance(call, Call) else None


def _execute(call: Call, config_class: type[Any], output: Output) -> int:
    config = resolve(config_class, call.command, call.given)
    result = getattr(flexctl, call.command)(config, output.reporter)
    output.result(call.command, result)
    return int(getattr(result, "exit_code", 0))


def _explain(error: BaseException) -> tuple[str, FlexctlError]:
    """Return the error's type and the error as a person should read it."""
    if isinstance(error, FlexctlError):
        return type(error).__name__, error
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", Interrupted("interrupted")
    if isinstance(error, _Sigterm):
        return "Terminated", Terminated("stopped by SIGTERM")
    if isinstance(error, typer.TyperException):
        return "UsageError", _usage_error(error)
    error = system_error(error) or error
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return type(error).__name__, FlexctlError(f"{error.strerror}{place}", _HINTS.get(error.errno or 0))
    message = f"unexpected {type(error).__name__}: {error}"
    return type(error).__name__, FlexctlError(message, hint="set FLEXCTL_DEBUG=1 to see where it comes from")


def _usage_error(error: typer.TyperException) -> UsageError:
    context = getattr(error, "ctx", None)
    program = context.command_path if context is not None else "flexctl"
    return UsageError(error.format_message(), hint=f"{program} --help")


def _discard_output() -> None:
    """Point both streams at nothing, so that the interpreter's own last flush has nowhere to fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
