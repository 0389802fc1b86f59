"""What test_processes.py does in one process, and in several: as a script under torchrun it writes what each finds."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny
import torch

from flexctl.cli.app import main
from flexctl.evaluation.scoring import held_out_losses
from flexctl.model import presets
from flexctl.model.building import build_sharded, moved_tensors
from flexctl.model.dense import build_dense, save_dense
from flexctl.model.recompute import recompute_layers
from flexctl.processes import Joined, World
from flexctl.runtime import Progress, SilentReporter
from flexctl.text.tokens import Framed, TokenStream
from flexctl.training import shards, whole
from flexctl.training.batches import Mixture
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, train
from flexctl.training.pair import Pair
from flexctl.training.track import Track
from flexctl.training.whole import WholeSettings, train_whole

STEPS, STOP = 4, 3

CASES: dict[str, dict[str, Any]] = {
    "full": {"family": "olmo2"},
    "low-rank": {"family": "llama", "tied": True, "rank": 1},
    "recomputed": {"family": "qwen3", "tied": True, "recompute": True},
    "low-rank, recomputed": {"family": "mistral", "rank": 3, "recompute": True},
}
"""Every family, full and low-rank, head tied and not; batches of four are cut so that two have uneven parts."""

WHOLE: dict[str, dict[str, Any]] = {
    "olmo2": {"family": "olmo2"},
    "head tied": {"family": "qwen3", "tied": True},
    "head tied by its config alone": {"family": "llama", "tied": True, "has_head": True},
    "bfloat16": {"family": "mistral", "autocast": torch.bfloat16},
}
"""Every weight trains; of batches of five sequences, one at a time goes through each process."""

NANO = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 300}


class Bytes:
    """The bytes of a tensor, which notice what share of them is read at most."""

    def __init__(self, data: Any) -> None:
        self._data, self.read = data, 0.0

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> Any:
        found = self._data[part]
        self.read = max(self.read, len(found) / len(self._data))
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        self.read = 1.0
        return np.array(self._data, dtype=dtype)


class Raw:
    """A tensor as bundles hand it over, whose bytes are watched."""

    def __init__(self, raw: Any) -> None:
        self.dtype, self.shape, self.data = raw.dtype, raw.shape, Bytes(raw.data)


class Killed(Exception):
    """Stands for a kill."""


class Stopping(SilentReporter):
    """Calls a function when training has made so many steps."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self._left, self._act = step, act

    def progress(self, _title: str, _total: float, _unit: str, /) -> AbstractContextManager[Progress]:
        return nullcontext(self)

    def advance(self, amount: float, **figures: float | str) -> None:
        if amount and "loss" in figures:
            self._left -= 1
            if not self._left:
                self._act()


def train_pair(
    world: World,
    *,
    family: str,
    tied: bool = False,
    rank: int | None = None,
    recompute: bool = False,
    checkpoints: Checkpoints | None = None,
    stop: Callable[[], None] = lambda: None,
    reporter: Any = None,
) -> dict[str, Any]:
    """Train an expert for some steps and return all that can be seen of it."""
    weights = tiny.make_weights(tiny.dense_config(family, tie_word_embeddings=tied))
    weights.shared = {name: Raw(raw) for name, raw in weights.shared.items()}
    weights.experts = {"public": {name: Raw(raw) for name, raw in weights.experts["public"].items()}}
    own = TokenStream(np.array([(i * i + 3 * i) % 300 + 2 for i in range(400)], dtype=np.int32))
    public = TokenStream(np.array([(i * 7) % 300 + 2 for i in range(200)], dtype=np.int32))
    data = Mixture(own, public, seq_len=16, batch_size=4, public_share=0.25, seed=0)
    model: Any = build_sharded(weights, device=torch.device("cpu"), dtype=torch.float32, world=world)
    read = {name: raw.data.read for name, raw in (weights.shared | weights.experts["public"]).items()}
    rows = tiny.scrambled((2, 32), 5, 0.5)
    pair = Pair(model, rows, public_match=1.0, rank=rank, seed=3, world=world)
    if recompute:
        recompute_layers(model)
    outcome = train(
        model,
        pair.groups(),
        data,
        LoopSettings(steps=STEPS, lr=1e-2, warmup_steps=1, micro_batch=3),
        reporter=reporter or Stopping(STOP, stop),
        match=pair.match,
        checkpoints=checkpoints,
        world=world,
    )
    tensors = pair.round_weights("F32", weights.experts["public"])
    documents = [Framed(tokens=ids.numpy(), num_bytes=40) for ids in tiny.some_tokens(3, 41)]
    held_out = held_out_losses(model, {"own": documents}, seq_len=16, reporter=SilentReporter(), world=world)
    moved = moved_tensors(model, weights, world)
    return {"losses": outcome.losses, "tensors": tensors, "held_out": held_out["own"], "moved": moved, "read": read}


