"""The working folder: one process at a time, whatever the last one died of, and nothing left that nobody needs."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import SILENT, SilentReporter
from flexctl.training.work import refuse_busy, working_folder

HOLDING = """
import sys
from pathlib import Path
from flexctl.runtime import SILENT
from flexctl.training.work import working_folder
with working_folder(Path(sys.argv[1]), SILENT) as folder:
    (folder / "theirs").write_text("x")
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the folder until its stdin ends."""
    command = [sys.executable, "-c", HOLDING, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".x.work"
    with another_process(folder) as process:
        for refused in (lambda: refuse_busy(folder), lambda: working_folder(folder, SILENT).__enter__()):
            with pytest.raises(UsageError, match=rf"\.x\.work: is in use by process {process.pid} on ") as caught:
                refused()
            assert "\n" not in caught.value.message
            assert "`output`" in str(caught.value.hint)
        assert sorted(os.listdir(folder)) == ["lock", "theirs"]
        process.communicate("")
        assert process.returncode == 0
    assert not folder.exists()
    refuse_busy(folder)


def test_what_a_killed_process_held_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / ".x.work"
    with another_process(folder) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sorted(os.listdir(folder)) == ["lock", "theirs"]
    refuse_busy(folder)
    with working_folder(folder, SILENT):
        assert (folder / "lock").read_text().startswith(f"{os.getpid()} on ")
        assert (folder / "theirs").exists()
    assert not folder.exists()


def test_a_second_run_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with working_folder(tmp_path / "w", SILENT) as folder:
        with pytest.raises(UsageError, match=f"process {os.getpid()}"), working_folder(folder, SILENT):
            pytest.fail("the block must not run")
        assert (folder / "lock").exists()


@pytest.mark.parametrize("error", [FlexctlError("no"), OSError(errno.ENOSPC, "full")])
def test_checkpoints_outlive_a_failure_and_nothing_else_does(tmp_path: Path, error: Exception) -> None:
    def fail(*, leaving: bool) -> None:
        with working_folder(tmp_path / "w", SILENT) as folder:
            (folder / "own.tokens").write_text("x")
            (folder / "checkpoints").mkdir()
            if leaving:
                (folder / "checkpoints/checkpoint-00000001.safetensors").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail(leaving=False)
    assert os.listdir(tmp_path) == []
    with pytest.raises(type(error)):
        fail(leaving=True)
    assert sorted(os.listdir(tmp_path / "w")) == ["checkpoints", "own.tokens"]


def test_a_folder_that_went_while_it_was_opened_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run before may be taking its folder away in the moment that the next one asks for it."""
    flock, calls = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / "w/lock").unlink()
            (tmp_path / "w").rmdir()
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with working_folder(tmp_path / "w", SILENT) as folder:
        assert len(calls) == 2
        with pytest.raises(UsageError, match="in use"):
            refuse_busy(folder)


def test_where_there_are_no_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Listener(SilentReporter):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    def unable(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unable)
    listener = Listener()
    with working_folder(tmp_path / "w", listener):
        pass
    assert len(listener.warnings) == 1
    assert "no file locks" in listener.warnings[0]
    assert not (tmp_path / "w").exists()


def test_nobody_else_may_look_into_it(tmp_path: Path) -> None:
    """The owner's text lies in there, as tokens."""
    before = os.umask(0o022)
    try:
        with working_folder(tmp_path / "out" / ".x.work", SILENT) as folder:
            assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_run_that_fails_takes_folders_away_that_it_made(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for place in ("there/new/out", "there"):
        with pytest.raises(FlexctlError), working_folder(tmp_path / place / ".x.work", SILENT):
            raise FlexctlError("no")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
