"""Where an answer stops: at a text that it must not say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

__all__ = ["Stops"]


class _Said(Protocol):
    """A piece of an answer: a frozen dataclass with the text that it adds."""

    @property
    def text(self) -> str:
        """What it adds to the text."""


Said = TypeVar("Said", bound=_Said)


class Stops(Generic[Said]):
    """Lets pieces of an answer through up to the first stop, and holds back what may be the beginning of one.

    Args:
        texts: At each of these the answer stops; none is empty.

    Attributes:
        found: Whether one has come.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.found = False
        self._texts = texts
        self._held: list[Said] = []

    def add(self, piece: Said) -> list[Said]:
        """Return the pieces that are final once this one has come; the last of an answer is cut where it stops."""
        self._held.append(piece)
        text = "".join(held.text for held in self._held)
        ends = [text.index(stop) for stop in self._texts if stop in text]
        if ends:
            self.found = True
            return self._cut(min(ends))
        return self._release(len(text) - max((_overlap(text, stop) for stop in self._texts), default=0))

    def rest(self) -> list[Said]:
        """Return what is held when an answer ends by itself."""
        return self._release(sum(len(held.text) for held in self._held))

    def _release(self, end: int) -> list[Said]:
        """Return the held pieces that end by ``end``, in characters."""
        count = characters = 0
        for held in self._held:
            characters += len(held.text)
            if characters > end:
                break
            count += 1
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _cut(self, end: int) -> list[Said]:
        """Return the held pieces up to ``end``, the last one shortened to it; nothing is held any more."""
        kept = []
        for held in self._held:
            if end <= 0:
                break
            kept.append(replace(held, text=held.text[:end]))  # type: ignore[type-var]
            end -= len(held.text)
        self._held = []
        return kept


def _overlap(text: str, stop: str) -> int:
    """Return how much of the end of ``text`` is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
