"""The baseline of a merge, a process of its own: copy files in the kernel as cp does, hash the copies, flush them.

``python -m tests.benchmarks.plain_copy copy|hash THREADS FOLDER FILE...``; ``hash`` hashes alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEP = 1 << 24


def copy_and_hash(source: Path, folder: Path) -> None:
    """Copy a file in the kernel, hash the copy, flush it."""
    folder.mkdir(exist_ok=True)
    target = folder / source.name
    with source.open("rb") as read, target.open("wb") as write:
        size, done = source.stat().st_size, 0
        while done < size:
            done += os.copy_file_range(read.fileno(), write.fileno(), min(STEP, size - done), done, done)
    hash_file(target)
    with target.open("rb") as file:
        os.fsync(file.fileno())


def hash_file(path: Path) -> None:
    """Hash a file through a buffer of 1 MiB."""
    hasher, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            hasher.update(buffer[:count])


def main() -> None:
    """Do it, and end stderr with the largest resident size and the cores' time."""
    name, threads, folder, *sources = sys.argv[1:]
    with ThreadPoolExecutor(int(threads)) as pool:
        if name == "hash":
            list(pool.map(hash_file, map(Path, sources)))
        else:
            list(pool.map(lambda source: copy_and_hash(Path(source), Path(folder)), sources))
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps([1024 * int(status["VmHWM"].split()[0]), sum(os.times()[:2])]), file=sys.stderr)


if __name__ == "__main__":
    main()
