"""The signed record that a removal or a replacement leaves for the owner."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flexctl.bundle import Merged
from flexctl.bundle.store import check_file_target, new_file
from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.steps.passphrase import PassphraseConfig, open_key
from flexctl.trust.records import record_path, record_statement, traces_of
from flexctl.trust.signing import seal

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

__all__ = ["RecordConfig", "Recorder", "Records", "recorded", "recorder"]


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
        target: Where the model that is left goes.
        traces: Expert -> the hashes of its tensors and rows.
        reason: Why they go.
        signer: The key.
    """

    before: Merged
    target: Path
    traces: dict[str, tuple[frozenset[str], frozenset[str]]]
    reason: str
    signer: CryptoSigner


class Records:
    """Records that are written while a model changes: before it does, so that no change is without its record."""

    def __init__(self, recorder: Recorder | None, act: str, today: datetime.date) -> None:
        self._recorder, self._act, self._today = recorder, act, today
        self._before: dict[Path, bytes | None] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that were written."""
        return tuple(self._before)

    def write(self, after: Merged) -> None:
        """Write a record for each expert beside the place that ``after``, the model that is left, will have."""
        told = self._recorder
        if told is None:
            return
        for name, traces in told.traces.items():
            payload = record_statement(
                told.before, traces, name, after, act=self._act, reason=told.reason, today=self._today
            )
            path = record_path(told.target, name)
            before = path.read_bytes() if path.exists() else None
            _write(path, seal(payload, told.signer))
            self._before[path] = before

    def take_back(self) -> None:
        """Put back what was there before, as nothing was changed."""
        for path, before in self._before.items():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                _write(path, before)


def _write(path: Path, data: bytes) -> None:
    with new_file(path, overwrite=True) as temporary:
        temporary.write_bytes(data)


@contextmanager
def recorded(recorder: Recorder | None, act: str, today: datetime.date) -> Iterator[Records]:
    """Give the records of a change that happens in the block; where it fails, there are none.

    Whoever is killed in the moment between the two leaves a record, and the model as it was. The record is then not
    true of that model, as ``verify`` says, and the next try asks for ``overwrite``.

    Args:
        recorder: What they need; None writes none.
        act: ``remove`` or ``replace``.
        today: The day that stands in them.
    """
    records = Records(recorder, act, today)
    done = False
    try:
        yield records
        done = True
    finally:
        if not done:
            records.take_back()


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
    if config.reason is None or not config.reason.strip():
        raise UsageError("signs a record, which says why", hint="give `reason`", field="key")
    for name in names:
        check_file_target(record_path(target, name), overwrite=config.overwrite)
    return Recorder(
        before=before,
        target=target,
        traces={name: traces_of(before, name) for name in names},
        reason=config.reason,
        signer=open_key(config.key, config, reporter),
    )
