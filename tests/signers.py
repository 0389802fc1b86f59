"""Keys and trust files for tests; passphrases that cost nothing to try."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexctl.engine.keygen import KeygenConfig, keygen
from flexctl.errors import FlexctlError
from flexctl.steps.passphrase import PASSPHRASE
from flexctl.trust import keys

SECRET = "correct horse battery"


def cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let keys open at once, and their passphrase be known."""
    monkeypatch.setattr(keys, "KDF_ROUNDS", 1)
    monkeypatch.setenv(PASSPHRASE, SECRET)


def make_key(name: str) -> tuple[Path, str]:
    """Make NAME.key and return it with its entry in a trust file."""
    made = keygen(KeygenConfig(output=Path(f"{name}.key")))
    return made.path, f'[[owners]]\nname = "{name}"\nkey = "{made.public_key}"\n'


def make_trust(*entries: str, path: str = "trust.toml") -> Path:
    """Write a trust file of entries as from ``make_key``, each perhaps with more lines."""
    Path(path).write_text("\n".join(entries), encoding="utf-8")
    return Path(path)


def refused_in_one_line(error: FlexctlError) -> None:
    """Hold a refusal of any input to one line."""
    assert "\n" not in error.message
