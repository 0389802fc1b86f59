"""Where the time of a command goes: seconds between what it says and shows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexctl.runtime import Progress, SilentReporter


class _Unseen:
    def advance(self, amount: float, **figures: float | str) -> None:
        del amount, figures


class Timeline(SilentReporter):
    """A reporter that writes down how long each task took, and what lay before, between and after them.

    Args:
        clock: Seconds; by default those of the wall.

    Attributes:
        seconds: By name, in their order.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._last = clock, clock()

    def mark(self, name: str) -> None:
        """Count the time since the last mark as ``name``'s."""
        now = self._clock()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def note(self, text: str, /) -> None:
        """What led up to a note is called after it."""
        self.mark(f"before: {text[:40]}")

    @contextmanager
    def progress(self, title: str, _total: float, _unit: str, /) -> Iterator[Progress]:
        """A task, and what led up to it."""
        self.mark(f"before: {title}")
        yield _Unseen()
        self.mark(title)
