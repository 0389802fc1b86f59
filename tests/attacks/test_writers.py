"""What every command that writes must bear: others' inputs and folders, a disk that fills up, its death at any moment.

A command that fails says so in one line. What was there is as it was, or what it makes is there whole; its inputs are
as they were; and nothing is left that a rerun does not take away. Quick calls are always tried at some moments, and all
calls at all moments under ``-m slow``, or at so many as FLEXCTL_MOMENTS says.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacks.bench import A_PAGE, Bench, State, Tried
from attacks.trials import may_be_a_stranger
from attacks.writers import STRANGER, WRITERS, WRITES_NOTHING, Writer

from flexctl.commands import COMMANDS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

QUICK = [name for name, writer in WRITERS.items() if writer.quick]
ALL = [pytest.param(name, marks=() if writer.quick else pytest.mark.slow) for name, writer in WRITERS.items()]
MOST_MOMENTS = int(os.environ.get("FLEXCTL_MOMENTS", "1000"))
needs_root = pytest.mark.skipif(not may_be_a_stranger(), reason="needs root on Linux, to give rights away")


def test_every_command_that_writes_is_tried() -> None:
    tried = {writer.command for writer in WRITERS.values()}
    assert tried | WRITES_NOTHING.keys() == {command.shown for command in COMMANDS}
    assert not tried & WRITES_NOTHING.keys()


def done(bench: Bench, writer: Writer) -> Tried:
    """Return what a call makes where nothing happens; others are held against it."""
    tried = bench.done(writer).tried
    assert tried.code == 0, tried.err
    assert hidden(tried.after) == []
    return tried


def hidden(state: State) -> list[str]:
    return [name for name in state if any(part.startswith(".") for part in name.split("/"))]


def said_in_one_line(tried: Tried, *codes: int) -> str:
    """Hold a refusal to one line, one hint, and a code."""
    assert tried.code in codes, (tried.code, tried.err)
    lines = [line for line in tried.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, tried.err
    assert "unexpected" not in lines[0]
    assert "Traceback" not in tried.err
    assert ".tmp" not in lines[0], "a temporary file's name says nothing to anyone"
    return lines[0]


def nothing_is_lost(tried: Tried, whole: Tried) -> None:
    """Hold everything that is there to what was there before, or what the call makes."""
    for name, what in tried.after.items():
        if name not in hidden(tried.after) and what != "empty":
            assert what in (tried.before.get(name), whole.after.get(name)), f"{name} is neither the old nor the new one"
    for name in tried.before.keys() - tried.after.keys():
        assert name not in whole.after, f"{name} is gone"


def left_behind(writer: Writer, state: State) -> list[str]:
    """Return what a run that failed may not leave: hidden files and empty folders."""
    stray = [*hidden(state), *(name for name, what in state.items() if what == "empty")]
    return [name for name in stray if not (writer.keeps and writer.keeps in name.split("/"))]


def some(number: int, most: int) -> list[int]:
    """Return at most so many of the moments from 1 to ``number``, evenly, the first and the last among them."""
    count = min(number, most)
    return sorted({1 + round(i * (number - 1) / max(1, count - 1)) for i in range(count)})


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Let a file or folder be another user's, who alone may read it, while the block runs."""
    before = path.stat()
    shutil.chown(path, STRANGER, STRANGER)
    path.chmod(0o700)
    try:
        yield
    finally:
        os.chown(path, before.st_uid, before.st_gid)
        path.chmod(before.st_mode & 0o7777)


@contextmanager
def small_disk(bench: Bench, writer: Writer, part: float) -> Iterator[Path]:
    """Give a folder for a call on a disk of its own, with room for a part of what the call writes."""
    whole = bench.done(writer)
    size = whole.bytes_before + int(part * whole.bytes_written) + 2 * A_PAGE
    place = bench.folder(writer, bare=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place.parent)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        bench.fill(writer, place)
        yield place
    finally:
        subprocess.run(["umount", str(place.parent)], check=True)


