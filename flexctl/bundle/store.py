"""Writing so that, whatever moment a command dies at, the target is the old artefact or the new one, whole.

Everything is written into a hidden sibling, flushed to disk, and moved over the target in one step. A sibling's name
carries its machine and process, so that what a killed process left behind is swept by the next one.

One exception: an empty folder that cannot be replaced (a mount point, a folder in one that may not be written to, the
current folder) is filled. What goes into it is written in a hidden folder inside, and its files move out one after the
other, the manifest last: whoever is killed in that moment leaves a folder that is no bundle yet.
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

from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.manifest import MANIFEST_FILE, TOLERATED
from flexctl.bundle.names import shown
from flexctl.errors import BundleError, FlexctlError, UsageError

__all__ = [
    "check_directory_target",
    "check_file_target",
    "new_directory",
    "new_file",
    "own_file",
    "place_of_work",
    "require_space",
    "sweep",
]

_WEIGHTS = ("model*.safetensors", "router-*.safetensors", "model.safetensors.index.json")
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_counter = itertools.count()
# The most that a sibling's name, and that of NAME.run.json, has beyond the target's.
_AFFIX = "-" * 40
_MAKE = os.W_OK | os.X_OK
_EXISTS = "give another place, or `overwrite` to replace it"
_ELSEWHERE = "choose another place or name with `output`"
# A full disk, a full quota, a file larger than is allowed.
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


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
    place = target if beside is None else Path(os.path.realpath(beside))
    if target.is_dir():
        raise UsageError(f"{path}: is a directory; expected a file to write")
    _refuse_existing(target, overwrite)
    beside_it = _sibling(place if _may_have_siblings(place) else target)
    with _parents(target), beside_it as temporary, _named(target, temporary):
        yield temporary
        _flush(temporary)
        _refuse_existing(target, overwrite)
        os.replace(temporary, target)
        _flush(target.parent)


@contextmanager
def new_directory(path: Path, *, kind: str, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling directory to fill, and make it ``path`` when the block ends without an error.

    Args:
        path: Target; missing parents are made. A symbolic link stays, what it points to is replaced. An empty folder
            is as good as none; where it cannot be replaced, it is filled.
        kind: What the directory will be, ``anchor`` or ``merged``. Only a bundle of the same kind is ever replaced.
        overwrite: Whether a bundle that exists may be replaced. It is deleted after the swap.

    Raises:
        UsageError: The target exists and may not be replaced.
        FlexctlError: The platform or the file system cannot swap two directories in one step.
    """
    target = check_directory_target(path, kind=kind, overwrite=overwrite)
    fills = _is_vacant(target) and not (_may_have_siblings(target) and target != Path(os.path.realpath(os.curdir)))
    with (_filled if fills else _swapped)(target) as temporary:
        yield temporary
        for item in temporary.iterdir():
            _flush(item)
        _flush(temporary)


@contextmanager
def _swapped(target: Path) -> Iterator[Path]:
    """Give a sibling, and move it to ``target`` in one step."""
    replaces = os.path.lexists(target) and not _is_vacant(target)
    with _parents(target), _sibling(target) as temporary, _named(target, temporary):
        temporary.mkdir()
        if replaces:
            _try_exchange(temporary)
        elif target.is_dir():
            shutil.copymode(target, temporary)
        yield temporary
        if replaces:
            _exchange(temporary, target)
        else:
            if not _is_vacant(target):
                _refuse_existing(target, overwrite=False)
            os.rename(temporary, target)
        _flush(target.parent)
        if replaces:
            # Not left to the tidying below, which forgives: what was removed must be gone.
            shutil.rmtree(temporary)


@contextmanager
def _filled(target: Path) -> Iterator[Path]:
    """Give a folder inside ``target``, and move its files out, the manifest last."""
    with _sibling(target / target.name) as temporary, _named(target, temporary):
        temporary.mkdir()
        yield temporary
        names = sorted((item.name for item in temporary.iterdir()), key=lambda name: name == MANIFEST_FILE)
        moved: list[str] = []
        try:
            for name in names:
                _refuse_existing(target / name, overwrite=False)
                os.rename(temporary / name, target / name)
                moved.append(name)
        finally:
            for name in moved if moved != names else ():
                (target / name).unlink()
        _flush(target)


