"""The one place that prints: results on stdout; progress, notes, warnings and errors on stderr."""

from __future__ import annotations

import dataclasses
import getpass
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

import flexctl
from flexctl.cli.text import expert_colour, local, named, paint, printable, progress_figures, progress_line
from flexctl.cli.views import render
from flexctl.errors import FlexctlError
from flexctl.processes import Echo
from flexctl.runtime import SILENT, Progress, Reporter, SilentReporter

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

__all__ = ["SCHEMA_VERSION", "Output", "print_text", "print_version"]

SCHEMA_VERSION = 1
"""Of the objects that --json prints."""

_LINE_EVERY_S = 5.0


class Output:
    """What one run of a command says, and how.

    Args:
        json: One object on stdout with what was warned of inside, or one with the error on stderr; no progress.
        quiet: Nothing on stderr but errors.
        verbose: Every field of the result.
        names: Field of the command's Config -> how the command line calls it, in what the engine says.
        process: Number of this process among those that share the run; all but the first say nothing but errors.
        is_mute: Whether it does not even say errors.
    """

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        verbose: bool = False,
        names: Mapping[str, str] = MappingProxyType({}),
        process: int = 0,
        is_mute: bool = False,
    ) -> None:
        self._process, self._is_mute = process, is_mute
        self._json = json
        self._quiet = quiet
        self._verbose = verbose
        self._names = names
        self._warnings: list[str] = []
        self._answer = _Answer()

    @cached_property
    def reporter(self) -> Reporter:
        """Where the engine says what it is doing."""
        if self._process:
            return SILENT
        if self._json:
            return _JsonReporter(self._names, self._warnings)
        if self._quiet:
            return _LineReporter(self._names, self._answer, is_quiet=True)
        if sys.stderr.isatty():
            return _BarReporter(self._names, self._answer)
        return _LineReporter(self._names, self._answer)

    def result(self, command: str, result: Any) -> None:
        """Print a command's Result."""
        if self._process:
            return
        if self._json:
            head = {"schema_version": SCHEMA_VERSION, "command": command.replace("_", "-")}
            fields = head | _plain(dataclasses.asdict(result)) | {"warnings": self._warnings}
            _write(json.dumps(fields, allow_nan=False), sys.stdout)
            return
        self._answer.end()
        text = render(command, result, verbose=self._verbose, colour=_has_colour(sys.stdout))
        if text:
            _write(text, sys.stdout)

    def error(self, kind: str, error: FlexctlError) -> int:
        """Print an error of type ``kind`` and return its exit code. What another process has told of is not said."""
        if self._is_mute or isinstance(error, Echo):
            return error.exit_code
        message = named(error.message, self._names)
        if error.field is not None and error.field in self._names:
            message = self._names[error.field] + message.removeprefix(error.field)
        hint = error.hint and named(error.hint, self._names)
        if self._process:
            message = f"process {self._process}: {message}"
        if self._json:
            fields = {
                "type": kind,
                "message": message,
                "hint": hint,
                "exit_code": error.exit_code,
                "warnings": self._warnings,
            }
            _write(json.dumps({"error": fields}), sys.stderr)
        else:
            self._answer.end()
            _write_labelled("error", message)
            if hint:
                _write_labelled("hint", hint)
        return error.exit_code


def print_version() -> None:
    """Print the program's name and version."""
    print_text(f"flexctl {flexctl.__version__}")


def print_text(text: str) -> None:
    """Print text that was asked for in place of a result, such as a help page."""
    _write(text, sys.stdout)


class _Answer:
    """An answer on stdout, as it is written."""

    def __init__(self) -> None:
        self._is_open = False

    def write(self, text: str, by: int) -> None:
        shown = printable(text)
        if text:
            _write(paint(shown, expert_colour(by)) if by and _has_colour(sys.stdout) else shown, sys.stdout, end="")
            self._is_open = not text.endswith("\n")

    def end(self) -> None:
        """End the line that was begun."""
        if self._is_open:
            _write("", sys.stdout)
        self._is_open = False


class _TextReporter(Reporter):
    """What reporters for people have in common: answers on stdout, lines from stdin."""

    def __init__(self, names: Mapping[str, str], answer: _Answer) -> None:
        self._names, self._answer = names, answer

    def write(self, text: str, by: int = 0) -> None:
        self._answer.write(text, by)

    def read(self) -> str | None:
        is_live = _is_live()
        if is_live and sys.stdout.isatty():
            # input() then lets the user edit the line.
            with suppress(ImportError):
                importlib.import_module("readline")
        while True:
            try:
                return input("> " if is_live and sys.stdout.isatty() else "")
            except EOFError:
                if is_live:
                    _write("", sys.stdout)
                return None
            except KeyboardInterrupt:
                if not is_live:
                    raise
                _write("\nCtrl-D leaves", sys.stderr)

    def ask_secret(self, question: str, /) -> str | None:
        return _typed_secret(question)

    def stoppable(self) -> AbstractContextManager[object]:
        return suppress(KeyboardInterrupt) if _is_live() else nullcontext()


