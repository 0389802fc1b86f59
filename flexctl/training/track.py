"""Watching a run: a line of JSON for each step as it is done, and the same in trackio where that is installed.

A log has figures and no text, is no part of what is made, and stays on this machine.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flexctl.bundle.codec import parse_json
from flexctl.bundle.store import check_file_target
from flexctl.errors import BundleError, UsageError
from flexctl.model.routed import routed_layers
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.text import refuse_among
from flexctl.training.work import has_checkpoints

__all__ = ["UNTRACKED", "RowLogits", "Track", "log_beside", "tracked"]

_ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")
_HELD_OUT = "held_out/"

Sink = Callable[[int, Mapping[str, float]], None]


class Track:
    """Where a run's figures go.

    Args:
        sinks: Called with a step and its figures.
        last: Of what is there already: (step, whether it is held-out loss). A run that goes on repeats steps, with the
            same figures; they are not written twice.
    """

    def __init__(self, sinks: tuple[Sink, ...] = (), last: tuple[int, bool] = (-1, False)) -> None:
        self._sinks, self._last = sinks, last

    @property
    def is_on(self) -> bool:
        """Whether anybody watches."""
        return bool(self._sinks)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of the ``step``-th step; those that are not finite are left out."""
        self._write((step, False), figures)

    def held_out(self, step: int, losses: Mapping[str, float]) -> None:
        """Write held-out losses after ``step`` steps, nats a token by part of the text."""
        if losses:
            self._write((step, True), {f"{_HELD_OUT}{part}": loss for part, loss in losses.items()})

    def _write(self, place: tuple[int, bool], figures: Mapping[str, float]) -> None:
        if place <= self._last:
            return
        self._last = place
        for sink in self._sinks:
            sink(place[0], {name: value for name, value in figures.items() if math.isfinite(value)})


UNTRACKED = Track()


def log_beside(target: Path, texts: Iterable[Path]) -> Path:
    """Return where the log of what is made at ``target`` belongs: NAME.track.jsonl beside it.

    Args:
        target: What is made.
        texts: Files and folders that are read: a log among them would be text when the run goes on.

    Raises:
        UsageError: Nothing can be written there, or it would be read as text.
    """
    place = Path(os.path.realpath(target))
    log = check_file_target(place.with_name(f"{place.name.removesuffix('.st')}.track.jsonl"), overwrite=True)
    if log.is_fifo():
        raise UsageError(f"{log}: is a pipe; expected a file to write", field="track")
    refuse_among(log, texts, "output")
    return log


@contextmanager
def tracked(
    path: Path | None, name: str, work: Path, *, resume: bool, reporter: Reporter, world: World = ALONE
) -> Iterator[Track]:
    """Give what writes a run's log inside the ``with`` statement.

    Args:
        path: The log; None for none. Gone on with where the run goes on, else begun anew.
        name: Of the run, in trackio's project ``flexctl``.
        work: Its working folder: where that holds no checkpoint, no run goes on.
        resume: Whether it may.
        reporter: Hears where the log is.
        world: The processes of the run, whose figures are the same; one writes them.
    """
    if path is None:
        yield UNTRACKED
        return
    if not world.is_writer:
        yield Track((lambda _step, _figures: None,))
        return
    resume = resume and has_checkpoints(work)
    last = _cut(path) if resume and path.exists() else (-1, False)
    with ExitStack() as open_ones:
        sinks: list[Sink] = [_Lines(path, open_ones, resume=resume, reporter=reporter)]
        if _keeps_here(reporter):
            sinks.append(open_ones.enter_context(_trackio(name, resume=resume)))
        reporter.note(f"log: {path}{' and trackio' if len(sinks) > 1 else ''}")
        yield Track(tuple(sinks), last)


class RowLogits:
    """Logits of router rows in the forward pass just made: of the closed experts' largest, mean over layers.

    Args:
        model: Watched until ``close``.

    Attributes:
        is_on: Whether there is anything to watch; in a dense model there is not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, Tensor] = {}
        blocks = routed_layers(model)
        self._watching = [
            block.router.register_forward_hook(partial(self._keep, layer)) for layer, block in enumerate(blocks)
        ]
        self.is_on = bool(blocks)

    def _keep(self, layer: int, _module: nn.Module, _inputs: object, logits: Tensor) -> None:
        self._found[layer] = logits.detach()[:, 1:].amax(dim=1)

    def take(self, sequences: int) -> Tensor:
        """Return the mean of each of ``sequences`` sequences, (B,)."""
        tokens: Tensor = torch.stack(list(self._found.values())).mean(dim=0)
        return tokens.view(sequences, -1).mean(dim=1)

    def close(self) -> None:
        """Stop watching."""
        for watch in self._watching:
            watch.remove()


class _Lines:
    """The file: a line is in the system's hands when the step is over. A full disk ends the log and not the run.

    It is opened for the first line, so that a run that fails before leaves an earlier log, or none, as it was.
    """

    def __init__(self, path: Path, open_ones: ExitStack, *, resume: bool, reporter: Reporter) -> None:
        self._path, self._open_ones, self._reporter = path, open_ones, reporter
        self._mode = "ab" if resume else "wb"
        self._file: io.FileIO | None = None
        self._is_whole = True

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        if not self._is_whole:
            return
        line = json.dumps({"step": step, **figures}).encode() + b"\n"
        try:
            if self._file is None:
                self._file = self._open_ones.enter_context(io.FileIO(self._path, self._mode))
            self._is_whole, reason = self._file.write(line) == len(line), os.strerror(errno.ENOSPC)
        except OSError as error:
            self._is_whole, reason = False, str(error.strerror)
        if not self._is_whole:
            self._reporter.warn(f"{self._path}: cannot be written ({reason}); the log ends here, the run goes on")


def _cut(path: Path) -> tuple[int, bool]:
    """Return where a log ends, as ``Track`` has it, and cut off a last line that was not finished."""
    last, end = (-1, False), 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                last, end = _place(line, path) or last, end + len(line)
    os.truncate(path, end)
    return last


def _place(line: bytes, path: Path) -> tuple[int, bool] | None:
    """Return the place of a log's line; None where somebody wrote something else there."""
    with suppress(BundleError):
        about = parse_json(line, str(path))
        if isinstance(about, dict) and isinstance(about.get("step"), int):
            return about["step"], any(name.startswith(_HELD_OUT) for name in about)
    return None


def _keeps_here(reporter: Reporter) -> bool:
    """Return whether trackio is there and keeps what it is told on this machine."""
    if importlib.util.find_spec("trackio") is None:
        return False
    for name in _ELSEWHERE:
        if os.environ.get(name):
            reporter.warn(f"{name} is set, so trackio would send figures of your text away: it is left out")
            return False
    return True


@contextmanager
def _trackio(name: str, *, resume: bool) -> Iterator[Sink]:
    with redirect_stdout(io.StringIO()):
        import trackio

        run = trackio.init(
            project="flexctl",
            name=name,
            resume="allow" if resume else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
    try:
        yield lambda step, figures: run.log(dict(figures), step=step)
    finally:
        with redirect_stdout(io.StringIO()):
            trackio.finish()
