"""The anchor that a command works against, wherever it is, and what of it is read when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from flexctl import model, routing, text, workspace
from flexctl.bundle import Anchor, open_anchor
from flexctl.runtime import Reporter
from flexctl.steps.sources import localise

__all__ = ["AnchorConfig", "Anchored", "open_anchored"]


class AnchorConfig(Protocol):
    """What a command's Config says about the anchor, and how its tokenizer reads text."""

    @property
    def anchor(self) -> Path | None:
        """Its directory or address on the Hub; None is the workspace's."""

    @property
    def special_as_text(self) -> bool:
        """Whether special tokens that stand in text are plain text."""


@dataclass(frozen=True, kw_only=True)
class Anchored:
    """An anchor, and its parts as modules that run have them, each read once.

    Attributes:
        anchor: The bundle.
        special_as_text: Whether its tokenizer reads special tokens that stand in text as plain text.
    """

    anchor: Anchor
    special_as_text: bool

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return model.load_tokenizer(self.anchor.path, special_as_text=self.special_as_text)

    @cached_property
    def space(self) -> routing.RouterSpace:
        """Its statistics of router inputs on public text."""
        return routing.RouterSpace.from_tensors(self.anchor.router_space())

    @cached_property
    def sample(self) -> text.PublicSample:
        """Its public sample."""
        return text.PublicSample.from_tensors(self.anchor.public_sample())


def open_anchored(config: AnchorConfig, reporter: Reporter) -> Anchored:
    """Return the anchor that a command names, or the workspace's.

    Raises:
        UsageError: There is none.
        BundleError: It is not valid, or was adopted without public text.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    anchor = open_anchor(localise(config.anchor or workspace.find().anchor, reporter))
    anchor.refuse_uncalibrated()
    return Anchored(anchor=anchor, special_as_text=config.special_as_text)
