"""The signed record that a removal or a replacement leaves for the owner."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flexctl.bundle import Merged, open_merged
from flexctl.bundle.store import check_file_target, new_file
from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.steps.passphrase import PassphraseConfig, open_key
from flexctl.trust.records import record_path, record_statement, traces_of
from flexctl.trust.signing import seal

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = ["Recorder", "RecordConfig", "recorder"]


class RecordConfig(PassphraseConfig, Protocol):
    """What a command's Config says about a record."""

    @property
    def tombstone(self) -> bool:
        """Whether name and digest of what goes stay in the manifest."""

    @property
    def reason(self) -> str | None:
        """Why it goes."""

    @property
    def key(self) -> Path | None:
        """The key that signs the record; None is no record."""

    @property
    def overwrite(self) -> bool:
        """Whether a record that exists may be replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorder:
    """All that a record needs of the model as it was, taken before that changes.

    Attributes:
        before: The model with the experts.
        traces: Expert -> the hashes of its tensors and rows.
        reason: Why they go.
        signer: The key.
    """

    before: Merged
    traces: dict[str, tuple[frozenset[str], frozenset[str]]]
    reason: str
    signer: CryptoSigner

    def write(self, target: Path, act: str, today: datetime.date) -> tuple[Path, ...]:
        """Write a record for each expert beside the model that is left, and return their files."""
        after = open_merged(target)
        files = []
        for name, traces in self.traces.items():
            payload = record_statement(self.before, traces, name, after, act=act, reason=self.reason, today=today)
            files.append(record_path(target, name))
            with new_file(files[-1], overwrite=True) as temporary:
                temporary.write_bytes(seal(payload, self.signer))
        return tuple(files)


def recorder(
    before: Merged, names: Collection[str], target: Path, config: RecordConfig, reporter: Reporter
) -> Recorder | None:
    """Return what will write the records; None where none is asked for.

    Args:
        before: The model that the experts are taken out of.
        names: Who goes.
        target: Where the model that is left goes.
        config: What was asked for.
        reporter: Asks for the passphrase.

    Raises:
        UsageError: A record lacks its reason, its key or the tombstone, the key cannot be opened, or a file exists.
    """
    if config.key is None:
        if config.reason is not None:
            raise UsageError("stands in a record, which a key signs", hint="give `key`", field="reason")
        return None
    if not config.tombstone:
        hint = "give `tombstone`: later versions of the model show by it that they descend from this one"
        raise UsageError("signs a record, which needs a tombstone", hint=hint, field="key")
    if config.reason is None:
        raise UsageError("signs a record, which says why", hint="give `reason`", field="key")
    for name in names:
        check_file_target(record_path(target, name), overwrite=config.overwrite)
    return Recorder(
        before=before,
        traces={name: traces_of(before, name) for name in names},
        reason=config.reason,
        signer=open_key(config.key, config, reporter),
    )
