"""Copying bytes between files: shared where the file system can, in the kernel where it can, else by hand.

What comes of it is the same everywhere; only what it costs is not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from flexctl.errors import BundleError

__all__ = ["append_range", "clone_range", "copy_range", "copy_steps", "start_writing"]

COPY_BYTES = 1 << 20
KERNEL_COPY_BYTES = 1 << 24
# What copy_file_range says where the two files' places do not support it.
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}
# FICLONERANGE of linux/fs.h and its argument: descriptor, start, length, start in the target.
_CLONE_RANGE, _RANGE = 0x4020940D, "=qQQQ"
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of linux/fs.h


def append_range(source: Path, start: int, output: BinaryIO, count: int) -> None:
    """Copy ``count`` bytes of a file, from ``start`` on, to where ``output`` stands, by ``copy_range``."""
    output.flush()
    offset = output.tell()
    copy_range(source, start, output.fileno(), offset, count)
    output.seek(offset + count)


def copy_range(source: Path, source_start: int, target: int, target_start: int, count: int) -> None:
    """Copy bytes between files, as ``copy_steps`` does, all at once."""
    for _ in copy_steps(source, source_start, target, target_start, count):
        pass


def copy_steps(source: Path, source_start: int, target: int, target_start: int, count: int) -> Iterator[int]:
    """Copy bytes between files, in the kernel where it can, else through a buffer of 1 MiB.

    Args:
        source: File to read.
        source_start: First byte of it.
        target: File descriptor to write.
        target_start: Where the first byte goes.
        count: How many bytes.

    Yields:
        How many bytes are done, after every 16 MiB or sooner.

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
            yield done
    finally:
        os.close(descriptor)


def clone_range(source: Path, source_start: int, target: int, target_start: int, count: int) -> int:
    """Let a file share blocks with another, where the file system can (XFS, Btrfs), and return how many bytes it does.

    Nothing is read or written. As far as blocks go, from the first byte on; 0 where it cannot, or where one of the two
    ranges does not begin with a block: whoever calls copies the rest.

    Args:
        source: File to share with.
        source_start: First byte of it.
        target: File descriptor to write.
        target_start: Where the first byte goes.
        count: How many bytes.
    """
    if sys.platform != "linux":
        return 0
    import fcntl

    whole = count - count % os.fstatvfs(target).f_frsize
    if whole == 0:
        return 0
    descriptor = os.open(source, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.ioctl(target, _CLONE_RANGE, struct.pack(_RANGE, descriptor, source_start, whole, target_start))
            return whole
    finally:
        os.close(descriptor)
    return 0


def start_writing(target: int, start: int, count: int) -> None:
    """Let the disk begin with bytes that were written, so that a later fsync waits less, where the system can do that.

    Nothing waits for them here, and nothing goes by it.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "sync_file_range"):
        library.sync_file_range(target, ctypes.c_int64(start), ctypes.c_int64(count), _START_WRITING)


def _copy_in_kernel(source: int, source_start: int, target: int, target_start: int, count: int) -> int:
    try:
        return os.copy_file_range(source, target, min(count, KERNEL_COPY_BYTES), source_start, target_start)
    except OSError as error:
        if error.errno not in _NOT_IN_KERNEL:
            raise
        return 0
