"""What an owner says of their text, from a command's flags into the expert's manifest."""

from __future__ import annotations

import datetime
from typing import Protocol

from flexctl.bundle import DataInfo
from flexctl.bundle.manifest import has_expired
from flexctl.runtime import Reporter

__all__ = ["TermsConfig", "data_info", "warn_of_expired"]


class TermsConfig(Protocol):
    """What a command's Config says about the rights in a text."""

    @property
    def license(self) -> str | None:
        """SPDX id or other name."""

    @property
    def purpose(self) -> tuple[str, ...]:
        """What it may be used for."""

    @property
    def expires(self) -> str | None:
        """Last day of the rights, YYYY-MM-DD."""

    @property
    def label(self) -> str | None:
        """A name for the text."""

    @property
    def contact(self) -> str | None:
        """Whom to ask."""


def warn_of_expired(config: TermsConfig, reporter: Reporter) -> None:
    """Warn where the rights are over already."""
    if has_expired(config.expires, datetime.date.today()):
        reporter.warn(f"`expires`: {config.expires} is past; merge will refuse the expert")


def data_info(config: TermsConfig, *, documents: int | None, tokens: int | None, num_bytes: int | None) -> DataInfo:
    """Return the manifest's account of a text.

    Args:
        config: The terms that it comes under.
        documents: How many there are. None, as of the next two, where a guarantee keeps it.
        tokens: In all of them.
        num_bytes: Of their text in UTF-8.
    """
    return DataInfo(
        documents=documents,
        tokens=tokens,
        bytes=num_bytes,
        label=config.label,
        license=config.license,
        purposes=config.purpose,
        expires=config.expires,
        contact=config.contact,
    )
