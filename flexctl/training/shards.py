"""Checkpoints that several processes write together, each its own part, by ``torch.distributed.checkpoint``.

A folder holds torch's files and about.json, which has their hashes. It gets its name when all of it is on disk. As many
processes as there are read it, or one: each takes what it needs from the parts of all.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.bundle.hashing import hash_file
from flexctl.bundle.store import new_file
from flexctl.errors import system_error
from flexctl.processes import World

__all__ = ["about_shards", "read_shards", "write_shards"]

_ABOUT = "about.json"
_LIKE_ITS_PARAMETER = ("parameter", "exp_avg", "exp_avg_sq")


def write_shards(path: Path, about: Mapping[str, Any], tensors: dict[str, Tensor], world: World) -> None:
    """Write a checkpoint of several processes.

    Args:
        path: The folder, which there is not yet.
        about: What it is of, as JSON has it.
        tensors: By name; of those that are sharded each process has a part.
        world: The processes.

    Raises:
        OSError: Some process could not write its part.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    part = path.with_name(f".{path.name}.part")
    world.by_writer(lambda: shutil.rmtree(part, ignore_errors=True))
    try:
        save(tensors, checkpoint_id=part)
    except CheckpointException as error:
        raise _reason(error) from error
    world.by_writer(lambda: _finish(part, path, about))


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


def _finish(part: Path, path: Path, about: Mapping[str, Any]) -> None:
    files = {item.name: hash_file(item) for item in sorted(part.iterdir())}
    with new_file(part / _ABOUT, overwrite=False) as temporary:
        temporary.write_text(json.dumps({**about, "files": files}))
    shutil.rmtree(path, ignore_errors=True)  # a broken one, which was passed over
    part.rename(path)


def _reason(error: Any) -> OSError:
    """Return why a process could not write, of what each says."""
    said = [failure for failure, _ in error.failures.values()]
    found = [one if isinstance(one, OSError) else system_error(one) for one in said]
    return next((one for one in found if one is not None), OSError(0, str(said[0])))
