"""Changing a merged model: where the result goes, and what is said and shown on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flexctl import workspace
from flexctl.bundle.assembly import planned_bytes, write_merged
from flexctl.bundle.composition import Composition
from flexctl.bundle.merged import Merged, open_merged
from flexctl.bundle.store import check_directory_target, sweep
from flexctl.runtime import Reporter

__all__ = ["assemble", "open_to_change", "place_of_change", "warn_of_tuned"]


def open_to_change(source: Path, *, dry_run: bool) -> Merged:
    """Return a merged model that is to be changed.

    What killed commands left beside it is deleted first: a model that was replaced may be among that, with an expert
    that was to go.
    """
    if not dry_run:
        sweep(source)
    return open_merged(source)


def place_of_change(source: Path, output: Path | None) -> tuple[Path, bool]:
    """Return where a changed merged model goes, and whether that replaces a workspace's own without being told to.

    Args:
        source: The merged model that is changed.
        output: Where to write; None is in place.

    Returns:
        The target, and whether it is both the source and the merged model of the workspace that one stands in or
        that the source lies in. Those change in place; anything else that exists needs ``overwrite``.
    """
    target = output or source
    place = os.path.realpath(source)
    own = [workspace.find().merged, workspace.find(Path(place).parent).merged]
    return target, os.path.realpath(target) == place and place in map(os.path.realpath, own)


def warn_of_tuned(merged: Merged, reporter: Reporter) -> None:
    """Warn where a change takes the rows of a tuned router away."""
    if merged.manifest.router.tuned_with is not None:
        reporter.warn(f"{merged.path}: its router was tuned; the result has the owners' own rows again")


def assemble(
    target: Path,
    composition: Composition,
    *,
    overwrite: bool,
    trust_cache: bool,
    dry_run: bool,
    reporter: Reporter,
    ready: Callable[[Merged], object] = lambda _: None,
) -> tuple[str | None, int]:
    """Write a merged model with a progress bar, or only check that it could be written.

    Args:
        target: Directory to write.
        composition: What it is made of.
        overwrite: As for ``write_merged``.
        trust_cache: As for ``write_merged``.
        dry_run: Write nothing.
        reporter: Where progress goes.
        ready: As for ``write_merged``.

    Returns:
        Digest and bytes written; None and what the weights would take after a dry run.

    Raises:
        FlexctlError: As for ``write_merged``.
    """
    total = planned_bytes(composition)
    if dry_run:
        check_directory_target(target, kind="merged", overwrite=overwrite)
        return None, total
    with reporter.progress("writing", total, "bytes") as progress:
        model, written = write_merged(
            target, composition, overwrite=overwrite, trust_cache=trust_cache, advance=progress.advance, ready=ready
        )
    return model.digest, written
