"""What a run can know, say and hear: its reporter, its memory, its software, its cache, signals."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

__all__ = [
    "SILENT",
    "Parts",
    "Progress",
    "Reporter",
    "SilentReporter",
    "busy_cores",
    "cache_folder",
    "counted",
    "handling",
    "meminfo_bytes",
    "memory_bytes",
    "note_busy_cores",
    "peak_rss_bytes",
    "software_versions",
]

Item = TypeVar("Item")


class Progress(Protocol):
    """One running task's bar or log line."""

    def advance(self, amount: float, **figures: float | str) -> None:
        """Move on by ``amount`` units and show ``figures`` (name=value) beside the bar."""


class Reporter(Protocol):
    """Where the engine says what it is doing and hears the user: the command line. The Python API is silent."""

    def note(self, text: str, /) -> None:
        """Say one line that a person may want to read."""

    def warn(self, text: str, /) -> None:
        """Say one line that a person should act on."""

    def progress(self, title: str, total: float, unit: str, /) -> AbstractContextManager[Progress]:
        """Show a task of ``total`` units ("tokens", "bytes", "documents") while the block runs."""

    def write(self, text: str, by: int = 0, /) -> None:
        """Show a piece of an answer at once; ``by`` is the index of the expert that led in it, 0 for nobody's."""

    def read(self) -> str | None:
        """Return the next line that the user says, without its end; None where there are no more."""

    def ask_secret(self, question: str, /) -> str | None:
        """Return what the user types after a question, which no screen shows; None where nobody is asked."""

    def stoppable(self) -> AbstractContextManager[object]:
        """Let the user stop what runs inside the ``with`` statement, and go on behind it."""


class SilentReporter:
    """A reporter that says nothing."""

    def note(self, _text: str, /) -> None:
        """Say nothing."""

    def warn(self, _text: str, /) -> None:
        """Say nothing."""

    def progress(self, _title: str, _total: float, _unit: str, /) -> AbstractContextManager[Progress]:
        """Show nothing."""
        return nullcontext(_SilentProgress())

    def write(self, _text: str, _by: int = 0, /) -> None:
        """Show nothing."""

    def read(self) -> str | None:
        """Nobody is there."""
        return None

    def ask_secret(self, _question: str, /) -> str | None:
        """Nobody is asked."""
        return None

    def stoppable(self) -> AbstractContextManager[object]:
        """Nobody stops it."""
        return nullcontext()


class _SilentProgress:
    def advance(self, amount: float, **figures: float | str) -> None:
        del amount, figures


SILENT = SilentReporter()


class Parts:
    """A reporter whose tasks come one after the other and are parts of a whole.

    Each is shown as far as the whole is, so that the time left is that of all that are still to come.

    Args:
        reporter: Shows them, and hears everything else.
    """

    def __init__(self, reporter: Reporter) -> None:
        self.note, self.warn = reporter.note, reporter.warn
        self.write, self.read, self.stoppable = reporter.write, reporter.read, reporter.stoppable
        self.ask_secret = reporter.ask_secret
        self._reporter = reporter
        self._total = self._done = 0.0

    def expect(self, total: float) -> None:
        """Count on tasks of ``total`` units more."""
        self._total += total

    @contextmanager
    def progress(self, title: str, total: float, unit: str, /) -> Iterator[Progress]:
        """Show one of the tasks that were expected while the block runs."""
        with self._reporter.progress(title, self._total, unit) as bar:
            bar.advance(self._done)
            yield bar
        self._done += total


def counted(items: Iterable[Item], bar: Progress) -> Iterator[Item]:
    """Yield items; the bar moves on by one after each."""
    for item in items:
        yield item
        bar.advance(1)


@contextmanager
def handling(handler: Callable[[int, FrameType | None], Any] | signal.Handlers, *numbers: int) -> Iterator[None]:
    """Let signals go to ``handler`` inside the ``with`` statement, where it stands in the main thread, which has them.

    Args:
        handler: As for ``signal.signal``.
        numbers: Of the signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, found in before.items():
            signal.signal(number, found)


def busy_cores(threads: int | None) -> str | None:
    """Return what to do where other work keeps the cores busy; None where nothing does, or ``threads`` were chosen.

    On busy cores torch's threads wait for each other at every step, and one thread is faster than several. They are
    chosen by OMP_NUM_THREADS too, which torch goes by.
    """
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads is not None or os.environ.get("OMP_NUM_THREADS") or cores == 1 or load <= cores:
        return None
    return f"the load is {load:.1f} on {cores} cores, where torch's threads wait for each other: use `threads` 1"


def note_busy_cores(threads: int | None, reporter: Reporter) -> None:
    """Say once, as a training begins, what ``busy_cores`` advises."""
    advice = busy_cores(threads)
    if advice:
        reporter.note(advice)


def memory_bytes() -> int:
    """Return this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def meminfo_bytes(figure: str) -> int | None:
    """Return a figure of /proc/meminfo, such as ``MemAvailable``; None where there is none."""
    return _figure_bytes(Path("/proc/meminfo"), figure)


def peak_rss_bytes() -> int:
    """Return the largest resident size that this process has had so far, in bytes.

    Linux says it in /proc; getrusage there starts from what the parent had before the fork.
    """
    peak = _figure_bytes(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _figure_bytes(file: Path, figure: str) -> int | None:
    found = re.search(rf"^{figure}:\s+(\d+) kB", file.read_text(), re.MULTILINE) if file.exists() else None
    return int(found[1]) * 1024 if found else None


def software_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes, by package name."""
    packages = ("flexctl", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": ".".join(map(str, sys.version_info[:3])), **_installed(packages)}


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cache_folder() -> Path:
    """Return flexctl's folder in the user's cache directory; it need not exist."""
    home = Path("~/Library/Caches" if sys.platform == "darwin" else "~/.cache").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or home) / "flexctl"