class _JsonReporter(SilentReporter):
    """Keeps warnings for the one object, and reads lines."""

    def __init__(self, names: Mapping[str, str], warnings: list[str]) -> None:
        self._names, self._warnings = names, warnings

    def warn(self, text: str) -> None:
        self._warnings.append(named(text, self._names))

    def read(self) -> str | None:
        try:
            return input()
        except EOFError:
            return None

    def ask_secret(self, question: str, /) -> str | None:
        return _typed_secret(question)


class _LineReporter(_TextReporter):
    """Plain lines; a running task says one every few seconds, and one at its end if it had said any."""

    def __init__(self, names: Mapping[str, str], answer: _Answer, *, is_quiet: bool = False) -> None:
        super().__init__(names, answer)
        self._is_quiet = is_quiet

    def note(self, text: str) -> None:
        if not self._is_quiet:
            _write(printable(local(named(text, self._names))), sys.stderr)

    def warn(self, text: str) -> None:
        if not self._is_quiet:
            _write_labelled("warning", named(text, self._names))

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Progress]:
        task = _Lines(title, total, unit, silent=self._is_quiet)
        yield task
        task.finish()


class _Lines:
    """One task as a line every few seconds."""

    def __init__(self, title: str, total: float, unit: str, *, silent: bool) -> None:
        self._title, self._total, self._unit, self._silent = title, total, unit, silent
        self._done = 0.0
        self._figures: dict[str, float | str] = {}
        self._said_s = time.monotonic()
        self._has_spoken = False
        # Pace is measured from the first step on: a resumed task jumps ahead there.
        self._first: tuple[float, float] | None = None

    def advance(self, amount: float, **figures: float | str) -> None:
        now_s = time.monotonic()
        self._done += amount
        self._figures |= figures
        self._first = self._first or (now_s, self._done)
        if now_s - self._said_s >= _LINE_EVERY_S:
            self._say(now_s)

    def finish(self) -> None:
        if self._has_spoken:
            self._say(time.monotonic())

    def _say(self, now_s: float) -> None:
        self._said_s, self._has_spoken = now_s, True
        if not self._silent:
            figures = progress_figures(self._done, self._unit, self._figures)
            share = self._done / self._total if self._total else None
            _write(progress_line(self._title, figures, share, self._left_s(now_s)), sys.stderr)

    def _left_s(self, now_s: float) -> float | None:
        if self._first is None or self._done <= self._first[1]:
            return None
        start_s, start = self._first
        return (now_s - start_s) * (self._total - self._done) / (self._done - start)


class _BarReporter(_TextReporter):
    """Bars on a terminal, all in one display however tasks are nested; lines go above it."""

    def __init__(self, names: Mapping[str, str], answer: _Answer) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(compact=True),
        )
        super().__init__(names, answer)
        self._bars = Bars(*columns, console=console, transient=True)
        self._running = 0

    def note(self, text: str) -> None:
        self._bars.console.print(printable(local(named(text, self._names))))

    def warn(self, text: str) -> None:
        self._bars.console.print(f"warning: {printable(local(named(text, self._names)))}", style="yellow")

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Progress]:
        if not self._running:
            self._bars.start()
        self._running += 1
        task = self._bars.add_task(title, total=total or None, figures="")
        try:
            yield _Bar(self._bars, task, unit)
        finally:
            self._bars.remove_task(task)
            self._running -= 1
            if not self._running:
                self._bars.stop()


class _Bar:
    """One task of the display."""

    def __init__(self, bars: Bars, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit
        self._done = 0.0
        self._figures: dict[str, float | str] = {}

    def advance(self, amount: float, **figures: float | str) -> None:
        self._done += amount
        self._figures |= figures
        shown = "  ".join(progress_figures(self._done, self._unit, self._figures))
        self._bars.update(self._task, advance=amount, figures=shown)


def _write(text: str, stream: TextIO, end: str = "\n") -> None:
    print(text, end=end, file=stream, flush=True)


def _write_labelled(label: str, text: str) -> None:
    shown = f"{label}:"
    if _has_colour(sys.stderr):
        shown = paint(shown, {"error": "1;31", "warning": "1;33", "hint": "1"}[label])
    _write(f"{shown} {printable(local(text))}", sys.stderr)


def _typed_secret(question: str) -> str | None:
    """Return what the user types on the terminal without being shown; None where stdin is no terminal."""
    if not _is_live():
        return None
    try:
        return getpass.getpass(f"{question}: ")
    except EOFError:
        return None


def _is_live() -> bool:
    """Return whether a person types the lines."""
    return sys.stdin.isatty()


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: paths as text, tuples as lists, no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
