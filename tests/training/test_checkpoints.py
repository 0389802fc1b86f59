"""Checkpoints: whole or passed over, of the same run or refused, never more than two."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from flexctl.errors import UsageError
from flexctl.model.tensors import tensors_digest
from flexctl.runtime import SilentReporter
from flexctl.training.checkpoints import Checkpoints, TrainingState
from flexctl.training.shards import Writing

SETTINGS = {"lr": 0.1, "seed": 0, "rows": [0.5, 1.5], "dtype": None}


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def make_state(seed: int = 0, steps: int = 3) -> TrainingState:
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5).bfloat16())]
    optimiser = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimiser.step()
    return TrainingState(parameters=parameters, optimiser=optimiser)


def open_checkpoints(folder: Path, *, resume: bool, reporter: Any = None, **changes: Any) -> Checkpoints:
    settings = {**SETTINGS, **changes}
    return Checkpoints(folder, settings, every_steps=2, resume=resume, reporter=reporter or Listener())


def save(folder: Path, steps: list[int], state: TrainingState) -> None:
    checkpoints = open_checkpoints(folder, resume=True)
    for step in steps:
        save_when_due(checkpoints, step, 100, state, [0.1 * i for i in range(step)])


def save_when_due(checkpoints: Checkpoints, step: int, steps: int, state: TrainingState, losses: list[float]) -> None:
    if checkpoints.is_due(step, steps):
        checkpoints.save(step, state, losses, lambda: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same(one: TrainingState, other: TrainingState) -> bool:
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_state_comes_back_bit_for_bit_and_goes_on_alike(tmp_path: Path) -> None:
    saved, fresh = make_state(), make_state(seed=9, steps=0)
    save(tmp_path, [4], saved)
    losses = open_checkpoints(tmp_path, resume=True).restore(fresh)
    assert losses == [0.1 * i for i in range(4)]
    assert same(saved, fresh)
    for state in (saved, fresh):
        torch.manual_seed(1)
        for parameter in state.parameters:
            parameter.grad = torch.randn_like(parameter)
        state.optimiser.step()
    assert same(saved, fresh)


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    state = make_state()
    save(tmp_path, [2], state)
    expected = torch.rand(3)
    torch.rand(5)
    open_checkpoints(tmp_path, resume=True).restore(state)
    assert torch.equal(torch.rand(3), expected)


def test_losses_are_kept_exactly(tmp_path: Path) -> None:
    state, losses = make_state(), [1 / 3, 2.0**-40, 1e300]
    save_when_due(open_checkpoints(tmp_path, resume=True), 2, 100, state, losses)
    assert open_checkpoints(tmp_path, resume=True).restore(make_state(1)) == losses


def test_only_due_steps_are_written_and_only_two_kept(tmp_path: Path) -> None:
    save(tmp_path, [1, 2, 3, 4, 5, 6, 7], make_state())
    assert names(tmp_path) == ["checkpoint-00000004.safetensors", "checkpoint-00000006.safetensors"]


def test_the_last_step_needs_none(tmp_path: Path) -> None:
    save_when_due(open_checkpoints(tmp_path, resume=False), 4, 4, make_state(), [1.0] * 4)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("writing_s", "next_s"), [(0.0, 300.0), (5.0, 300.0), (20.0, 1000.0)])
def test_by_default_time_decides_and_what_takes_long_is_written_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writing_s: float, next_s: float
) -> None:
    """At most five minutes are lost, for at most a fiftieth of the time."""
    clock = [0.0]

    def check() -> None:
        clock[0] += writing_s

    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    checkpoints = Checkpoints(tmp_path, SETTINGS, every_steps=None, resume=False, reporter=Listener())
    clock[0] = 299.0
    assert not checkpoints.is_due(2, 100)
    clock[0] = 300.0
    assert checkpoints.is_due(2, 100)
    assert not checkpoints.is_due(100, 100)
    checkpoints.save(2, make_state(), [1.0, 1.0], check)
    clock[0] += next_s - 1
    assert not checkpoints.is_due(3, 100)
    clock[0] += 1
    assert checkpoints.is_due(3, 100)


class Slow:
    """Stands for a checkpoint that is written while training goes on."""

    def __init__(self, path: Path, *, fails: bool = False) -> None:
        self.path, self.is_there, self._fails = path, False, fails

    def end(self) -> None:
        self.is_there = True
        if self._fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.path.write_bytes(b"")

    def begun(self, _self: Checkpoints, path: Path, *_: Any) -> Writing:
        self.path = path.with_suffix(".safetensors")
        return Writing(self.path, self.end, lambda: self.is_there)


def begin_slowly(monkeypatch: pytest.MonkeyPatch, slow: Slow) -> None:
    monkeypatch.setattr(Checkpoints, "_begin", lambda *given: slow.begun(*given))


def test_what_training_does_not_wait_for_costs_nothing_and_the_next_one_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, slow = [0.0], Slow(tmp_path)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    begin_slowly(monkeypatch, slow)
    checkpoints = Checkpoints(tmp_path, SETTINGS, every_steps=None, resume=False, reporter=Listener())
    clock[0] = 300.0
    checkpoints.save(2, make_state(), [1.0, 1.0], lambda: None)
    clock[0] = 10_000.0
    assert not checkpoints.is_due(3, 100), "one is under way"
    assert names(tmp_path) == []
    slow.is_there = True
    assert not checkpoints.is_due(4, 100)
    assert names(tmp_path) == ["checkpoint-00000002.safetensors"]
    clock[0] = 10_300.0
    assert checkpoints.is_due(5, 100)
    slow.is_there = False
    checkpoints.save(5, make_state(), [1.0] * 5, lambda: None)
    assert len(names(tmp_path)) == 1
    checkpoints.save(6, make_state(), [1.0] * 6, lambda: None)
    assert checkpoints.newest == 6


def test_what_is_under_way_is_waited_for_at_the_end_also_of_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, listener = Slow(tmp_path), Listener()
    begin_slowly(monkeypatch, slow)
    with open_checkpoints(tmp_path, resume=False, reporter=listener) as checkpoints:
        checkpoints.save(2, make_state(), [1.0, 1.0], lambda: None)
        assert names(tmp_path) == []
    assert (names(tmp_path), checkpoints.newest) == (["checkpoint-00000002.safetensors"], 2)
    begin_slowly(monkeypatch, Slow(tmp_path, fails=True))
    checkpoints.save(4, make_state(), [1.0] * 4, lambda: None)
    with pytest.raises(KeyError), checkpoints:
        raise KeyError
    (warning,) = listener.warnings
    assert "checkpoint-00000004.safetensors: cannot be written (No space left on device); that of step 2" in warning


def test_nothing_there_means_from_the_start(tmp_path: Path) -> None:
    fresh = make_state(steps=0)
    assert open_checkpoints(tmp_path / "new", resume=True).restore(fresh) == []
    assert same(fresh, make_state(steps=0))


def test_without_resume_old_checkpoints_go(tmp_path: Path) -> None:
    save(tmp_path, [2, 4], make_state())
    listener = Listener()
    assert open_checkpoints(tmp_path, resume=False, reporter=listener).restore(make_state()) == []
    assert names(tmp_path) == []
    (said,) = listener.warnings
    assert "checkpoint-00000004.safetensors of a run that was stopped is dropped; `resume`" in said
    assert open_checkpoints(tmp_path, resume=False, reporter=listener).restore(make_state()) == []
    assert len(listener.warnings) == 1


def break_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def break_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def break_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def break_the_header(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def rewrite(path: Path, *, without: str = "", lacking: str = "") -> None:
    """Write a checkpoint again as another version might have, digest and all."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != without}  # noqa: SIM118
    about["sha256"] = tensors_digest(tensors)
    save_file(tensors, path, {"run": json.dumps({key: value for key, value in about.items() if key != lacking})})


