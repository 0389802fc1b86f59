"""Make a key pair: the private half encrypted at rest, the public half for those who trust it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import flags
from flexctl.bundle.store import check_file_target, sweep
from flexctl.errors import UsageError
from flexctl.options import Config
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.passphrase import new_passphrase
from flexctl.trust.keys import make_key, public_line, public_path, require_sign

__all__ = ["KeygenConfig", "KeygenResult", "keygen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KeygenConfig(Config):
    """Where to write.

    An ed25519 key. The passphrase is asked for, or comes from FLEXCTL_PASSPHRASE or a file, never from the
    command line. What is printed goes into the trust files of those who are to believe the key.

    Examples:
        flexctl keygen -o acme.key
    """

    output: Annotated[Path, flags.output("KEY", "File of the private key; KEY.pub goes beside it.")]
    passphrase_file: flags.PassphraseFile = None
    dry_run: flags.DryRun = False


@dataclass(frozen=True, kw_only=True, slots=True)
class KeygenResult:
    """What was made.

    Attributes:
        path: The private key: PEM, encrypted, readable by its owner alone.
        public_path: The public key.
        public_key: The same as a trust file has it; None after a dry run.
        key_id: How signatures name the key; None after a dry run.
        dry_run: Whether nothing was written.
    """

    path: Path
    public_path: Path
    public_key: str | None
    key_id: str | None
    dry_run: bool


def keygen(config: KeygenConfig, reporter: Reporter = SILENT) -> KeygenResult:
    """Make a key. One that exists is never replaced.

    Args:
        config: Where to write.
        reporter: Asks for the passphrase.

    Raises:
        UsageError: The extra ``sign`` is missing, a file exists, or there is no passphrase.
    """
    require_sign()
    for path in (config.output, public_path(config.output)):
        if not config.dry_run:
            sweep(path)
        if os.path.lexists(path):
            raise UsageError(f"{path} exists already, and a key is never replaced", hint="give another `output`")
        check_file_target(path, overwrite=False)
    passphrase = new_passphrase(config, reporter)
    key = None if config.dry_run else make_key(config.output, passphrase)
    return KeygenResult(
        path=config.output,
        public_path=public_path(config.output),
        public_key=None if key is None else public_line(key),
        key_id=None if key is None else key.keyid,
        dry_run=config.dry_run,
    )
