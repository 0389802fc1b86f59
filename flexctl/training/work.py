"""The folder that a training run works in: one run at a time, and nothing left behind but what ``resume`` needs.

The kernel holds the lock and frees it when the process ends, however it ends. The process id in the lock's file is for
people.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flexctl.errors import FlexctlError, Interrupted, UsageError
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter

if sys.platform != "win32":
    import fcntl

__all__ = ["has_checkpoints", "refuse_busy", "working_folder"]

_LOCK = "lock"


@contextmanager
def working_folder(path: Path, reporter: Reporter, world: World = ALONE) -> Iterator[Path]:
    """Make ``path`` for what a run needs on the way, its checkpoints in ``path``/checkpoints, and hold it.

    The folder is the user's alone, as text lies in it. It goes when the run is done, and when it fails with nothing
    that ``resume`` could go on from. Of a run that was stopped all stays: under a guarantee, the key of its noise.

    Args:
        path: The folder; missing parents are made.
        reporter: Warned where the platform or the file system has no locks, so that nothing keeps a second run out.
        world: The processes of the run; the writer holds it for all.

    Raises:
        UsageError: Another run holds it.
    """
    if not world.is_writer:
        world.by_writer(lambda: None)
        yield path
        return
    with _held(path, reporter):
        world.by_writer(lambda: None)
        try:
            yield path
        except (FlexctlError, OSError) as error:
            if not isinstance(error, Interrupted) and not has_checkpoints(path):
                _empty(path)
            raise
        _empty(path)


def refuse_busy(path: Path) -> None:
    """Refuse a working folder that another run holds, before any work and under ``dry_run``.

    Raises:
        UsageError: One does; the message names its process.
    """
    with suppress(FileNotFoundError):
        descriptor = os.open(path / _LOCK, os.O_RDWR)
        try:
            _try_lock(descriptor, path)
        finally:
            os.close(descriptor)


def has_checkpoints(path: Path) -> bool:
    """Return whether a working folder holds something that ``resume`` could go on from."""
    return any(path.glob("checkpoints/*"))


@contextmanager
def _held(path: Path, reporter: Reporter) -> Iterator[None]:
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
    descriptor = _lock(path, reporter)
    done = False
    try:
        yield
        done = True
    finally:
        # The name goes while the lock is held: whoever opens it from now on makes a file of its own.
        (path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            for folder in (path, *(() if done else missing)):
                folder.rmdir()  # unless something is to stay, or the next run has moved in
        os.close(descriptor)


def _lock(path: Path, reporter: Reporter) -> int:
    """Return a descriptor that holds the lock for as long as it is open."""
    while True:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the run before took the folder away in this moment
        try:
            locked = _try_lock(descriptor, path)
        except UsageError:
            os.close(descriptor)
            raise
        if _is_file(descriptor, path / _LOCK):
            break
        os.close(descriptor)
    if not locked:
        reporter.warn(f"{path}: there are no file locks here; start no other run with this target until this one ends")
    os.truncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
    return descriptor


def _try_lock(descriptor: int, path: Path) -> bool:
    """Return whether the lock is held now; False where there are none.

    Raises:
        UsageError: Another process holds it.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "of another run"
        raise UsageError(
            f"{path}: is in use by process {holder}",
            hint="wait until that run ends, stop it, or write elsewhere with `output`",
        ) from None
    except OSError:
        return False
    return True


def _is_file(descriptor: int, path: Path) -> bool:
    """Return whether ``path`` still is the open file, which the run before may have taken away."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _empty(path: Path) -> None:
    for item in path.iterdir():
        if item.name == _LOCK:
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