def train_all(
    world: World,
    folder: Path,
    *,
    family: str,
    tied: bool = False,
    has_head: bool = False,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Train every weight of a model for some steps, and return losses, gradients' norms and what is saved."""
    config = tiny.dense_config(family, tie_word_embeddings=tied)
    tensors = {name: Raw(tiny.raw(value)) for name, value in tiny.make_dense(config).named_parameters()}
    if has_head:
        tensors["lm_head.weight"] = Raw(tiny.raw(tiny.scrambled((tiny.VOCAB_SIZE, 32), 9, 0.2)))
    model = build_dense(config, tensors, device=torch.device("cpu"), runs_in=autocast, world=world)
    read = {name: raw.data.read for name, raw in tensors.items()}
    stream = TokenStream(np.array([(i * i + 3 * i) % 300 + 2 for i in range(400)], dtype=np.int32))
    settings = WholeSettings(max_tokens=STEPS * 5 * 16, seq_len=16, batch_tokens=5 * 16, lr=1e-2, seed=0)
    steps: list[dict[str, float]] = []
    whole._MICRO_BATCH_TOKENS = 16
    train_whole(
        model,
        stream,
        settings,
        work=folder,
        resume=False,
        autocast=autocast,
        reporter=SilentReporter(),
        track=Track((lambda _, figures: steps.append(dict(figures)),)),
        world=world,
    )
    save_dense(model, folder / "saved", world)
    return {"losses": [step["loss"] for step in steps], "norms": [step["grad_norm"] for step in steps], "read": read}


def checkpoints_in(folder: Path, world: World, *, resume: bool, reporter: Any = None) -> Checkpoints:
    settings = {"lr": 0.01, "rows": [1.0 + 1e-7 * world.size]}
    reporter = reporter or SilentReporter()
    return Checkpoints(folder, settings, every_steps=1, resume=resume, reporter=reporter, world=world)


def kill_a_run(world: World, folder: Path) -> None:
    """Train a low-rank expert, and stop in the midst of it."""

    def kill() -> None:
        raise Killed

    with contextlib.suppress(Killed):
        train_pair(world, **CASES["low-rank"], checkpoints=checkpoints_in(folder, world, resume=False), stop=kill)


@contextlib.contextmanager
def writing_aside(act: Callable[[int], None]) -> Iterator[list[str]]:
    """Let checkpoints be written while training goes on, as on a card; ``act`` is done before the n-th is written.

    Gives the names of the threads that write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, threads = FileSystemWriter.write_data, list[str]()

    def write_data(self: Any, *given: Any) -> Any:
        threads.append(threading.current_thread().name)
        act(len(threads))
        return write(self, *given)

    with (
        mock.patch.object(shards, "_goes_on", return_value=True),
        mock.patch.object(FileSystemWriter, "write_data", write_data),
    ):
        yield threads


class Overtaking(Stopping):
    """Lets a checkpoint be written when a step has been made that comes after it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(-1, lambda: None)
        self.warnings: list[str] = []
        self.there: list[list[str]] = []
        self.parts: list[str] = []
        self.made, self._folder = threading.Semaphore(0), folder

    def advance(self, amount: float, **figures: float | str) -> None:
        if amount and "loss" in figures:
            self.there.append(sorted(path.name for path in self._folder.iterdir() if path.name.startswith("check")))
            self.made.release()

    def warn(self, text: str, /) -> None:
        self.warnings.append(text)
        self.parts += [path.name for path in self._folder.glob(".*")]


def train_on(world: World, folder: Path, *, fails_at: int = 0) -> dict[str, Any]:
    """Train a low-rank expert, whose checkpoints are written when the next step has been made.

    Args:
        world: The processes.
        folder: Of the checkpoints.
        fails_at: In which checkpoint the second process finds a full disk.
    """
    reporter = Overtaking(folder)

    def write(number: int) -> None:
        for _ in range(2 if number == 1 else 1):
            assert reporter.made.acquire(timeout=60), "training waits for what is written"
        if number == fails_at and world.rank == 1:
            raise OSError(28, "No space left on device")

    checkpoints = checkpoints_in(folder, world, resume=False, reporter=reporter)
    with writing_aside(write) as threads:
        found = train_pair(world, **CASES["low-rank"], checkpoints=checkpoints, reporter=reporter)
    last = sorted(path.name for path in folder.iterdir())
    said = {"warnings": reporter.warnings, "parts": reporter.parts}
    return found | said | {"threads": threads, "there": reporter.there, "last": last}


def go_on(world: World, folder: Path, reporter: Any = None) -> dict[str, Any]:
    """Go on with a run that was killed, and return what is seen of it at its end."""
    checkpoints = checkpoints_in(folder, world, resume=True, reporter=reporter)
    return train_pair(world, **CASES["low-rank"], checkpoints=checkpoints)


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a command and return its exit code and what it says on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def train_expert(anchor: Path, data: Path, output: Path) -> tuple[int, str, str]:
    sizes = ("--max-steps", 4, "--seq-len", 32, "--batch-tokens", 256, "--checkpoint-steps", 2)
    return run("train-expert", "--data", data, "--anchor", anchor, "-o", output, *sizes, "--track", "--json")


def evaluate(anchor: Path, data: Path, expert: Path) -> tuple[int, str, str]:
    return run("evaluate", expert, "--anchor", anchor, "--data", f"x={data}", "--seq-len", 32, "--json")


def init_anchor(checkpoint: Path, data: Path, output: Path) -> tuple[int, str, str]:
    given = ("--data", data, "--calibrate", data, "--sample-tokens", 4000, "-o", output)
    return run("init-anchor", checkpoint, *given, "--json")


def anneal(checkpoint: Path, data: Path, output: Path, *more: object) -> tuple[int, str, str]:
    sizes = ("--anneal-tokens", 6 * 160, "--seq-len", 32, "--batch-tokens", 160, "--sample-tokens", 2000, "--lr", 0.01)
    return run("init-anchor", checkpoint, "--data", data, "-o", output, *sizes, "--track", "--json", *more)


def anneal_until(step: int, *arguments: Path) -> tuple[int, str, str]:
    """Anneal, and be told to stop after a step: of several processes, one is told."""
    is_due = Checkpoints.is_due

    def stopping(self: Checkpoints, done: int, steps: int) -> bool:
        if done == step - 1 and os.environ.get("RANK", "1") == "1":
            signal.raise_signal(signal.SIGTERM)
        return is_due(self, done, steps)

    Checkpoints.is_due = stopping  # type: ignore[method-assign]
    try:
        return anneal(*arguments)
    finally:
        Checkpoints.is_due = is_due  # type: ignore[method-assign]


def from_scratch(data: Path, output: Path) -> tuple[int, str, str]:
    presets.PRESETS["nano"] = dataclasses.replace(presets.PRESETS["nano"], **NANO)
    sizes = ("--max-tokens", 4 * 160, "--seq-len", 32, "--batch-tokens", 160, "--sample-tokens", 2000)
    return run("init-anchor", "--preset", "nano", "--data", data, "-o", output, *sizes, "--json")


def share(folder: Path, checkpoint: Path, anchor: Path, data: Path) -> None:
    """Do all of it as one of several processes; the last command fails in one of them alone."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    found: dict[str, Any] = {}
    with Joined("cpu") as world:
        for name, case in CASES.items():
            found[name] = train_pair(world, **case)
        for name, case in WHOLE.items():
            found[f"all, {name}"] = train_all(world, folder / name, **case)
        kill_a_run(world, folder / "killed by several")
        found["gone on"] = go_on(world, folder / "killed by one")
        kill_a_run(world, folder / "killed twice")
        found["gone on by as many"] = go_on(world, folder / "killed twice")
        found["aside"] = train_on(world, folder / "aside")
        found["aside, full"] = train_on(world, folder / "aside, full", fails_at=2)
    found["train-expert"] = train_expert(anchor, data, folder / "shared.st")
    found["evaluate"] = evaluate(anchor, data, folder / "shared.st")
    found["init-anchor"] = init_anchor(checkpoint, data, folder / "shared-anchor")
    found["anneal"] = anneal(checkpoint, data, folder / "annealed")
    with writing_aside(lambda _: time.sleep(0.3)) as threads:
        found["stopped"] = anneal_until(3, checkpoint, data, folder / "stopped")
    found["stopped aside"] = threads
    found["begun by one"] = anneal(checkpoint, data, folder / "begun by one", "--resume")
    found["from scratch"] = from_scratch(data, folder / "from scratch")
    found["exists"] = train_expert(anchor, data, folder / "shared.st")
    found["merge"] = run("merge", folder / "shared.st", "--anchor", anchor)
    torch.save(found, folder / f"found-{rank}.pt")
    code = main(
        [*map(str, ("train-expert", "--anchor", anchor, "-o", folder / "no.st", "--data", (data, "nowhere")[rank]))]
    )
    sys.exit(code)


if __name__ == "__main__":
    share(*map(Path, sys.argv[1:]))
