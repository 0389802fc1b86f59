"""A run's log: what it says, that it is there as the run goes, and that going on doubles nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from flexctl.errors import UsageError
from flexctl.model.routed import routed_layers
from flexctl.runtime import SILENT, SilentReporter
from flexctl.text.tokens import TokenStream
from flexctl.training.batches import Mixture
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, Outcome, learning_rate, train
from flexctl.training.pair import Pair
from flexctl.training.track import RowLogits, Track, log_beside, tracked

pytestmark = pytest.mark.usefixtures("one_thread", "without_trackio")

SETTINGS = LoopSettings(steps=6, lr=2e-3, warmup_steps=2, micro_batch=3)
ROWS = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def without_trackio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


class Breaking(Track):
    """Stops the run after a step was logged."""

    def __init__(self, track: Track, step: int) -> None:
        self._track, self._step = track, step

    @property
    def is_on(self) -> bool:
        return True

    def log(self, step: int, figures: Any) -> None:
        self._track.log(step, figures)
        if step == self._step:
            raise KeyboardInterrupt


def make_data(public_share: float) -> Mixture:
    own = TokenStream(np.array([(i * i + 3 * i) % 300 + 2 for i in range(400)], dtype=np.int32))
    public = TokenStream(np.array([(i * 7) % 300 + 2 for i in range(200)], dtype=np.int32))
    return Mixture(own, public, seq_len=16, batch_size=4, public_share=public_share, seed=0)


def run(track: Track, *, public_share: float = 0.25, checkpoints: Checkpoints | None = None) -> Outcome:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    pair = Pair(model, ROWS, public_match=0.0)
    return train(
        model, pair.groups(), make_data(public_share), SETTINGS, reporter=SILENT, track=track, checkpoints=checkpoints
    )


def log(path: Path, **settings: Any) -> Outcome:
    with tracked(path, "law", path.parent, resume=False, reporter=SILENT) as track:
        return run(track, **settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_a_step_with_what_is_known_without_another_pass(tmp_path: Path) -> None:
    outcome = log(tmp_path / "x")
    found = lines(tmp_path / "x")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in found] == outcome.losses
    assert [line["lr"] for line in found] == [learning_rate(step, SETTINGS) for step in range(6)]
    assert all(line["tokens_per_s"] > 0 and line["grad_norm"] > 0 for line in found)
    assert set(found[0]) == {
        "step",
        "loss",
        "lr",
        "tokens_per_s",
        "grad_norm",
        "router_logit/own",
        "router_logit/public",
    }
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    Pair(model, ROWS, public_match=0.0)
    inputs: list[torch.Tensor] = []
    for block in routed_layers(model):
        block.router.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
    with torch.no_grad():
        model(make_data(0.25).batch(0)[:, :-1])
    logits = torch.stack([given @ row for given, row in zip(inputs, ROWS, strict=True)]).mean(dim=0).view(4, 16)
    assert found[0]["router_logit/own"] == pytest.approx(float(logits[:3].mean()), abs=1e-5)
    assert found[0]["router_logit/public"] == pytest.approx(float(logits[3].mean()), abs=1e-5)


def test_the_norm_is_that_of_the_whole_gradient_before_it_is_clipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watching(parameters: Any, most: float) -> torch.Tensor:
        norms.append(math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in parameters)))
        return clip(parameters, most)

    monkeypatch.setattr("flexctl.training.loop.clip_grad_norm_", watching)
    log(tmp_path / "x")
    assert [line["grad_norm"] for line in lines(tmp_path / "x")] == pytest.approx(norms, rel=1e-4)


def test_watching_changes_nothing(tmp_path: Path) -> None:
    assert log(tmp_path / "x").losses == run(Track()).losses


def test_what_there_is_not_is_left_out(tmp_path: Path) -> None:
    log(tmp_path / "x", public_share=0.0)
    assert all("router_logit/public" not in line for line in lines(tmp_path / "x"))
    with tracked(tmp_path / "y", "law", tmp_path, resume=False, reporter=SILENT) as track:
        track.held_out(0, {})
        track.log(1, {"loss": math.nan, "lr": 1.0})
    assert lines(tmp_path / "y") == [{"step": 1, "lr": 1.0}]


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_s"} for line in lines(path)]


def test_a_run_that_goes_on_doubles_no_step_and_leaves_none_out(tmp_path: Path) -> None:
    """It steps back to its checkpoint, past a line that was cut off."""
    log(tmp_path / "straight")

    def checkpoints(resume: bool) -> Checkpoints:
        return Checkpoints(tmp_path / "checkpoints", {}, every_steps=2, resume=resume, reporter=SILENT)

    with tracked(tmp_path / "x", "law", tmp_path, resume=False, reporter=SILENT) as track:
        track.held_out(0, {"own": 1.5, "public": 2.5})
        with pytest.raises(KeyboardInterrupt):
            run(Breaking(track, 4), checkpoints=checkpoints(False))
    with open(tmp_path / "x", "ab") as file:
        file.write(b'{"step": 5, "los')
    with tracked(tmp_path / "x", "law", tmp_path, resume=True, reporter=SILENT) as track:
        track.held_out(0, {"own": 1.5, "public": 2.5})
        run(track, checkpoints=checkpoints(True))
        track.held_out(6, {"own": 1.0, "public": 2.0})
    first, *steps, last = timeless(tmp_path / "x")
    assert first == {"step": 0, "held_out/own": 1.5, "held_out/public": 2.5}
    assert steps == timeless(tmp_path / "straight")
    assert last == {"step": 6, "held_out/own": 1.0, "held_out/public": 2.0}


@pytest.mark.parametrize("between", [b"\n", b"a note\n", b'{"step": 1e999}\n', b"[" * 100_000 + b"\n", b"\xff\n"])
def test_a_run_goes_on_with_a_log_that_somebody_wrote_in(tmp_path: Path, between: bytes) -> None:
    """What is whole stays; only a last line without its end goes, also one that lacks nothing else."""
    (tmp_path / "checkpoints" / "one").mkdir(parents=True)
    kept = b'{"step": 1, "loss": 2.0}\n' + between + b'{"step": 2, "loss": 1.5}\n'
    (tmp_path / "x").write_bytes(kept + b'{"step": 3, "loss": 1.25}')
    with tracked(tmp_path / "x", "law", tmp_path, resume=True, reporter=SILENT) as track:
        for step in range(1, 5):
            track.log(step, {"loss": 1.0})
    assert (tmp_path / "x").read_bytes() == kept + b'{"step": 3, "loss": 1.0}\n{"step": 4, "loss": 1.0}\n'


def test_where_nothing_is_to_go_on_from_the_log_is_begun_anew(tmp_path: Path) -> None:
    """As after a run that had finished, or was killed before its first checkpoint: `resume` is given all the same."""
    (tmp_path / "x").write_text('{"step": 100, "held_out/own": 1.0}\n')
    with tracked(tmp_path / "x", "law", tmp_path / "work", resume=True, reporter=SILENT) as track:
        run(track)
    assert [line["step"] for line in lines(tmp_path / "x")] == [1, 2, 3, 4, 5, 6]


def test_begun_anew_it_forgets(tmp_path: Path) -> None:
    for _ in range(2):
        log(tmp_path / "x")
    assert len(lines(tmp_path / "x")) == 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_killed_run_leaves_every_step_that_it_made(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with tracked(tmp_path / "x", "law", tmp_path, resume=False, reporter=SILENT) as track:
            for step in range(1, 4):
                track.log(step, {"loss": 1 / step})
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert lines(tmp_path / "x") == [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no such device")
    listener = Listener()
    with tracked(Path("/dev/full"), "law", tmp_path, resume=False, reporter=listener) as track:
        assert len(run(track).losses) == 6
    assert listener.warnings == [
        "/dev/full: cannot be written (No space left on device); the log ends here, the run goes on"
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="makes a pipe")
def test_it_is_never_text_and_never_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "law").mkdir()
    for named in (tmp_path / "law", tmp_path / "law" / "law.track.jsonl", tmp_path):
        with pytest.raises(UsageError, match=r"law\.track\.jsonl would be among the text of") as caught:
            log_beside(tmp_path / "law" / "law.st", [tmp_path / "other", named])
        assert caught.value.field == "output"
    assert log_beside(tmp_path / "law.st", [tmp_path / "law", Path("hf://datasets/a/b")]).parent == tmp_path
    os.mkfifo(tmp_path / "pipe.track.jsonl")
    with pytest.raises(UsageError, match=r"pipe\.track\.jsonl: is a pipe"):
        log_beside(tmp_path / "pipe.st", [])


@pytest.mark.parametrize("name", ["law.st", "law-1.5", "anchor"])
def test_it_lies_beside_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert log_beside(tmp_path / name, []) == tmp_path / f"{name.removesuffix('.st')}.track.jsonl"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert log_beside(Path(), []) == tmp_path / "here.track.jsonl"
    (tmp_path / "here.track.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"here\.track\.jsonl: is a directory"):
        log_beside(Path(), [])


def test_a_dense_model_has_no_rows_to_watch() -> None:
    rows = RowLogits(tiny.make_golden_model())
    assert not rows.is_on


class Stub(ModuleType):
    """Stands in for trackio: a module whose ``init`` returns it as the run."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.__spec__ = ModuleSpec("trackio", None)
        self.asked: dict[str, Any] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **asked: Any) -> Stub:
        print("a library that talks")
        self.asked = asked
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.logged.append((step, figures))

    def finish(self) -> None:
        print("goodbye")
        self.finished += 1


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()
    monkeypatch.setitem(sys.modules, "trackio", found)
    return found