def of_other_parameters(path: Path) -> None:
    rewrite(path, without="1.parameter")


def without_a_digest(path: Path) -> None:
    rewrite(path, lacking="sha256")


def without_settings(path: Path) -> None:
    rewrite(path, lacking="settings")


DAMAGES = [break_by_cutting, break_by_emptying, break_one_bit, break_the_header]
DAMAGES += [of_other_parameters, without_a_digest, without_settings]


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_newest_is_passed_over_with_a_warning(tmp_path: Path, damage: Any) -> None:
    older, newer = make_state(0), make_state(1)
    save(tmp_path, [2], older)
    save(tmp_path, [4], newer)
    damage(tmp_path / "checkpoint-00000004.safetensors")
    fresh, listener = make_state(9), Listener()
    losses = open_checkpoints(tmp_path, resume=True, reporter=listener).restore(fresh)
    assert len(losses) == 2
    assert same(fresh, older)
    assert len(listener.warnings) == 1
    assert "checkpoint-00000004" in listener.warnings[0]
    assert "after step 2" in listener.notes[0]


def test_after_a_broken_one_two_whole_ones_are_kept_again(tmp_path: Path) -> None:
    save(tmp_path, [4, 8], make_state())
    break_by_cutting(tmp_path / "checkpoint-00000008.safetensors")
    save(tmp_path, [6], make_state())
    assert names(tmp_path) == ["checkpoint-00000004.safetensors", "checkpoint-00000006.safetensors"]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_on_a_full_disk_the_old_one_stays(full_disk: Path) -> None:
    state, listener = make_state(), Listener()
    checkpoints = open_checkpoints(full_disk, resume=False, reporter=listener)
    save_when_due(checkpoints, 2, 100, state, [1.0] * 2)
    (full_disk / "other").write_bytes(bytes(52 * 1024))
    save_when_due(checkpoints, 4, 100, state, [1.0] * 4)
    assert names(full_disk) == ["checkpoint-00000002.safetensors", "other"]
    (warning,) = listener.warnings
    assert "checkpoint-00000004.safetensors: cannot be written (No space left on device)" in warning
    assert "that of step 2 stays, and training goes on" in warning
    (full_disk / "other").unlink()
    save_when_due(checkpoints, 6, 100, state, [1.0] * 6)
    assert len(listener.warnings) == 1
    assert len(open_checkpoints(full_disk, resume=True).restore(make_state(9))) == 6


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_what_cannot_be_written_is_said_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> None:
        raise SafetensorError(f"I/O error: what the system says (os error {code})")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    listener = Listener()
    checkpoints = open_checkpoints(tmp_path, resume=False, reporter=listener)
    save_when_due(checkpoints, 2, 100, make_state(), [1.0] * 2)
    assert names(tmp_path) == []
    assert f"({os.strerror(code)}); there is none yet, and training goes on" in listener.warnings[0]
    assert checkpoints.newest is None


