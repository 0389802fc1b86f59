"""That an expert is gone: the signed record of its removal, held against the model that was left."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Protocol

from flexctl.bundle import Expert, Merged, open_bundle
from flexctl.bundle.checks import check_bundle
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import Reporter
from flexctl.steps.sources import localise
from flexctl.steps.trusting import TrustConfig, trust_of
from flexctl.trust.checks import signature_checks
from flexctl.trust.records import Absence, prove_record, read_record, record_path

__all__ = ["AbsenceConfig", "refuse_unproven", "show_absence"]


class AbsenceConfig(TrustConfig, Protocol):
    """What a command's Config says about an expert that is said to be gone."""

    @property
    def removed_from(self) -> Path | None:
        """The model that was left."""


def refuse_unproven(config: AbsenceConfig) -> None:
    """Refuse a model that is said to be without an expert where nothing could prove it.

    Raises:
        UsageError: It was not said whose keys count.
    """
    if config.removed_from is not None and config.trust is None:
        raise UsageError(
            "is proven by a signed record: say whose keys count", hint="give `trust`", field="removed_from"
        )


def show_absence(
    config: AbsenceConfig,
    name: str,
    digest: str,
    file: Expert | None,
    reporter: Reporter,
    *,
    today: datetime.date | None = None,
) -> Absence | None:
    """Return what the record beside the model that was left proves; None where no such model is given.

    The model is hashed, every byte, and must hold what its format promises. One that was made from the model that was
    left must be signed itself.

    Args:
        config: Where it is, and whom to trust.
        name: The expert.
        digest: Its digest: the record must be about this very one.
        file: Its owner's file, where that is at hand.
        reporter: Where progress goes.
        today: The day that trust is asked on; the real one if None.

    Raises:
        UsageError: There is no model or no record, or the record is about another expert.
        BundleError: The model is not what it promises, or the record does not hold.
    """
    trust = trust_of(config, today)
    if config.removed_from is None or trust is None:
        return None
    path = localise(config.removed_from, reporter)
    if not path.is_dir() or not isinstance(merged := open_bundle(path), Merged):
        raise UsageError(f"{path} is no merged model", field="removed_from")
    place = record_path(path, name)
    if not place.is_file():
        hint = f"flexctl remove {name} --tombstone --reason TEXT --key KEY writes one"
        raise UsageError(f"{place}: no such record", hint=hint, field="removed_from")
    record, envelope = read_record(place)
    if (record.expert.name, record.expert.digest) != (name, digest):
        raise UsageError(
            f"{place} is about {record.expert.name}, {record.expert.digest}; audited is {name}, {digest}",
            field="removed_from",
        )
    size = sum(item.stat().st_size for item in path.iterdir() if item.is_file())
    with reporter.progress(f"hashing {path}", size, "bytes") as progress:
        _, checks = check_bundle(
            path,
            anchor=None,
            absent={} if record.act == "replace" else {name: file},
            today=None,
            advance=progress.advance,
        )
    hint = f"flexctl verify {path} --record {place} --trust {config.trust} tells all"
    for check in (*checks, *signature_checks(path, trust, left_by=record)):
        if not check.ok:
            raise BundleError(f"{path}: {check.name}: {check.detail}", hint=hint)
    return prove_record(merged, place, record, envelope, trust)
