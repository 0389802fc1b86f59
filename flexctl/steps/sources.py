"""Bundles wherever they are: on this machine, or named as hf://OWNER/NAME and fetched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flexctl import hub
from flexctl.bundle.runnable import Runnable, open_runnable
from flexctl.runtime import Reporter

__all__ = ["localise", "runnable"]


def localise(path: Path, reporter: Reporter) -> Path:
    """Return where a bundle lies on this machine: ``path`` itself, or what was fetched of an address on the Hub.

    Raises:
        UsageError, BundleError, FlexctlError: As ``hub.look``, ``hub.manifest_of`` and ``hub.fetch``.
    """
    if not hub.is_remote(path):
        return path
    remote = hub.look(hub.parse(path))
    hub.manifest_of(remote)
    return hub.fetch(remote, reporter)


def runnable(path: Path, anchor: Path, reporter: Reporter) -> Runnable:
    """Return the model behind a bundle that is here or on the Hub, by ``bundle.runnable.open_runnable``.

    Args:
        path: An anchor, an expert or a merged model.
        anchor: The anchor, which an expert runs beside; fetched for an expert alone.
        reporter: Where progress goes.

    Returns:
        What to run; its path is ``path``, as the user named it.

    Raises:
        UsageError, BundleError, FlexctlError: As ``localise`` and ``open_runnable``.
    """
    here = localise(path, reporter)
    found = open_runnable(here, localise(anchor, reporter) if here.is_file() else anchor)
    return replace(found, path=str(hub.parse(path))) if hub.is_remote(path) else found
