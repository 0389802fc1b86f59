"""SIGTERM in a run, as schedulers send it: a checkpoint, a way on, the same bytes in the end, a log without gaps."""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_jsonl

from flexctl.cli.app import main
from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy
from flexctl.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SHAPE = ["--seq-len=32", "--batch-tokens=256", "--threads=1"]
STEPS = 6
PRIVATE = ["--dp-epsilon=30", "--dp-delta=1e-3", "--dp-documents=40", "--dp-noise-multiplier=0.5", "--dp-row-epsilon=8"]


@pytest.fixture(autouse=True)
def without_trackio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)


@pytest.fixture(params=["train-expert", "tune-router", "init-anchor"])
def command(request: pytest.FixtureRequest, texts: Any, anchor: Path, tmp_path: Path) -> list[str]:
    """A run of six steps; its target is still to be said."""
    if request.param == "train-expert":
        return ["train-expert", "--data", str(texts.code), "--anchor", str(anchor), *SHAPE, f"--max-steps={STEPS}"]
    if request.param == "init-anchor":
        source = str(request.getfixturevalue("checkpoint"))
        asked = ["init-anchor", source, "--data", str(texts.public), *SHAPE, "--sample-tokens=2000"]
        return [*asked, f"--anneal-tokens={STEPS * 256}"]
    merged, crawl = str(request.getfixturevalue("merged")), tmp_path / "crawl.jsonl"
    write_jsonl(crawl, [text for kind in ("public", "code", "sums") for text in tiny.make_texts(kind, 24, seed=7)])
    for name in ("code", "sums"):
        data = (getattr(texts, name),)
        select_proxy(
            SelectProxyConfig(data=data, anchor=anchor, public=crawl, count=24, output=tmp_path / name, threads=1)
        )
    lists = [f"--proxy={tmp_path / name}" for name in ("code", "sums")]
    asked = ["tune-router", merged, "--anchor", str(anchor), "--public", str(crawl), *lists, *SHAPE]
    return [*asked, f"--max-steps={STEPS}", "--lr=0.2", "--tether=0.01"]


def stop_in_step(patch: pytest.MonkeyPatch, step: int) -> None:
    is_due = Checkpoints.is_due

    def stopping(self: Checkpoints, done: int, steps: int) -> bool:
        if done == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return is_due(self, done, steps)

    patch.setattr(Checkpoints, "is_due", stopping)


def run(command: Sequence[str], target: Path, *more: str) -> int:
    return main([*command, "-o", str(target), "--track", *more])


def log_of(target: Path) -> list[dict[str, Any]]:
    text = target.with_name(f"{target.stem}.track.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def digest(printed: str) -> str:
    return str(json.loads(printed)["digest"])


def test_sigterm_leaves_a_checkpoint_and_a_way_on(
    tmp_path: Path, command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ending = random.SystemRandom().randint(2, STEPS - 1), ".st" if command[0] == "train-expert" else ""
    straight, stopped = tmp_path / f"straight{ending}", tmp_path / f"stopped{ending}"
    assert run(command, straight, "--json", "--name=x") == 0 if ending else run(command, straight, "--json") == 0
    expected = digest(capsys.readouterr().out)
    with monkeypatch.context() as patch:
        stop_in_step(patch, step)
        named = ["--name=x"] if ending else []
        assert run(command, stopped, *named) == 143
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert f"error: stopped by SIGTERM after step {step} of {STEPS}; .stopped." in error
    assert error.endswith(f"/checkpoints keeps all until step {step}")
    assert hint == "hint: give the same command with --resume to go on from there"
    assert not stopped.exists()
    assert log_of(stopped)[-1]["step"] == step
    assert run(command, stopped, *named, "--resume", "--json") == 0
    assert digest(capsys.readouterr().out) == expected, f"step {step}"
    timeless = [
        [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in log_of(target)]
        for target in (straight, stopped)
    ]
    assert timeless[0] == timeless[1]
    assert [line["step"] for line in timeless[0] if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_a_private_run_goes_on_with_the_noise_that_it_had(
    tmp_path: Path, texts: Any, anchor: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From where it was stopped and from its start: the same bytes, though the key is new in each run."""
    asked = ["train-expert", "--data", str(texts.code), "--anchor", str(anchor), *SHAPE, *PRIVATE, "--max-steps=4"]
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        assert run(asked, tmp_path / "x.st") == 143
    shutil.copytree(tmp_path / ".x.work", tmp_path / "copy")
    capsys.readouterr()
    assert run(asked, tmp_path / "x.st", "--resume", "--json") == 0
    first = digest(capsys.readouterr().out)
    (tmp_path / "x.st").unlink()
    shutil.copytree(tmp_path / "copy", tmp_path / ".x.work")
    shutil.rmtree(tmp_path / ".x.work" / "checkpoints")
    assert run(asked, tmp_path / "x.st", "--resume", "--json") == 0
    assert digest(capsys.readouterr().out) == first


def test_a_private_run_that_was_stopped_without_room_for_a_checkpoint_keeps_its_key(
    tmp_path: Path, texts: Any, anchor: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    asked = ["train-expert", "--data", str(texts.code), "--anchor", str(anchor), *SHAPE, *PRIVATE, "--max-steps=4"]
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        patch.setattr("flexctl.training.checkpoints._write", full)
        assert run(asked, tmp_path / "x.st") == 143
    assert (tmp_path / ".x.work" / "ledger.json").is_file()


@pytest.mark.parametrize("public_mix", [0.3, 0.0])
def test_the_log_of_a_private_run_has_steps_and_public_losses_alone(
    tmp_path: Path, texts: Any, anchor: Path, public_mix: float
) -> None:
    asked = ["train-expert", "--anchor", str(anchor), *SHAPE, *PRIVATE, "--max-steps=3", f"--public-mix={public_mix}"]
    for name in ("code", "sums"):
        assert run([*asked, "--data", str(getattr(texts, name))], tmp_path / f"{name}.st") == 0
    logs = [log_of(tmp_path / f"{name}.st") for name in ("code", "sums")]
    step = {"step", "public_loss"} if public_mix else {"step"}
    for log in logs:
        assert [line["step"] for line in log] == [0, 1, 2, 3, 3]
        assert [set(line) for line in log] == [
            {"step", "held_out/public"},
            step,
            step,
            step,
            {"step", "held_out/public"},
        ]
    assert logs[0][:1] == logs[1][:1]


def test_a_log_of_nothing_is_refused(checkpoint: Path, texts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--dry-run"]):
        assert main(["init-anchor", str(checkpoint), "--data", str(texts.public), "--track", *more]) == 2
        assert "error: --track: SOURCE is not trained" in capsys.readouterr().err