@pytest.mark.parametrize("resume", [False, True])
def test_trackio_hears_the_same_and_says_nothing(
    tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str], resume: bool
) -> None:
    listener = Listener()
    (tmp_path / "checkpoints" / "one").mkdir(parents=True)
    with tracked(tmp_path / "x", "law", tmp_path, resume=resume, reporter=listener) as track:
        track.held_out(0, {"own": 1.5})
        run(track)
    assert [{"step": step, **figures} for step, figures in stub.logged] == lines(tmp_path / "x")
    assert (stub.asked["project"], stub.asked["name"], stub.finished) == ("flexctl", "law", 1)
    assert stub.asked["resume"] == ("allow" if resume else "never")
    assert not {"space_id", "server_url", "dataset_id"} & set(stub.asked)
    assert not any(stub.asked[name] for name in ("auto_log_gpu", "auto_log_cpu", "embed"))
    assert capsys.readouterr() == ("", "")
    assert listener.notes == [f"log: {tmp_path / 'x'} and trackio"]


@pytest.mark.parametrize("variable", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_is_left_out_where_it_would_send_figures_away(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "somewhere")
    listener = Listener()
    with tracked(tmp_path / "x", "law", tmp_path, resume=False, reporter=listener) as track:
        run(track)
    assert stub.asked == {}
    assert len(lines(tmp_path / "x")) == 6
    assert [variable in warning for warning in listener.warnings] == [True]


def test_nobody_asked_means_no_log_and_no_import(stub: Stub) -> None:
    with tracked(None, "law", Path(), resume=False, reporter=SILENT) as track:
        run(track)
    assert stub.asked == {}
    assert not track.is_on


REAL = """
import sys
from pathlib import Path
from flexctl.runtime import SILENT
from flexctl.training.track import tracked

work = Path(sys.argv[1]).parent
(work / "checkpoints" / "one").mkdir(parents=True)
for resume, steps in ((False, 3), (True, 5)):
    with tracked(Path(sys.argv[1]), "law", work, resume=resume, reporter=SILENT) as track:
        for step in range(1, steps + 1):
            track.log(step, {"loss": 1 / step, "router_logit/own": -0.5})
"""


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_itself_keeps_a_run_that_goes_on_as_one_and_prints_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", REAL, str(tmp_path / "x")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    with closing(sqlite3.connect(tmp_path / "kept" / "flexctl.db")) as kept:
        found = kept.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, {"step": step, **json.loads(figures)}) for name, step, figures in found] == [
        ("law", line) for line in lines(tmp_path / "x")
    ]
