"""Verify a bundle: hash every byte again and check everything that its format promises."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexctl import workspace
from flexctl.bundle.anchor import Anchor, open_anchor
from flexctl.bundle.checks import check_bundle
from flexctl.bundle.expert import Expert, open_expert
from flexctl.errors import UsageError
from flexctl.runtime import SILENT, Reporter

__all__ = ["VerifyConfig", "VerifyResult", "verify"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """What to verify.

    Attributes:
        path: An anchor's or merged model's directory, an expert's or router's file.
        absent: Experts that a merged model must not hold: names, or files of experts.
        anchor: The anchor that it must be made of; if None the workspace's, if there is one.
        allow_expired: Take experts whose rights are over.
    """

    path: Path
    absent: tuple[str, ...] = ()
    anchor: Path | None = None
    allow_expired: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyResult:
    """What holds and what does not.

    Attributes:
        path: The bundle.
        digest: Its digest; None if it cannot be opened.
        ok: Whether every check holds.
        checks: {name, ok, detail} each.
    """

    path: Path
    digest: str | None
    ok: bool
    checks: tuple[Mapping[str, Any], ...]


def verify(config: VerifyConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> VerifyResult:
    """Check a bundle. What does not hold is in the result, not raised.

    Args:
        config: What to verify.
        reporter: Where progress goes.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: There is nothing at a path.
    """
    path = config.path
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    files = list(path.iterdir()) if path.is_dir() else [path]
    total = sum(file.stat().st_size for file in files if file.is_file())
    with reporter.progress("hashing", total, "bytes") as progress:
        digest, checks = check_bundle(
            path,
            anchor=_anchor(config),
            absent=dict(map(_absent, config.absent)),
            today=None if config.allow_expired else today or datetime.date.today(),
            advance=progress.advance,
        )
    return VerifyResult(
        path=path,
        digest=digest,
        ok=all(check.ok for check in checks),
        checks=tuple(asdict(check) for check in checks),
    )


def _anchor(config: VerifyConfig) -> Anchor | None:
    if config.anchor is not None:
        return open_anchor(config.anchor)
    own = workspace.find().anchor
    return open_anchor(own) if own.is_dir() and not own.samefile(config.path) else None


def _absent(name: str) -> tuple[str, Expert | None]:
    """Return an expert's name, and the expert if its file is at hand: given, or in the workspace."""
    given = Path(name)
    if given.suffix == ".st":
        expert = open_expert(given)
        return expert.manifest.name, expert
    own = workspace.find().experts / f"{name}.st"
    return name, open_expert(own) if own.is_file() else None
