"""What a run can know and say: its reporter, its memory, its software."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Protocol

__all__ = ["SILENT", "Progress", "Reporter", "SilentReporter", "peak_rss_bytes", "software_versions"]


class Progress(Protocol):
    """One running task's bar or log line."""

    def advance(self, amount: float, **figures: float | str) -> None:
        """Move on by ``amount`` units and show ``figures`` (name=value) beside the bar."""


class Reporter(Protocol):
    """Where the engine says what it is doing. The command line shows it; the Python API is silent."""

    def note(self, text: str) -> None:
        """Say one line that a person may want to read."""

    def warn(self, text: str) -> None:
        """Say one line that a person should act on."""

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Progress]:
        """Show a task of ``total`` units ("tokens", "bytes", "documents") while the block runs."""
        yield _SilentProgress()


class _SilentProgress:
    def advance(self, amount: float, **figures: float | str) -> None:
        del amount, figures


class SilentReporter(Reporter):
    """Say nothing."""

    def note(self, text: str) -> None:
        del text

    def warn(self, text: str) -> None:
        del text

    @contextmanager
    def progress(self, title: str, total: float, unit: str) -> Iterator[Progress]:
        del title, total, unit
        yield _SilentProgress()


SILENT = SilentReporter()


def peak_rss_bytes() -> int:
    """Return the largest resident size that this process has had so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def software_versions() -> dict[str, str]:
    """Return the versions that decide what a run computes, by package name."""
    packages = ("flexctl", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": ".".join(map(str, sys.version_info[:3])), **_installed(packages)}


def _installed(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
