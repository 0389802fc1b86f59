"""Public text in the dress of program code: the words of a passage, in the ways that code puts words.

Router rows have to know in which directions text of other kinds varies, and code moves most in those in which prose
hardly does. What looks like code is enough for that, so no text of other kinds has to be found (docs/how-it-works.md,
section 4).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

__all__ = ["as_code"]

_OPENERS = ("def ", "function ", "class ", "if ", "for ", "while ", "")
_ENDS_OF_OPENERS = (":", " {", " then")
_CLOSERS = ("}", "end", "return")
_COMMENTS = ("#", "//", "--")
_OPERATORS = ("+", "-", "*", "==", "!=", "<", ">=", "&&", "|", "and", "or")
_DEEPEST, _WIDEST_COMMENT = 3, 80
_WORD = r"[^\W\d_]{1,20}"
"""Letters, so many at most: some scripts put no space between words."""


def as_code(passage: str, seed: int) -> str:
    """Return lines that look like code of no one language, about as long as ``passage`` and of its words.

    Args:
        passage: Text of any kind and script.
        seed: The same gives the same lines.
    """
    return _Dress(passage, random.Random(seed)).lines(len(passage))


class _Dress:
    """A passage's words and how they are put.

    Args:
        passage: As for ``as_code``.
        chance: What decides, from here on.
    """

    def __init__(self, passage: str, chance: random.Random) -> None:
        self._words = re.findall(_WORD, passage) or ["x"]
        self._sentences = [each for each in passage.split(". ") if each.strip()] or ["x"]
        self._chance = chance

    def lines(self, length: int) -> str:
        """Return lines of at least so many characters, one at the least."""
        depth, written = 0, 0
        found: list[str] = []
        while written < length or not found:
            line, further = self._line()
            found.append("    " * depth + line)
            written += len(found[-1]) + 1
            depth = min(max(depth + further, 0), _DEEPEST)
        return "\n".join(found)

    def _line(self) -> tuple[str, int]:
        """Return a line, and by how much those after it stand further in."""
        (kind,) = self._chance.choices(("comment", "opens", "closes", "assigns", "says"), (12, 18, 15, 35, 20))
        if kind == "comment":
            return f"{self._one(_COMMENTS)} {self._one(self._sentences)[:_WIDEST_COMMENT]}", 0
        if kind == "opens":
            return f"{self._one(_OPENERS)}{self._name()}({self._list(self._name)}){self._one(_ENDS_OF_OPENERS)}", 1
        if kind == "closes":
            return self._one(_CLOSERS), -1
        target = f"{self._name()} = " if kind == "assigns" else ""
        return f"{target}{self._value()}{self._one(('', ';'))}", 0

    def _value(self, depth: int = 0) -> str:
        def inner() -> str:
            return self._value(depth + 1)

        (kind,) = self._chance.choices(("leaf", "call", "operation", "index", "attribute"), (35, 25, 20, 10, 10))
        if kind == "leaf" or depth == _DEEPEST:
            return self._one((self._name(), self._name(), str(self._chance.randrange(300)), self._string()))
        if kind == "call":
            return f"{self._name()}({self._list(inner)})"
        if kind == "operation":
            return f"{inner()} {self._one(_OPERATORS)} {inner()}"
        return f"{self._name()}[{inner()}]" if kind == "index" else f"{self._name()}.{self._name()}"

    def _list(self, make: Callable[[], str]) -> str:
        return ", ".join(make() for _ in range(self._chance.randrange(4)))

    def _name(self) -> str:
        words = self._some_words(3)
        first, *others = words
        camel = first.lower() + "".join(word.title() for word in others)
        return self._one(("_".join(words).lower(), "".join(words).capitalize(), camel, first.lower()))

    def _string(self) -> str:
        return f'"{" ".join(self._some_words(4))}"'

    def _some_words(self, most: int) -> list[str]:
        return [self._one(self._words) for _ in range(self._chance.randint(1, most))]

    def _one(self, of: Sequence[str]) -> str:
        return self._chance.choice(of)
