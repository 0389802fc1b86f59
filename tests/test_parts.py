"""Tasks that are parts of a whole are shown on its scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexctl.runtime import Parts, SilentReporter


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Any]:
        self.heard.append((title, total, unit))
        yield self

    def advance(self, amount: float) -> None:
        self.heard.append(amount)

    def note(self, text: str) -> None:
        self.heard.append(text)


def test_each_part_begins_where_the_one_before_ended() -> None:
    listener = Listener()
    parts = Parts(listener)
    parts.expect(30)
    parts.expect(10)
    for title, total in (("a", 30), ("b", 10)):
        with parts.progress(title, total, "bytes") as bar:
            bar.advance(total)
    parts.note("done")
    assert listener.heard == [("a", 40, "bytes"), 0, 30, ("b", 40, "bytes"), 30, 10, "done"]
