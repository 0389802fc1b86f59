"""Canaries: made-up documents, of which a coin puts half into training, so that an audit can tell what training shows.

They lie in the run's own folder until it is done, then in one beside the expert, for its owner's eyes alone:
``planted.jsonl`` has those that were trained on, ``left-out.jsonl`` the others. Whoever knows which are which can
recognise the expert's training text, so the folder stays at home, and neither manifest nor run.json nor the expert's
file says that there are canaries.
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.store import own_file

__all__ = ["CanaryFolder", "hand_over", "plant_canaries"]

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_WORDS, _LEAST_SYLLABLES, _MOST_SYLLABLES = 32, 1, 3


@dataclass(frozen=True, slots=True)
class CanaryFolder:
    """Where an expert's canaries are; the folder need not exist."""

    path: Path

    @classmethod
    def beside(cls, expert: Path) -> CanaryFolder:
        """Return the folder of an expert by its file: ``law.st`` has ``law.canaries``."""
        return cls(expert.with_suffix(".canaries"))

    @property
    def planted(self) -> Path:
        """The canaries that are trained on."""
        return self.path / "planted.jsonl"

    @property
    def left_out(self) -> Path:
        """Those that are not."""
        return self.path / "left-out.jsonl"


def plant_canaries(folder: CanaryFolder, count: int, text_field: str, *, keep: bool) -> None:
    """Write ``count`` canaries, each planted or left out by a fair coin.

    Words and coins are from the system's secret entropy, never from a seed: whoever could make them again would know.

    Args:
        folder: Where to, until the run is done; what an earlier one wrote there is replaced.
        count: How many.
        text_field: The field of a line that holds the text.
        keep: Whether those that are there already are kept, as a run that goes on must.
    """
    if keep and folder.planted.is_file() and folder.left_out.is_file():
        return
    if folder.path.exists():
        shutil.rmtree(folder.path)
    folder.path.mkdir(parents=True, mode=0o700)
    with own_file(folder.planted) as planted, own_file(folder.left_out) as left_out:
        for _ in range(count):
            file = planted if secrets.randbelow(2) else left_out
            file.write((json.dumps({text_field: _canary()}) + "\n").encode())


def hand_over(made: CanaryFolder, folder: CanaryFolder) -> None:
    """Put the canaries of a run that is done where its expert is; those of the expert that was there before go.

    Args:
        made: Where they are; the folder around it is the run's own.
        folder: Where they belong.
    """
    if not made.left_out.is_file():
        return
    if folder.path.exists():
        folder.path.rename(made.path.with_name("replaced-canaries"))
    made.path.rename(folder.path)


def _canary() -> str:
    return " ".join(_word() for _ in range(_WORDS))


def _word() -> str:
    syllables = _LEAST_SYLLABLES + secrets.randbelow(_MOST_SYLLABLES - _LEAST_SYLLABLES + 1)
    return "".join(secrets.choice(_CONSONANTS) + secrets.choice(_VOWELS) for _ in range(syllables))