def test_all_broken_means_from_the_start(tmp_path: Path) -> None:
    save(tmp_path, [2, 4], make_state())
    for path in tmp_path.iterdir():
        break_one_bit(path)
    fresh = make_state(9)
    assert open_checkpoints(tmp_path, resume=True).restore(fresh) == []
    assert same(fresh, make_state(9))


def test_a_file_that_was_being_written_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, [2], make_state())
    (tmp_path / "checkpoint-00000004.partial").write_bytes(b"half")
    assert len(open_checkpoints(tmp_path, resume=True).restore(make_state(9))) == 2


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.2}, "lr = 0.1"),
        ({"rows": [0.5, 1.6]}, "rows"),
        ({"extra": 1}, "extra"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    save(tmp_path, [2], make_state())
    fresh = make_state(9)
    with pytest.raises(UsageError, match="that run had") as caught:
        open_checkpoints(tmp_path, resume=True, **changes).restore(fresh)
    assert named in caught.value.message
    assert "\n" not in caught.value.message
    assert same(fresh, make_state(9))


def test_settings_may_hold_tuples(tmp_path: Path) -> None:
    """JSON makes lists of them; that is not another setting."""
    first = Checkpoints(tmp_path, {"a": (1, 2)}, every_steps=1, resume=False, reporter=Listener())
    first.save(1, make_state(), [1.0], lambda: None)
    again = Checkpoints(tmp_path, {"a": (1, 2)}, every_steps=1, resume=True, reporter=Listener())
    assert again.restore(make_state()) == [1.0]
