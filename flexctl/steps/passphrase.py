"""Where a key's passphrase comes from: a file, FLEXCTL_PASSPHRASE, or the user. Never the command line."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.trust import keys

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = ["PASSPHRASE", "PassphraseConfig", "known_passphrase", "new_passphrase", "open_key"]

PASSPHRASE = "FLEXCTL_PASSPHRASE"
_FEWEST, _MOST = 8, 1000


class PassphraseConfig(Protocol):
    """What a command's Config says about a passphrase."""

    @property
    def passphrase_file(self) -> Path | None:
        """File whose first line it is."""


def open_key(path: Path, config: PassphraseConfig, reporter: Reporter) -> CryptoSigner:
    """Return a private key, opened with the passphrase that the user gives.

    Raises:
        UsageError: The extra ``sign`` is missing, the file is no key, or the passphrase is not there or wrong.
    """
    keys.require_sign()
    keys.read_key_file(path)
    return keys.load_key(path, known_passphrase(path, config, reporter))


def known_passphrase(path: Path, config: PassphraseConfig, reporter: Reporter) -> str:
    """Return the passphrase of a key that there is.

    Raises:
        UsageError: None is given.
    """
    return _given(config, reporter) or _asked(reporter, f"Passphrase of {path}")


def new_passphrase(config: PassphraseConfig, reporter: Reporter) -> str:
    """Return the passphrase for a new key; one that is typed is asked for twice.

    Raises:
        UsageError: None is given, it is too short, or the two differ.
    """
    found = _given(config, reporter)
    if found is None:
        found = _asked(reporter, "Passphrase for the new key")
        if found != _asked(reporter, "The same again"):
            raise UsageError("the two passphrases differ")
    if len(found) < _FEWEST:
        raise UsageError(f"the passphrase has {len(found)} characters; expected at least {_FEWEST}")
    return found


def _given(config: PassphraseConfig, reporter: Reporter) -> str | None:
    """Return what the file or the environment has; None where neither is given."""
    path = config.passphrase_file
    if path is None:
        return os.environ.get(PASSPHRASE) or None
    if not path.is_file():
        raise UsageError(f"{path}: no such file", field="passphrase_file")
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        reporter.warn(f"{path}: others may read it; chmod 600 {path}")
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline(_MOST).removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no text in UTF-8", field="passphrase_file") from error
    if not line:
        raise UsageError(f"{path}: its first line is empty", field="passphrase_file")
    return line


def _asked(reporter: Reporter, question: str) -> str:
    found = reporter.ask_secret(question)
    if not found:
        raise UsageError("no passphrase is given", hint=f"set {PASSPHRASE}, or give `passphrase_file`")
    return found
