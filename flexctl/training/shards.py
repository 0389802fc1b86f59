"""Checkpoints that several processes write together, each its own part, by ``torch.distributed.checkpoint``.

A folder holds torch's files and about.json, which has their hashes. It gets its name when all of it is on disk. As many
processes as there are read it, or one: each takes what it needs from the parts of all.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.bundle.hashing import hash_file
from flexctl.bundle.store import new_file
from flexctl.errors import system_error
from flexctl.processes import World

__all__ = ["Writing", "about_shards", "begin_shards", "read_shards"]

_ABOUT, _PART = "about.json", ".part"
_LIKE_ITS_PARAMETER = ("parameter", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Writing:
    """A checkpoint that is being written.

    Attributes:
        path: Its place.
        end: Waits until it is there, or raises an OSError.
        is_done: Whether there is nothing to wait for.
    """

    path: Path
    end: Callable[[], object]
    is_done: Callable[[], bool]


def begin_shards(path: Path, about: Mapping[str, Any], tensors: dict[str, Tensor], world: World) -> Writing:
    """Begin to write a checkpoint of several processes.

    What lies on a card is copied first, and written while training goes on. On a CPU it is written in ``end``: a copy
    would take as much memory again, and the cores that would write are those that train.

    Args:
        path: The folder, which there is not yet; it gets its name when all of it is on the disk.
        about: What it is of, as JSON has it.
        tensors: By name; of those that are sharded each process has a part.
        world: The processes.
    """
    from torch.distributed.checkpoint.state_dict_saver import async_save, save

    part = path.with_name(f".{path.name}{_PART}")
    world.by_writer(lambda: _remove_parts(path.parent))
    place = _place(part, path, about)
    if not _goes_on(tensors):
        wait: Callable[[], object] = partial(save, tensors, storage_writer=place)
        return Writing(path, partial(_ended, wait, path.parent, world), lambda: True)
    saving: Any = async_save(tensors, storage_writer=place, process_group=world.aside)
    return Writing(path, partial(_ended, saving.result, path.parent, world), saving.done)


def about_shards(path: Path) -> dict[str, Any] | None:
    """Return what a checkpoint is of; None where it is not whole."""
    try:
        about: dict[str, Any] = json.loads((path / _ABOUT).read_text())
        hashes = about.pop("files")
        is_whole = all(hash_file(path / name) == value for name, value in hashes.items())
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return about if is_whole else None


def read_shards(path: Path, parameters: Sequence[nn.Parameter], world: World) -> dict[str, Tensor]:
    """Return the tensors of a whole checkpoint by name; of those of a sharded parameter, this process's part.

    Args:
        path: The folder.
        parameters: That ``{i}.parameter`` and so on belong to.
        world: The processes.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    known = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, kind in known.items():
        number, _, what = name.partition(".")
        if what in _LIKE_ITS_PARAMETER:
            tensors[name] = torch.empty_like(parameters[int(number)], requires_grad=False)
        else:
            tensors[name] = torch.empty(kind.size, dtype=kind.properties.dtype)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(tensors, checkpoint_id=path, no_dist=world.size == 1)
    return tensors


def _goes_on(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether training goes on while they are written."""
    return any(tensor.is_cuda for tensor in tensors.values())


def _place(part: Path, path: Path, about: Mapping[str, Any]) -> Any:
    """Return where a checkpoint goes: one folder, which becomes another when every process has written its part."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Place(FileSystemWriter):
        def finish(self, *given: Any, **named: Any) -> None:
            super().finish(*given, **named)
            _name(part, path, about)

    return Place(part)


def _name(part: Path, path: Path, about: Mapping[str, Any]) -> None:
    files = {item.name: hash_file(item) for item in sorted(part.iterdir())}
    with new_file(part / _ABOUT, overwrite=False) as temporary:
        temporary.write_text(json.dumps({**about, "files": files}))
    shutil.rmtree(path, ignore_errors=True)  # a broken one, which was passed over
    part.rename(path)


def _remove_parts(folder: Path) -> None:
    """Take away what was begun and not ended."""
    for part in folder.glob(f".*{_PART}"):
        shutil.rmtree(part, ignore_errors=True)


def _ended(wait: Callable[[], object], folder: Path, world: World) -> None:
    """Wait for a checkpoint, of which every process then knows how it ended; of one that failed nothing stays."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        wait()
    except CheckpointException as error:
        if world.is_writer:
            _remove_parts(folder)
        raise _reason(error) from error


def _reason(error: Any) -> OSError:
    """Return why a process could not write, of what each says."""
    said = [failure for failure, _ in error.failures.values()]
    found = [one if isinstance(one, OSError) else system_error(one) for one in said]
    return next((one for one in found if one is not None), OSError(0, str(said[0])))
