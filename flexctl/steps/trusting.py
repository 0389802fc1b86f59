"""Whom a command was told to trust."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Protocol

from flexctl.bundle.composition import Composition
from flexctl.errors import UsageError
from flexctl.trust.keys import require_sign
from flexctl.trust.owners import read_trust
from flexctl.trust.signing import Trust, refuse_unsigned

__all__ = ["SignedConfig", "TrustConfig", "refuse_untrusted", "trust_of"]


class TrustConfig(Protocol):
    """What a command's Config says about trust."""

    @property
    def trust(self) -> Path | None:
        """The trust file."""


class SignedConfig(TrustConfig, Protocol):
    """The same, of a command that adds experts."""

    @property
    def require_signed(self) -> bool:
        """Whether only experts with a signature of a trusted key are taken."""


def trust_of(config: TrustConfig, today: datetime.date | None) -> Trust | None:
    """Return whom to trust; None where no trust file was given.

    Args:
        config: Where it is.
        today: The day that validity is compared with; the real one if None.

    Raises:
        UsageError: The extra ``sign`` is missing, or the file is not there or wrong.
    """
    if config.trust is None:
        return None
    require_sign()
    return Trust(path=config.trust, owners=read_trust(config.trust), today=today or datetime.date.today())


def refuse_untrusted(config: SignedConfig, composition: Composition, trust: Trust | None) -> None:
    """Refuse experts that nobody trusted has signed, where that was asked for.

    Args:
        config: Asks for it, or not.
        composition: Whose experts.
        trust: As from ``trust_of``.

    Raises:
        UsageError: Nobody was said to be trusted.
        BundleError: An expert is not signed, or not by a key that may.
    """
    if not config.require_signed:
        return
    if trust is None:
        raise UsageError("needs to know whose keys count", hint="give `trust`", field="require_signed")
    refuse_unsigned(composition, trust)
