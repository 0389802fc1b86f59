"""Writing so that, whatever moment a command dies at, the target is the old artefact or the new one, whole.

Everything is written into a hidden sibling, flushed to disk, and moved over the target in one step. A sibling's name
carries its machine and process, so that what a killed process left behind is swept by the next one.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import itertools
import os
import platform
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from flexctl import workspace
from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.manifest import MANIFEST_FILE, TOLERATED
from flexctl.errors import BundleError, FlexctlError, UsageError

__all__ = [
    "append_range",
    "check_directory_target",
    "copy_range",
    "new_directory",
    "new_file",
    "place_of_change",
    "require_space",
]

COPY_BYTES = 1 << 20
KERNEL_COPY_BYTES = 1 << 28
# What copy_file_range says where the two files' places do not support it.
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}
_WEIGHTS = ("model*.safetensors", "router-*.safetensors", "model.safetensors.index.json")
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_counter = itertools.count()


@contextmanager
def new_file(path: Path, *, overwrite: bool, beside: Path | None = None) -> Iterator[Path]:
    """Give a temporary sibling to write, and make it ``path`` when the block ends without an error.

    Args:
        path: Target; missing parents are made. A symbolic link stays, what it points to is replaced.
        overwrite: Whether a file that exists may be replaced.
        beside: Whose sibling is written; the target's if None. For a file inside a bundle it is the bundle's, so that
            a process that is killed leaves nothing inside.

    Raises:
        UsageError: The target exists and may not be replaced, or is a directory.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UsageError(f"{path}: is a directory; expected a file to write")
    _refuse_existing(target, overwrite)
    with _parents(target), _sibling(Path(os.path.realpath(beside or target))) as temporary:
        yield temporary
        _flush(temporary)
        _refuse_existing(target, overwrite)
        os.replace(temporary, target)
        _flush(target.parent)


