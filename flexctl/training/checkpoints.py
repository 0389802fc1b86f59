"""Checkpoints of a training run: parameters, optimiser state and losses in one safetensors file.

A checkpoint is written beside its place, flushed and renamed, and carries a digest of its tensors, so a file that
exists under its name is either whole or recognised as broken and passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError, system_error
from flexctl.model.tensors import tensors_digest
from flexctl.runtime import Reporter

__all__ = ["Checkpoints", "TrainingState"]

_KEPT = 2
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What a checkpoint holds: the trained parameters and AdamW's state for each."""

    parameters: Sequence[nn.Parameter]
    optimiser: torch.optim.Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by name."""
        found: dict[str, Tensor] = {}
        for i, parameter in enumerate(self.parameters):
            found[f"{i}.parameter"] = parameter.detach()
            found |= {f"{i}.{name}": value for name, value in self.optimiser.state[parameter].items()}
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take everything back, in place."""
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{i}.parameter"])
            self.optimiser.state[parameter] = {
                name: tensors[f"{i}.{name}"].clone().to(parameter.device)  # a fused step counts where it works
                for name in _MOMENTS
                if f"{i}.{name}" in tensors  # an expert that no token chose yet has none
            }


class Checkpoints:
    """A directory of checkpoints of one run.

    Args:
        folder: Where they are; made when missing.
        settings: Everything that decides the run's result. A checkpoint of other settings is refused.
        every_steps: How often one is written; None for never.
        resume: Whether to go on from the last one. Without it, those that are there are removed.
        reporter: Told about resuming and about broken files.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        every_steps: int | None,
        resume: bool,
        reporter: Reporter,
    ) -> None:
        self._folder, self._every, self._reporter = folder, every_steps, reporter
        self._settings = json.loads(json.dumps(settings, sort_keys=True))
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in self._paths():
                path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob("checkpoint-*.safetensors"))

    def restore(self, state: TrainingState) -> list[float]:
        """Load the newest whole checkpoint into ``state`` and return the losses so far (empty: from the start).

        Raises:
            UsageError: The checkpoint belongs to a run with other settings.
        """
        for path in reversed(self._paths()):
            read = _read(path)
            if read is None:
                self._reporter.warn(f"{path.name} is broken and is passed over")
                continue
            about, tensors = read
            self._refuse_other_settings(path, about["settings"])
            state.load(tensors)
            self._reporter.note(f"going on after step {len(about['losses'])} ({path.name})")
            return list(about["losses"])
        return []

    def _refuse_other_settings(self, path: Path, theirs: Mapping[str, Any]) -> None:
        for name in sorted(set(theirs) | set(self._settings)):
            if theirs.get(name) != self._settings.get(name):
                raise UsageError(
                    f"{path}: that run had {name} = {theirs.get(name)!r}, this one has {self._settings.get(name)!r}",
                    hint="use the same settings and data, or start again without `resume`",
                )

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether a checkpoint belongs after ``step`` of ``steps`` steps."""
        return self._every is not None and step != steps and step % self._every == 0

    def save_when_due(self, step: int, steps: int, state: TrainingState, losses: Sequence[float]) -> None:
        """Write a checkpoint after ``step`` steps if one is due, and drop the oldest."""
        if not self.is_due(step, steps):
            return
        _write(self._folder / f"checkpoint-{step:08d}.safetensors", self._settings, state.tensors(), losses)
        for path in self._paths()[:-_KEPT]:
            path.unlink()


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    return (about, tensors) if tensors_digest(tensors) == about["sha256"] else None
