"""A place to try commands in: a fresh folder for each try, and what lies in it before and after."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attacks.trials import SECRET
from attacks.writers import Writer

from flexctl.bundle.opening import open_bundle

__all__ = ["A_PAGE", "Bench", "Done", "State", "Tried", "running", "state_of"]

A_PAGE = 4096
_TESTS = Path(__file__).parent.parent

State = dict[str, str]
"""File, or bundle that is a directory -> a digest of it; hidden ones included."""


@dataclass(frozen=True)
class Tried:
    """What came of a command: its exit code (negative: the signal), its words, and the moments that were counted."""

    code: int
    out: str
    err: str
    moments: int
    before: State
    after: State


@dataclass(frozen=True)
class Done:
    """A call where nothing happened: what came of it, and the bytes on a disk before it and of what it wrote."""

    tried: Tried
    bytes_before: int
    bytes_written: int


class Bench:
    """Runs writers.

    Args:
        root: Folder with the inputs in ``root``/in.
        host: The process that runs commands: ``attacks.trials``.
    """

    def __init__(self, root: Path, host: subprocess.Popen[str]) -> None:
        self.inputs, self._cases, self._host = root / "in", root / "cases", host
        self._said, self._count = root / "said", 0
        self._done: dict[str, Done] = {}

    def done(self, writer: Writer) -> Done:
        """Return what a call makes where nothing happens, tried once."""
        if writer.words not in self._done:
            place = self.folder(writer)
            before = size_of(place.parent)
            tried = self.run(writer, place)
            self._done[writer.words] = Done(tried, before, size_of(place.parent) - before)
            self.discard(place)
        return self._done[writer.words]

    def folder(self, writer: Writer, *, bare: bool = False) -> Path:
        """Return a fresh folder for a call, with what lies there before it; a ``bare`` one is yet to be filled."""
        self._count += 1
        place = self._cases / f"{self._count}/out"
        place.parent.mkdir(parents=True)
        if not bare:
            self.fill(writer, place)
        return place

    def fill(self, writer: Writer, place: Path) -> None:
        """Make a call's folder, with copies of inputs in it."""
        place.mkdir()
        for name, source in writer.before.items():
            found = self.inputs / source
            if found.is_dir():
                shutil.copytree(found, place / name)
            else:
                shutil.copy(found, place / name)

    def run(
        self, writer: Writer, place: Path, *, fault: str = "none", at: int = 0, more: tuple[str, ...] = ()
    ) -> Tried:
        """Run a call in a folder, with trouble from a moment on."""
        before = state_of(place, random=writer.random)
        words = [word.replace("IN/", f"{self.inputs}/") for word in (*writer.words.split(), *more)]
        trial = {
            "words": words,
            "folder": str(place),
            "said": str(self._said),
            "fault": fault,
            "at": at,
            "environment": {
                "FLEXCTL_PASSPHRASE": SECRET,
                "XDG_CACHE_HOME": str(place.parent / "cache"),
            },
        }
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(json.dumps(trial) + "\n")
        self._host.stdin.flush()
        answer: dict[str, Any] = json.loads(self._host.stdout.readline())
        return Tried(before=before, after=state_of(place, random=writer.random), **answer)

    def discard(self, place: Path) -> None:
        """Delete a folder that is done with."""
        shutil.rmtree(place.parent)


@contextmanager
def running(root: Path, **environment: str) -> Iterator[Bench]:
    """Give a bench over ``root``/in while the block runs."""
    paths = os.pathsep.join([str(_TESTS), str(_TESTS.parent), *filter(None, sys.path)])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FLEXCTL_")}
    host = subprocess.Popen(
        [sys.executable, "-m", "attacks.trials"],
        env={**clean, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Bench(root, host)
    finally:
        assert host.stdin is not None
        host.stdin.close()
        host.wait()
        assert host.stdout is not None
        host.stdout.close()


def state_of(folder: Path, *, random: bool = False) -> State:
    """Return what lies in a folder.

    Args:
        folder: The folder.
        random: What is another each time counts as the same where it is whole.
    """
    found: State = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and not (path / "flexctl.json").exists():
            inside = state_of(path, random=random)
            found |= {f"{path.name}/{name}": what for name, what in inside.items()} or {f"{path.name}/": "empty"}
        elif path.is_dir():
            found[path.name] = _digest_of(path, random)
        else:
            found[path.name] = _kind(path) or (_whole(path) if random else None) or _digest(path)
    return found


def size_of(folder: Path) -> int:
    """Return what a folder takes on a disk of pages, in bytes."""
    return sum(A_PAGE * (1 + path.lstat().st_size // A_PAGE) for path in folder.rglob("*"))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _digest_of(bundle: Path, random: bool) -> str:
    if random:
        return f"whole {open_bundle(bundle).manifest.kind}"
    files = sorted(file for file in bundle.rglob("*") if file.is_file())
    parts = [f"{file.relative_to(bundle)} {_kind(file) or _digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _kind(file: Path) -> str | None:
    """Return what a file with times or places in it is, where it is whole; None for all others."""
    if file.name.endswith(("run.json", "results.json")):
        json.loads(file.read_text())
        return "whole account of a run"
    if file.name.endswith("track.jsonl"):
        assert all(json.loads(line) for line in file.read_text().splitlines())
        return "whole log of a run"
    return None


def _whole(file: Path) -> str | None:
    """Return what a file is that is another each time; None where it is not whole."""
    if file.suffix == ".st":
        return f"whole {open_bundle(file).manifest.kind}"
    if file.suffix == ".html":
        return "whole page" if file.read_text().rstrip().endswith("</html>") else None
    if file.suffix == ".jsonl":
        return "whole lines" if [json.loads(line) for line in file.read_text().splitlines()] else None
    if file.suffix in (".key", ".pub"):
        lines = file.read_text().splitlines()
        return f"whole {file.suffix}" if lines and lines[-1].startswith("-----END") else None
    return None