def check_file_target(path: Path, *, overwrite: bool) -> Path:
    """Return ``path`` with symbolic links resolved, if ``new_file`` can write there: asked before any work.

    Raises:
        UsageError: It exists and may not be replaced, is a directory, has too long a name, or lies in a folder that
            may not be written to.
    """
    target = _possible(path)
    if target.is_dir():
        raise UsageError(f"{path}: is a directory; expected a file to write")
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{path} exists already", hint=_EXISTS)
    return target


def check_directory_target(path: Path, *, kind: str, overwrite: bool) -> Path:
    """Return ``path`` with symbolic links resolved, if ``new_directory`` may write there: asked before any work.

    Raises:
        UsageError: It exists and may not be replaced, or it holds something that is no part of such a bundle and
            would be deleted with it. It has too long a name, or lies in a folder that may not be written to.
    """
    target = _possible(path)
    if _is_vacant(target):
        return target
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
    if target == Path(os.path.realpath(os.curdir)):
        raise UsageError(f"{target}: is the folder that you are in, and would be replaced", hint="cd .. first")
    if not _may_have_siblings(target):
        raise UsageError(f"{target}: is a mount point, which cannot be replaced in one step", hint=_ELSEWHERE)
    return target


def place_of_work(target: Path, ending: str) -> Path:
    """Return the hidden folder for what a run needs on its way to a directory, ``.NAME.ending``.

    It is beside the target, or inside one that is there and can have no siblings, as a mount point.
    """
    place = Path(os.path.realpath(target))
    inside = os.path.isdir(place) and not _may_have_siblings(place)
    return (place if inside else place.parent) / f".{place.name}.{ending}"


def own_file(path: Path) -> BinaryIO:
    """Return a new file to write that nobody but its owner may read."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


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


def _possible(path: Path) -> Path:
    """Return ``path`` with symbolic links resolved, where something can be made under that name.

    Raises:
        UsageError: The name is too long, for its siblings too, or the folder that it must be made in may not be written
            to, or is none.
    """
    try:
        target = Path(os.path.realpath(path))
        places = (target, *target.parents) if _is_vacant(target) else target.parents
        folder = next(place for place in places if os.path.lexists(place))
        if folder.is_dir():
            for name in target.relative_to(folder).parts:
                with suppress(FileNotFoundError):
                    os.lstat(folder / f".{name}{_AFFIX}")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{shown(os.fspath(path))}: cannot be written ({reason})", hint=_ELSEWHERE) from error
    if not folder.is_dir():
        raise UsageError(f"{path}: cannot be written, as {folder} is no folder", hint=_ELSEWHERE)
    if not os.access(folder, _MAKE):
        raise UsageError(f"{path}: cannot be written, as nothing may be made in {folder}", hint=_ELSEWHERE)
    return target


def _is_vacant(target: Path) -> bool:
    """Return whether this is a folder with nothing in it, but for hidden ones that flexctl works in."""
    return os.path.isdir(target) and all(item.name.startswith(f".{target.name}.") for item in target.iterdir())


def _may_have_siblings(target: Path) -> bool:
    """Return whether what is written beside a folder or file can be moved over it."""
    return not _is_mount(target) and os.access(target.parent, _MAKE)


def _is_mount(path: Path) -> bool:
    """Return whether a file system is mounted at ``path``; one that is bound there from the same disk counts, too."""
    if os.path.ismount(path):
        return True
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    return any(line.split()[4].replace("\\040", " ") == str(path) for line in mounts)


@contextmanager
def _named(target: Path, temporary: Path) -> Iterator[None]:
    """Give an error the name of what was being written: the system has the temporary one, or of a full disk none."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM and error.filename is None:
            error.filename = str(target)
        elif isinstance(error.filename, (str, os.PathLike)) and Path(error.filename).is_relative_to(temporary):
            error.filename = str(target / Path(error.filename).relative_to(temporary))
        raise


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target}: exists already", hint=_EXISTS)


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
    sweep(target)
    temporary = target.with_name(f".{target.name}.{_MACHINE}-{os.getpid()}-{next(_counter)}.tmp")
    try:
        yield temporary
    finally:
        _delete(temporary)


def sweep(path: Path) -> None:
    """Delete what killed processes of this machine left beside ``path``, a model that was replaced among it."""
    target = Path(os.path.realpath(path))
    prefix = f".{target.name}.{_MACHINE}-"
    with suppress(OSError):
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