def dies_at(bench: Bench, writer: Writer, whole: Tried, at: int) -> None:
    """Kill a call at a moment, and run it again: it ends, or says that all is done."""
    place = bench.folder(writer)
    killed = bench.run(writer, place, fault="kill", at=at)
    if killed.code != 0:  # else the moments came in another order
        assert killed.code == -9, killed.err
        nothing_is_lost(killed, whole)
        again = bench.run(writer, place)
        if again.code == 2 and "exists already" in again.err and not writer.never_replaces:
            said_in_one_line(again, 2)
            again = bench.run(writer, place, more=("--overwrite",))
        if again.code != 0:
            said_in_one_line(again, 2, 3)
        if again.code == 2 and writer.never_replaces:
            assert hidden(again.after) == []
        else:
            assert again.after == whole.after
    bench.discard(place)


def fills_up_at(bench: Bench, writer: Writer, whole: Tried, at: int) -> None:
    """Let the disk be full from a moment on."""
    place = bench.folder(writer)
    tried = bench.run(writer, place, fault="full", at=at)
    if tried.code != 0:
        said_in_one_line(tried, 1)
        nothing_is_lost(tried, whole)
    assert left_behind(writer, tried.after) == []
    bench.discard(place)


@pytest.mark.parametrize("name", QUICK)
def test_a_command_that_is_killed(bench: Bench, name: str) -> None:
    whole = done(bench, WRITERS[name])
    for at in (whole.moments // 2, whole.moments):
        dies_at(bench, WRITERS[name], whole, at)


@pytest.mark.parametrize("name", QUICK)
def test_a_disk_that_fills_up(bench: Bench, name: str) -> None:
    whole = done(bench, WRITERS[name])
    for at in (whole.moments // 2, whole.moments):
        fills_up_at(bench, WRITERS[name], whole, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_command_that_is_killed_at_every_moment(bench: Bench, name: str) -> None:
    whole = done(bench, WRITERS[name])
    print(f"{name}: killed at {whole.moments} moments")
    for at in some(whole.moments, MOST_MOMENTS):
        dies_at(bench, WRITERS[name], whole, at)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_at_every_moment(bench: Bench, name: str) -> None:
    whole = done(bench, WRITERS[name])
    print(f"{name}: no room from each of {whole.moments} moments on")
    for at in some(whole.moments, MOST_MOMENTS):
        fills_up_at(bench, WRITERS[name], whole, at)


@needs_root
@pytest.mark.parametrize("name", ALL)
def test_a_folder_of_another_user(bench: Bench, name: str) -> None:
    """Inputs can be read and not written, nothing can be made, and there is no cache."""
    writer = WRITERS[name]
    place = bench.folder(writer)
    for path in (place.parent, place, *place.rglob("*")):
        shutil.chown(path, STRANGER, STRANGER)
    tried = bench.run(writer, place, fault="stranger")
    said_in_one_line(tried, 1, 2)
    assert tried.after == tried.before
    bench.discard(place)


@needs_root
@pytest.mark.parametrize("name", ALL)
def test_inputs_that_only_another_user_may_read(bench: Bench, name: str) -> None:
    """Each in turn, where a command cannot do without it; its name is in the one line."""
    writer = WRITERS[name]
    for secret in writer.reads:
        place = bench.folder(writer)
        with unreadable(bench.inputs / secret):
            tried = bench.run(writer, place, fault="stranger")
        line = said_in_one_line(tried, 1, 2, 3)
        assert Path(secret).name in line
        assert tried.after == tried.before
        assert left_behind(writer, tried.after) == []
        bench.discard(place)


@needs_root
@pytest.mark.parametrize("name", ALL)
def test_a_user_without_a_home(bench: Bench, name: str) -> None:
    """Who may write to the folder alone, as many services: no cache can be made, and all the same it works."""
    writer = WRITERS[name]
    whole = done(bench, writer)
    place = bench.folder(writer)
    shutil.chown(place.parent, STRANGER, STRANGER)
    tried = bench.run(writer, place, fault="stranger")
    assert (tried.code, tried.after) == (0, whole.after), tried.err
    bench.discard(place)


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_small_disk(bench: Bench, name: str) -> None:
    """One that really is full, with room for none, some and most of what is written."""
    writer = WRITERS[name]
    whole = done(bench, writer)
    for part in (0.0, 0.3, 0.8):
        with small_disk(bench, writer, part) as place:
            tried = bench.run(writer, place)
            if tried.code != 0:
                said_in_one_line(tried, 1)
                nothing_is_lost(tried, whole)
            assert left_behind(writer, tried.after) == []
