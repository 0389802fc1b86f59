"""Checkpoints of a training run: parameters, optimiser state, random state and losses in one safetensors file.

A checkpoint is written beside its place, flushed and renamed, and carries a digest of its tensors, so a file that
exists under its name is either whole or recognised as broken and passed over. Rate and batch are functions of the step,
which is the number of losses. Several processes write a folder in place of the file; either is read by any number.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError, system_error
from flexctl.model.sharding import rows_like
from flexctl.model.tensors import tensors_digest
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.training.shards import Writing, about_shards, begin_shards, read_shards

__all__ = ["Checkpoints", "TrainingState"]

_EVERY_S, _COST = 300.0, 0.02
"""Where nobody says how often: each time that a run could lose so much, but for at most this share of its time."""

_ROUNDING = 1e-5

_FILE, _SHARDS = ".safetensors", ".shards"

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds: the trained parameters, AdamW's state for each, and where torch's random numbers are."""

    parameters: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        found = {"random": torch.get_rng_state()}
        if (device := self.parameters[0].device).type == "cuda":
            found["random.device"] = torch.cuda.get_rng_state(device)
        for i, parameter in enumerate(self.parameters):
            found[f"{i}.parameter"] = parameter.detach()
            found |= {f"{i}.{name}": value for name, value in self.optimiser.state[parameter].items()}
        return found

    def takes(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether every parameter is among ``tensors``, in its shape."""
        found = [tensors.get(f"{i}.parameter") for i in range(len(self.parameters))]
        return all(
            kept is not None and kept.shape == parameter.shape
            for kept, parameter in zip(found, self.parameters, strict=True)
        )

    def load(self, tensors: Mapping[str, Tensor], world: World = ALONE) -> None:
        """Take everything back, in place; of a parameter that is sharded, this process's rows."""
        if "random" in tensors:
            torch.set_rng_state(tensors["random"])
        if "random.device" in tensors and (device := self.parameters[0].device).type == "cuda":
            torch.cuda.set_rng_state(tensors["random.device"], device)
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(rows_like(parameter, tensors[f"{i}.parameter"], world))
            self.optimiser.state[parameter] = {
                # A fused step counts where it works.
                name: rows_like(parameter, tensors[f"{i}.{name}"], world).clone().to(parameter.device)
                for name in _MOMENTS
                if f"{i}.{name}" in tensors  # an expert that no token chose yet has none
            }


class Checkpoints:
    """A directory of checkpoints of one run: the newest, and the one before it in case the newest is broken.

    One may be written while training goes on, and never two. It is waited for when the ``with`` statement ends.

    Args:
        folder: Where they are; made when missing.
        settings: Everything that decides the run's result. A checkpoint of other settings is refused.
        every_steps: How often one is written; None for by time.
        resume: Whether to go on from the last one. Without it, those that are there are removed.
        reporter: Told about resuming, about broken files and about what could not be written.
        world: The processes of the run.

    Attributes:
        folder: As given.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        every_steps: int | None,
        resume: bool,
        reporter: Reporter,
        world: World = ALONE,
    ) -> None:
        self.folder, self._every, self._reporter, self._world = folder, every_steps, reporter, world
        self._newest: int | None = None
        self._writing: Writing | None = None
        self._waited_s = 0.0
        self._next_s = time.monotonic() + _EVERY_S
        self._settings = json.loads(json.dumps(settings, sort_keys=True))
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and (old := self._paths()):
            reporter.warn(f"{old[-1]} of a run that was stopped is dropped; `resume` would have gone on from it")
            world.by_writer(lambda: _remove(old))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Of a run that fails, it is told why, and not what became of a checkpoint for want of the others.
        with suppress(*(() if error is None else (OSError, RuntimeError))):
            self._settle()

    @property
    def newest(self) -> int | None:
        """The step of the newest whole one, if need be after waiting for it; None where there is none."""
        self._settle()
        return self._newest

    def _paths(self) -> list[Path]:
        """Return the checkpoints, oldest first, as the writer sees them."""
        return self._world.by_writer(self._found)

    def _found(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("checkpoint-*")) if path.suffix in (_FILE, _SHARDS)]

    def _read(self, path: Path, state: TrainingState) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Return what a checkpoint is of and its tensors; None where it is not whole."""
        if path.suffix == _SHARDS:
            about = self._world.by_writer(lambda: about_shards(path))
            return about, read_shards(path, state.parameters, self._world) if about else {}
        read = _read_file(path)
        (is_broken,) = self._world.most(read is None)
        return (None, {}) if read is None or is_broken else read

    def restore(self, state: TrainingState) -> list[float]:
        """Load the newest whole checkpoint into ``state`` and return the losses so far (empty: from the start).

        Raises:
            UsageError: The checkpoint belongs to a run with other settings.
        """
        for path in reversed(self._paths()):
            about, tensors = self._read(path, state)
            if about is None:
                self._reporter.warn(f"{path.name} is broken and is passed over")
                continue
            self._refuse_other_settings(path, about["settings"])
            if path.suffix == _FILE and not state.takes(tensors):
                self._reporter.warn(f"{path.name} is of another version of flexctl and is passed over")
                continue
            state.load(tensors, self._world)
            self._newest = len(about["losses"])
            self._reporter.note(f"going on after step {len(about['losses'])} ({path.name})")
            return list(about["losses"])
        return []

    def _refuse_other_settings(self, path: Path, theirs: Mapping[str, Any]) -> None:
        for name in sorted(set(theirs) | set(self._settings)):
            if not _agree(theirs.get(name), self._settings.get(name)):
                raise UsageError(
                    f"{path}: that run had {name} = {theirs.get(name)!r}, this one has {self._settings.get(name)!r}",
                    hint="use the same settings and data, or start again without `resume`",
                )

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether a checkpoint belongs after ``step`` of ``steps`` steps, and see to the one under way."""
        if self._writing is not None and self._writing.is_done():
            self._settle()
        if step == steps:
            return False
        return time.monotonic() >= self._next_s if self._every is None else step % self._every == 0

    def save(self, step: int, state: TrainingState, losses: Sequence[float], check: Callable[[], None]) -> None:
        """Write a checkpoint after ``step`` steps, or begin to; once it is there, drop all but the one before it.

        Where it cannot be written, as on a full disk, those that are there stay, and the run goes on with a warning.

        Args:
            step: Steps done.
            state: What to keep.
            losses: One a step.
            check: Called first; it raises where the run may not be kept. Its time is part of what a checkpoint costs.
        """
        self._settle()
        started_s = time.monotonic()
        check()
        self._writing = self._begin(self.folder / f"checkpoint-{step:08d}", state.tensors(), losses)
        self._waited_s, self._next_s = time.monotonic() - started_s, math.inf
        if self._writing.is_done():
            self._settle()

    def _begin(self, path: Path, tensors: dict[str, Tensor], losses: Sequence[float]) -> Writing:
        if self._world.size == 1:
            path = path.with_suffix(_FILE)
            return Writing(path, partial(_write, path, self._settings, tensors, losses), lambda: True)
        about = {"settings": self._settings, "losses": list(losses)}
        return begin_shards(path.with_suffix(_SHARDS), about, tensors, self._world)

    def _settle(self) -> None:
        """Wait for what is being written, and say where it could not be; without a word to the other processes."""
        if self._writing is None:
            return
        writing, self._writing, started_s = self._writing, None, time.monotonic()
        try:
            writing.end()
        except OSError as error:
            kept = "there is none yet" if self._newest is None else f"that of step {self._newest} stays"
            self._reporter.warn(f"{writing.path}: cannot be written ({error.strerror}); {kept}, and training goes on")
        else:
            if self._world.is_writer:
                self._remove_all_but(writing.path)
            self._newest = _step_of(writing.path)
        ended_s = time.monotonic()
        self._next_s = ended_s + max(_EVERY_S, (self._waited_s + ended_s - started_s) / _COST)

    def _remove_all_but(self, newest: Path) -> None:
        """Keep ``newest`` and the one before it; those behind it were broken, or it would not have been written."""
        paths = self._found()
        before = [path for path in paths if path < newest]
        _remove({*paths} - {newest, *before[-1:]})


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint-"))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.suffix == _FILE:
            path.unlink()
        else:
            shutil.rmtree(path)


def _agree(one: Any, other: Any) -> bool:
    """Return whether two settings are one; lists of numbers were measured, which several processes round otherwise."""
    if not (_is_measured(one) and _is_measured(other) and len(one) == len(other)):
        return bool(one == other)
    return all(math.isclose(a, b, rel_tol=_ROUNDING) for a, b in zip(one, other, strict=True))


def _is_measured(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, float) for item in value)


def _write(path: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor], losses: Sequence[float]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {"settings": settings, "losses": list(losses), "sha256": tensors_digest(tensors)}
    with new_file(path, overwrite=True) as temporary:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(whole, temporary, {"run": json.dumps(about)})
        except SafetensorError as error:
            raise system_error(error) or error from None


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Return what a checkpoint is of, and its tensors; None where it is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = {"settings": dict(about["settings"]), "losses": list(about["losses"])}
        return (found, tensors) if tensors_digest(tensors) == about["sha256"] else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
