"""An expert's router rows, from a file or measured on its owner's passages, and what a manifest says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flexctl import routing, text
from flexctl.bundle import Anchor, RouterInfo, open_router_file
from flexctl.bundle.router import RouterFile
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.steps.anchored import Anchored

if TYPE_CHECKING:
    from torch import nn


__all__ = ["RowConfig", "given_rows", "measured_rows", "names_a_file", "recipe_of"]


class RowConfig(Protocol):
    """What a command's Config says about router rows."""

    @property
    def router(self) -> str:
        """A kind of rows, or a file that holds some."""

    @property
    def encoder(self) -> str | None:
        """sentence-transformers model for the encoder kind."""

    @property
    def own_covariance(self) -> float:
        """Share of the owner's own covariance, for the discriminant."""

    @property
    def special_as_text(self) -> bool:
        """Whether special tokens that stand in text are plain text."""


def recipe_of(config: RowConfig) -> routing.RowRecipe:
    """Return how rows of a kind are made, after checking it.

    Raises:
        UsageError: There is no such kind, or it needs an encoder.
    """
    recipe = routing.RowRecipe(
        kind=config.router,
        own_covariance=config.own_covariance,
        encoder=config.encoder,
        special_as_text=config.special_as_text,
    )
    recipe.check()
    return recipe


def names_a_file(router: str) -> bool:
    """Return whether ``router`` is a file with rows rather than a kind: a name that ends in .st, or that exists."""
    return router.endswith(".st") or Path(router).exists()


def given_rows(config: RowConfig, anchor: Anchor) -> RouterFile | None:
    """Return the file that ``router`` names, or None where it names a kind; either is checked.

    Raises:
        UsageError: There is no such file or kind.
        BundleError: The file holds no rows for this anchor.
    """
    if names_a_file(config.router):
        return open_router_file(Path(config.router), anchor)
    recipe_of(config)
    return None


def measured_rows(
    config: RowConfig,
    base: Anchored,
    reader: nn.Module,
    own: Sequence[str],
    public: Callable[[], Sequence[str]],
    reporter: Reporter,
    world: World = ALONE,
) -> tuple[routing.Rows, RouterInfo]:
    """Return rows of a kind for an owner's passages, and what a manifest says of them.

    Args:
        config: Which kind.
        base: The anchor.
        reader: The same as a model.
        own: The owner's passages, two at least.
        public: Returns public passages; only the encoder kind asks for them, as they are decoded from a large sample.
        reporter: Hears of progress.
        world: The processes that share the work.

    Raises:
        UsageError: There are too few passages, or the encoder cannot be loaded.
    """
    recipe = recipe_of(config)
    theirs = public() if recipe.kind == "encoder" else ()
    rows = routing.embed_rows(
        recipe, reader, base.space, own, theirs, partial(text.frame_passages, base.tokenizer), reporter, world
    )
    info = RouterInfo(
        kind=recipe.kind,
        samples=len(own),
        encoder=recipe.encoder_name,
        trained=False,
        bias=tuple(float(bias) for bias in rows.bias),
        own_covariance=recipe.own_covariance if recipe.kind == "discriminant" else None,
    )
    return rows, info
