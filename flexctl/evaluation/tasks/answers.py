"""When a generated answer counts: the same words, the same number, or how much of the same text."""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher
from fractions import Fraction

__all__ = ["edit_similarity", "first_words", "last_number", "same_words"]

_ARTICLES = ("a", "an", "the")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def same_words(found: str, wanted: str) -> bool:
    """Return whether two short answers are the same but for case, punctuation, articles and spaces."""
    return _words(found) == _words(wanted)


def _words(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    words = kept.split() or text.split()
    return [word for word in words if word not in _ARTICLES] or words


def first_words(text: str, count: int) -> str:
    """Return the first ``count`` words of a text."""
    return " ".join(text.split()[:count])


def last_number(text: str) -> Fraction | None:
    """Return the last number in a text, commas between thousands left out; None where there is none."""
    found = _NUMBER.findall(text)
    return Fraction(found[-1].replace(",", "")) if found else None


def edit_similarity(found: str, wanted: str) -> float:
    """Return how alike two texts are, from 0 to 1: twice the characters in matching blocks over those of both.

    Source: Ratcliff and Obershelp's ratio, as Python's difflib computes it.
    """
    return SequenceMatcher(None, found.strip(), wanted.strip(), autojunk=False).ratio()
