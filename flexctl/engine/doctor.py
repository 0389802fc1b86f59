"""Say what this machine offers flexctl, and what is missing."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from flexctl import flags, model, workspace
from flexctl.errors import FlexctlError
from flexctl.options import Config
from flexctl.runtime import SILENT, Reporter, busy_cores, cache_folder, meminfo_bytes, memory_bytes
from flexctl.steps.speed import bfloat16_pays, matmul_gflops_per_s

__all__ = ["CacheFolder", "DoctorConfig", "DoctorResult", "doctor"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig(Config):
    """What ``doctor`` is asked to do.

    It asks the Hub for nothing, once, and waits 3 s at most; HF_HUB_OFFLINE=1 keeps it from that.

    Examples:
        flexctl doctor
        flexctl doctor --threads 1 --json
    """

    threads: flags.Threads = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheFolder:
    """A folder with what can be made or fetched again."""

    name: str
    path: Path
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorResult:
    """What ``doctor`` found. Where a required package is missing, only what needs none of them.

    Attributes:
        path: The workspace.
        versions: Python and each required package -> its version; None where it is missing.
        missing: Required packages that are missing.
        extras: Optional extra -> its packages that are missing; none where it is installed.
        devices: What torch can run on.
        matmul_gflops_per_s: dtype -> billions of operations a second in matrix products on the CPU. They decide whether
            models that are stored in bfloat16 run in it here.
        auto_dtype: What ``dtype`` auto is here for such a model, as measured the first time that it was asked for.
        cpus: Processors.
        threads: CPU threads that torch uses.
        load: Processes that ran or waited to run, mean over the last minute; None where nobody counts them.
        memory_bytes: Of the machine.
        memory_available_bytes: What new processes can have; None where the system does not say.
        disk_free_bytes: Where the workspace is.
        hub: Address of the Hub.
        hub_state: Whether it can be reached.
        caches: Folders with what can be made or fetched again.
    """

    path: Path
    versions: dict[str, str | None]
    missing: list[str]
    extras: dict[str, list[str]]
    cpus: int
    load: float | None
    memory_bytes: int
    memory_available_bytes: int | None
    disk_free_bytes: int
    devices: list[str] = field(default_factory=list)
    matmul_gflops_per_s: dict[str, float] = field(default_factory=dict)
    auto_dtype: str | None = None
    threads: int | None = None
    hub: str | None = None
    hub_state: str | None = None
    caches: list[CacheFolder] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 where something required is missing, else 0."""
        return FlexctlError.exit_code if self.missing else 0


def doctor(config: DoctorConfig, reporter: Reporter = SILENT) -> DoctorResult:
    """Look at this machine.

    Args:
        config: How many threads are to be used.
        reporter: Hears a warning where other work keeps the cores busy.

    Returns:
        What it offers, and what is missing.
    """
    root = workspace.find().root
    needed, optional = _requirements(metadata.requires("flexctl") or [])
    versions = {package: _version(package) for package in needed}
    missing = [package for package, version in versions.items() if version is None]
    advice = busy_cores(config.threads)
    if advice:
        reporter.warn(advice)
    found = DoctorResult(
        path=root,
        versions={"python": ".".join(map(str, sys.version_info[:3])), "flexctl": _version("flexctl"), **versions},
        missing=missing,
        extras={extra: [name for name in names if _version(name) is None] for extra, names in optional.items()},
        cpus=os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        memory_bytes=memory_bytes(),
        memory_available_bytes=meminfo_bytes("MemAvailable"),
        disk_free_bytes=shutil.disk_usage(root).free,
    )
    return found if missing else _with_libraries(found, config)


def _with_libraries(found: DoctorResult, config: DoctorConfig) -> DoctorResult:
    """Return what was found with all that the required packages know."""
    import torch

    from flexctl.hub.reach import endpoint, reach

    model.set_threads(config.threads)
    return replace(
        found,
        devices=_devices(),
        matmul_gflops_per_s=matmul_gflops_per_s(),
        auto_dtype="bfloat16" if torch.cuda.is_available() or bfloat16_pays() else "float32",
        threads=torch.get_num_threads(),
        hub=endpoint(),
        hub_state=reach(),
        caches=_caches(),
    )


def _requirements(lines: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of required packages, and those of each extra for users, from a package's requirements."""
    needed, optional = [], dict[str, list[str]]()
    for line in lines:
        name = re.split(r"[^\w.-]", line)[0]
        _, _, marker = line.partition(";")
        extra = re.search(r"extra == [\"'](\w+)[\"']", marker)
        if extra is None and not marker:
            needed.append(name)
        elif extra is not None and extra[1] != "dev":
            optional.setdefault(extra[1], []).append(name)
    return needed, optional


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return ["cpu", *(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in cards)]


def _caches() -> list[CacheFolder]:
    from flexctl.hub.reach import cache_place

    folders: Mapping[str, Path] = {"flexctl": cache_folder(), "hub": cache_place()}
    return [CacheFolder(name=name, path=path, size_bytes=_size_bytes(path)) for name, path in folders.items()]


def _size_bytes(folder: Path) -> int:
    """Return what the files below a folder hold; links count as what they are, and a file that goes as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            total += file.lstat().st_size if os.path.lexists(file) else 0
    return total
