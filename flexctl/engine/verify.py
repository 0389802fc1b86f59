"""Verify a bundle: hash every byte again and check everything that its format promises."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from flexctl import flags, hub, workspace
from flexctl.bundle.anchor import Anchor, open_anchor
from flexctl.bundle.checks import Check
from flexctl.bundle.expert import Expert, open_expert
from flexctl.bundle.merged import Merged
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.signatures import Envelope
from flexctl.errors import BundleError, UsageError
from flexctl.options import MODEL, Config, flag
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.proof import check_all
from flexctl.steps.sources import localise
from flexctl.steps.trusting import trust_of
from flexctl.trust.checks import signature_checks
from flexctl.trust.records import Record, read_record, record_check
from flexctl.trust.signing import Trust

__all__ = ["VerifyConfig", "VerifyResult", "verify"]

Told = tuple[Record, Envelope]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig(Config):
    """What to verify.

    Exit code 3 when something does not hold.

    Examples:
        flexctl verify merged
        flexctl verify merged --absent law
        flexctl verify merged --trust trust.toml
        flexctl verify merged --absent law --record law.removed.json --trust trust.toml
        flexctl verify hf://acme/merged
    """

    path: flags.BundlePath
    absent: Annotated[
        tuple[str, ...],
        flag("NAME", "Prove that this expert, by name or file, is not inside; repeatable.", MODEL),
    ] = ()
    record: Annotated[
        Path | None, flag("FILE", "A removal record (NAME.removed.json), which must be true of this model.", MODEL)
    ] = None
    trust: flags.Trust = None
    anchor: flags.Anchor = None
    allow_expired: flags.AllowExpired = False


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What holds and what does not.

    Attributes:
        path: The bundle; text for one on the Hub.
        digest: Its digest; None if it cannot be opened.
        ok: Whether every check holds.
        checks: All that was checked.
    """

    path: Path | str
    digest: str | None
    ok: bool
    checks: tuple[Check, ...]

    @property
    def exit_code(self) -> int:
        """That of an invalid bundle where a check fails, else 0."""
        return 0 if self.ok else BundleError.exit_code


def verify(config: VerifyConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> VerifyResult:
    """Check a bundle. What does not hold is in the result, not raised.

    Args:
        config: What to verify.
        reporter: Where progress goes.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: There is nothing at a path, or the trust file or the record does not fit what is asked.
        BundleError: The record is none.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    path = localise(config.path, reporter)
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    trust = trust_of(config, today)
    told = _record(config, trust)
    digest, checks = check_all(
        path,
        config,
        reporter,
        today=today,
        anchor=_anchor(config, path, reporter),
        absent=_absents(config, told, reporter),
    )
    if digest is not None and trust is not None:
        checks += signature_checks(path, trust, left_by=told[0] if told else None)
        if told is not None:
            checks.append(_recorded(path, config.record, told, trust))
    shown = str(hub.parse(config.path)) if hub.is_remote(config.path) else path
    return VerifyResult(
        path=shown,
        digest=digest,
        ok=all(check.ok for check in checks),
        checks=tuple(_under(check, path, shown) for check in checks),
    )


def _anchor(config: VerifyConfig, path: Path, reporter: Reporter) -> Anchor | None:
    if config.anchor is not None:
        return open_anchor(localise(config.anchor, reporter))
    own = workspace.find().anchor
    return open_anchor(own) if own.is_dir() and not own.samefile(path) else None


def _record(config: VerifyConfig, trust: Trust | None) -> Told | None:
    """Return the record to check, if there is one."""
    if config.record is None:
        return None
    if trust is None:
        raise UsageError("is signed: say whose keys count", hint="give `trust`", field="record")
    told = read_record(config.record)
    name = told[0].expert.name
    if config.absent and name not in config.absent:
        raise UsageError(
            f"{config.record} is about {name}", hint=f"flexctl verify PATH --absent {name}", field="record"
        )
    return told


def _absents(config: VerifyConfig, told: Told | None, reporter: Reporter) -> dict[str, Expert | None]:
    """Return who must not be inside; one that was replaced is there under its name, and looked for by its record."""
    names = [*config.absent, *([told[0].expert.name] if told else [])]
    replaced = told[0].expert.name if told and told[0].act == "replace" else None
    return dict(_absent(name, reporter) for name in dict.fromkeys(names) if name != replaced)


def _recorded(path: Path, file: Path | None, told: Told, trust: Trust) -> Check:
    bundle = open_bundle(path)
    if file is None or not isinstance(bundle, Merged):
        raise UsageError(f"{path} is no merged model but an {bundle.manifest.kind}", field="record")
    return record_check(bundle, file, *told, trust)


def _under(check: Check, path: Path, shown: Path | str) -> Check:
    """Return a check that names the bundle as the user did, and not a place in the Hub's cache."""
    return replace(check, detail=check.detail.replace(str(path), str(shown)))


def _absent(name: str, reporter: Reporter) -> tuple[str, Expert | None]:
    """Return an expert's name, and the expert if its file is at hand: given, or in the workspace."""
    given = Path(name)
    if given.suffix == ".st" or hub.is_remote(given):
        expert = open_expert(localise(given, reporter))
        return expert.manifest.name, expert
    own = workspace.find().experts / f"{name}.st"
    return name, open_expert(own) if own.is_file() else None