@contextmanager
def new_directory(path: Path, *, kind: str, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling directory to fill, and make it ``path`` when the block ends without an error.

    Args:
        path: Target; missing parents are made. A symbolic link stays, what it points to is replaced.
        kind: What the directory will be, ``anchor`` or ``merged``. Only a bundle of the same kind is ever replaced.
        overwrite: Whether a bundle that exists may be replaced. It is deleted after the swap.

    Raises:
        UsageError: The target exists and may not be replaced.
        FlexctlError: The platform or the file system cannot swap two directories in one step.
    """
    target = check_directory_target(path, kind=kind, overwrite=overwrite)
    replaces = os.path.lexists(target)
    with _parents(target), _sibling(target) as temporary:
        temporary.mkdir()
        if replaces:
            _try_exchange(temporary)
        yield temporary
        for item in temporary.iterdir():
            _flush(item)
        _flush(temporary)
        if replaces:
            _exchange(temporary, target)
        else:
            _refuse_existing(target, overwrite=False)
            os.rename(temporary, target)
        _flush(target.parent)
        if replaces:
            # Not left to the tidying below, which forgives: what was removed must be gone.
            shutil.rmtree(temporary)


def check_directory_target(path: Path, *, kind: str, overwrite: bool) -> Path:
    """Return ``path`` with symbolic links resolved, if ``new_directory`` may write there.

    Raises:
        UsageError: It exists and may not be replaced, or it holds something that is no part of such a bundle and
            would be deleted with it.
    """
    target = Path(os.path.realpath(path))
    _refuse_existing(target, overwrite)
    if not os.path.lexists(target):
        return target
    try:
        manifest = parse_json(read_bytes(target / MANIFEST_FILE), str(target / MANIFEST_FILE))
    except BundleError:
        manifest = None
    if not isinstance(manifest, dict) or manifest.get("kind") != kind:
        raise UsageError(
            f"{target}: holds no {kind} bundle; flexctl replaces nothing else",
            hint="choose another place with `output`",
        )
    known = (*map(str, manifest.get("files") or ()), MANIFEST_FILE, *TOLERATED, *_WEIGHTS)
    for item in sorted(target.iterdir()):
        if item.is_dir() or not any(fnmatch.fnmatchcase(item.name, pattern) for pattern in known):
            raise UsageError(f"{item}: would be deleted with the bundle that is replaced", hint="move it away first")
    return target


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


def require_space(path: Path, needed: int) -> None:
    """Refuse to start when the file system of ``path`` has fewer than ``needed`` bytes free.

    Raises:
        FlexctlError: It has.
    """
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise FlexctlError(
            f"{path}: needs {needed} bytes, the disk has {free} free",
            hint="free some space, or write elsewhere with `output`",
        )


def append_range(source: Path, start: int, output: BinaryIO, count: int) -> None:
    """Copy ``count`` bytes of a file, from ``start`` on, to where ``output`` stands, by ``copy_range``."""
    output.flush()
    offset = output.tell()
    copy_range(source, start, output.fileno(), offset, count)
    output.seek(offset + count)


def copy_range(source: Path, source_start: int, target: int, target_start: int, count: int) -> None:
    """Copy bytes between files, in the kernel where it can, else through a buffer of 1 MiB.

    Args:
        source: File to read.
        source_start: First byte of it.
        target: File descriptor to write.
        target_start: Where the first byte goes.
        count: How many bytes.

    Raises:
        BundleError: The source ends too early.
    """
    descriptor = os.open(source, os.O_RDONLY)
    try:
        done = 0
        in_kernel = hasattr(os, "copy_file_range")
        while done < count:
            step = 0
            if in_kernel:
                step = _copy_in_kernel(descriptor, source_start + done, target, target_start + done, count - done)
                in_kernel = step > 0
            if step == 0:
                block = os.pread(descriptor, min(COPY_BYTES, count - done), source_start + done)
                step = os.pwrite(target, block, target_start + done)
            if step == 0:
                raise BundleError(f"{source}: is truncated: it ends before byte {source_start + count}")
            done += step
    finally:
        os.close(descriptor)


def _copy_in_kernel(source: int, source_start: int, target: int, target_start: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, min(count, KERNEL_COPY_BYTES), source_start, target_start)
    except OSError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
        return 0


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target}: exists already", hint="choose another `output`, or give `overwrite`")


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make missing parents; take them away again when the block fails."""
    missing = list(itertools.takewhile(lambda parent: not parent.exists(), target.parents))
    target.parent.mkdir(parents=True, exist_ok=True)
    done = False
    try:
        yield
        done = True
    finally:
        for parent in () if done else missing:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _sibling(target: Path) -> Iterator[Path]:
    """Give an unused hidden name beside ``target``; whatever has it when the block ends is deleted."""
    _sweep(target)
    temporary = target.with_name(f".{target.name}.{_MACHINE}-{os.getpid()}-{next(_counter)}.tmp")
    try:
        yield temporary
    finally:
        _delete(temporary)


def _sweep(target: Path) -> None:
    """Delete what killed processes of this machine left beside ``target``."""
    prefix = f".{target.name}.{_MACHINE}-"
    for item in target.parent.iterdir():
        if item.name.startswith(prefix) and item.name.endswith(".tmp"):
            pid = item.name[len(prefix) :].split("-")[0]
            if pid.isdigit() and not _is_alive(int(pid)):
                _delete(item)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _delete(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item, ignore_errors=True)
    else:
        item.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _try_exchange(directory: Path) -> None:
    """Fail before the work, not after it, where directories cannot be swapped."""
    first, second = directory / "first", directory / "second"
    first.mkdir()
    second.mkdir()
    _exchange(first, second)
    first.rmdir()
    second.rmdir()


def _exchange(first: Path, second: Path) -> None:
    """Swap two directories in one step (renameat2 RENAME_EXCHANGE, renamex_np RENAME_SWAP)."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(first), os.fsencode(second)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        here, exchange = -100, 2
        failed = library.renameat2(here, names[0], here, names[1], exchange)
    elif sys.platform == "darwin":
        swap = 2
        failed = library.renamex_np(names[0], names[1], swap)
    else:
        raise FlexctlError(
            f"{second}: this platform cannot replace a directory in one step", hint="write elsewhere with `output`"
        )
    if failed:
        reason = os.strerror(ctypes.get_errno())
        raise FlexctlError(
            f"{second}: this file system cannot replace a directory in one step ({reason})",
            hint="write elsewhere with `output`",
        )
