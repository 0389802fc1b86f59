"""Scripts in a process of their own that need not import torch: they are forked from one that has, made once."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["Apart", "killed", "running"]

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch", "transformers.models.olmo2.modeling_olmo2", "transformers.models.auto"])


@dataclass(frozen=True)
class Apart:
    """A script that runs elsewhere.

    Attributes:
        process: Its process.
        talk: The other end of the script's own ``talk``.
        said: Folder with what it printed: the files out and err.
    """

    process: BaseProcess
    talk: Connection
    said: Path

    @property
    def out(self) -> str:
        """What it printed on stdout."""
        return (self.said / "out").read_text()

    @property
    def err(self) -> str:
        """What it printed on stderr."""
        return (self.said / "err").read_text()

    def end(self) -> int | None:
        """Wait for its end; return its exit code, negative where a signal ended it."""
        self.process.join()
        return self.process.exitcode


@contextmanager
def running(script: str, *arguments: object, said: Path) -> Iterator[Apart]:
    """Run a script with arguments in ``sys.argv[1:]`` while the block runs; then it is killed."""
    said.mkdir()
    for name in ("out", "err"):
        (said / name).touch()
    here, there = _FORKS.Pipe()
    words = ["-c", *map(str, arguments)]
    process = _FORKS.Process(target=_run, args=(script, words, dict(os.environ), there, said))
    process.start()
    there.close()
    try:
        yield Apart(process, here, said)
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()


def killed(script: str, *arguments: object, said: Path) -> None:
    """Run a script that kills its own process."""
    with running(script, *arguments, said=said) as apart:
        assert apart.end() == -9, apart.err


def _run(script: str, words: list[str], environment: Mapping[str, str], talk: Connection, said: Path) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(said / name, os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__", "talk": talk})
