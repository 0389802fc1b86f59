"""Dense models whose every weight trains: built from a checkpoint's tensors, and written as a checkpoint again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexctl.errors import Saving
from flexctl.model.attention import register_attention
from flexctl.model.building import quiet_transformers
from flexctl.model.sharding import HEAD, shard_whole, whole
from flexctl.model.tensors import RawBytes
from flexctl.processes import ALONE, World

__all__ = ["build_dense", "save_dense"]


def build_dense(
    dense_config: Mapping[str, Any],
    tensors: Mapping[str, RawBytes],
    *,
    device: torch.device,
    runs_in: torch.dtype | None = None,
    world: World = ALONE,
) -> Any:
    """Return a dense Transformers model in float32 that is to train, shared out over processes.

    No process reads more of a weight than its own rows.

    Args:
        dense_config: The model's config.json.
        tensors: Its weights by name; without a head that is the embedding.
        device: Where this process runs.
        runs_in: Dtype of layers' products where there are several processes; None for float32.
        world: The processes.
    """
    import transformers

    config = transformers.AutoConfig.for_model(**dict(dense_config))
    config.dtype = config.dtype or torch.float32
    config._attn_implementation = register_attention()
    dense = _empty_dense(config, has_head=HEAD in tensors)
    shard_whole(dense, tensors, device=device, runs_in=runs_in, world=world)
    return dense


def save_dense(dense: Any, folder: Path, world: World = ALONE) -> None:
    """Write a model that ``build_dense`` made as a stock checkpoint, in the dtype that its config names.

    Args:
        dense: The model.
        folder: The directory, as the writer sees it.
        world: The processes that share the model; one writes.
    """
    tensors = {}
    for name, parameter in dense.named_parameters():
        tensor = whole(parameter.detach())
        if world.is_writer:
            tensors[name] = tensor.to("cpu", dense.config.dtype)

    def write() -> None:
        plain = _empty_dense(dense.config, has_head=HEAD in tensors)
        plain.load_state_dict(tensors, strict=False, assign=True)
        if HEAD not in tensors:
            plain.lm_head.weight = plain.model.embed_tokens.weight
        with quiet_transformers(), Saving(folder):
            plain.save_pretrained(folder)

    world.by_writer(write)


def _empty_dense(config: Any, *, has_head: bool) -> Any:
    """Return a dense model in float32 on the meta device; its head is the embedding if it has none of its own."""
    import transformers

    with torch.device("meta"):
        dense = transformers.AutoModelForCausalLM.from_config(config).float()
        if has_head:  # also where the config says otherwise: Transformers keeps a head that differs
            dense.lm_head.weight = nn.Parameter(torch.empty_like(dense.lm_head.weight))
    return dense
