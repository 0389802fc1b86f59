"""Say which experts of a merged model a purpose or the calendar rules out, and the command that removes them."""

from __future__ import annotations

import datetime
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import workspace
from flexctl.bundle import Merged, forbidden, open_bundle, rights_of
from flexctl.bundle.licenses import conflicts
from flexctl.errors import BundleError, UsageError
from flexctl.options import RIGHTS, Config, argument, flag
from flexctl.runtime import SILENT, Reporter

__all__ = ["CheckRightsConfig", "CheckRightsResult", "RuledOut", "check_rights"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRightsConfig(Config):
    """What to ask.

    Reads the rights that each owner gave; an owner who listed no purpose did not restrict it. Exit code 3 when an
    expert must be left out. What a license means is for a lawyer.

    Examples:
        flexctl check-rights merged --purpose commercial
    """

    path: Annotated[Path | None, argument("MERGED", "Merged model (default: the workspace's).")] = None
    purpose: Annotated[
        tuple[str, ...], flag("TEXT", "What the model is to be used for; repeatable: all must be allowed.", RIGHTS)
    ] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RuledOut:
    """An expert that must be left out.

    Attributes:
        name: Its name.
        reason: Why, in words.
        contact: Whom to ask; None where the owner named nobody.
    """

    name: str
    reason: str
    contact: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckRightsResult:
    """Who may stay.

    Attributes:
        path: The model.
        digest: Its digest.
        purpose: What was asked for; none is the calendar alone.
        allowed: Closed experts that may stay.
        ruled_out: Those that may not.
        conflicts: What of the licenses does not go together, as far as their ids tell.
        remedy: The command that removes those that may not stay; None where all may.
    """

    path: Path
    digest: str
    purpose: tuple[str, ...]
    allowed: tuple[str, ...]
    ruled_out: tuple[RuledOut, ...]
    conflicts: tuple[str, ...]
    remedy: str | None

    @property
    def exit_code(self) -> int:
        """That of an invalid bundle where an expert must be left out, else 0."""
        return BundleError.exit_code if self.ruled_out else 0


def check_rights(
    config: CheckRightsConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None
) -> CheckRightsResult:
    """Compare the owners' rights with a purpose and a day. Nothing is hashed: verify is for belief.

    Args:
        config: The model, and the purpose.
        reporter: Not needed; every command takes one.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: There is no such model.
        BundleError: It is not valid.
    """
    del reporter
    path, day = config.path or workspace.find().merged, today or datetime.date.today()
    merged = open_bundle(path)
    if not isinstance(merged, Merged):
        raise UsageError(f"{path} is no merged model but an {merged.manifest.kind}")
    rights = rights_of(merged)
    reasons: dict[str, str] = {}
    for purpose in config.purpose or (None,):
        reasons = {**forbidden(rights, purpose, day), **reasons}
    contacts = {entry.name: entry.contact for entry in merged.manifest.experts}
    return CheckRightsResult(
        path=path,
        digest=merged.digest,
        purpose=config.purpose,
        allowed=tuple(name for name in merged.names if name not in reasons),
        ruled_out=tuple(RuledOut(name=n, reason=reasons[n], contact=contacts[n]) for n in merged.names if n in reasons),
        conflicts=tuple(conflicts([right for right in rights if right.name not in reasons])),
        remedy=shlex.join(["flexctl", "remove", *sorted(reasons), "--from", str(path)]) if reasons else None,
    )
