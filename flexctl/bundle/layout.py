"""Which tensors a file with expert weights has, under which keys, in which order, and where they begin.

One rule for an expert's own file and for its file in a merged model, so that the weights lie at the same offset in
both: the tensors begin at the first multiple of 4,096 that holds the *reference header*. That is the header of the
merged model's file with every layer and expert index written in four digits and ``router.weight`` added last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

from flexctl.bundle.codec import indented_json
from flexctl.bundle.headers import header_bytes
from flexctl.bundle.manifest import MANIFEST_KEY, Architecture
from flexctl.bundle.tensors import ITEM_SIZES, TensorType, Typed, size_of
from flexctl.families import PROJECTIONS, Family, feed_forward_names

__all__ = [
    "LOW_RANK_PARTS",
    "ROUTER_TENSOR",
    "expert_head",
    "expert_layout",
    "feed_forward_keys",
    "index_json",
    "merged_expert_head",
    "shared_order",
    "stock_head",
]

ROUTER_TENSOR = "router.weight"
"""An expert's router rows, (num_hidden_layers, hidden_size), F32, in its own file."""

LOW_RANK_PARTS = ("lora_A", "lora_B")
"""Suffixes of a low-rank matrix: A (rank, in), B (out, rank)."""

STOCK_METADATA = {"format": "pt"}
AnyTyped = TypeVar("AnyTyped", bound=Typed)


def expert_layout(
    architecture: Architecture, rank: int | None = None, found: Mapping[str, Typed] | None = None
) -> dict[str, TensorType]:
    """Return the tensors of an expert's file, in the order of their bytes.

    Args:
        architecture: The anchor's.
        rank: Of a low-rank expert, the highest of its matrices; None is a full one.
        found: Its tensors, as far as they are there: a matrix whose A has fewer rows has that rank.

    Returns:
        ``layers.{i}.mlp.{gate,up,down}_proj.weight`` with layers in numeric order (each as ``.lora_A`` and
        ``.lora_B`` in a low-rank expert), then ``router.weight``.
    """
    hidden, inner, dtype = architecture.hidden_size, architecture.intermediate_size, architecture.dtype
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    layout = {}
    for _, projection, name in feed_forward_names(architecture.num_hidden_layers):
        rows, columns = shapes[projection]
        if rank is None:
            layout[name] = TensorType(dtype, (rows, columns))
        else:
            a, b = (f"{name}.{part}" for part in LOW_RANK_PARTS)
            own = _rank_of(found[a], rank) if found and a in found else rank
            layout[a] = TensorType(dtype, (own, columns))
            layout[b] = TensorType(dtype, (rows, own))
    layout[ROUTER_TENSOR] = TensorType("F32", (architecture.num_hidden_layers, hidden))
    return layout


def feed_forward_keys(family: Family, num_hidden_layers: int, index: int) -> dict[str, str]:
    """Return {expert tensor name: key in the merged checkpoint} of expert ``index``, in the order of the bytes."""
    return {
        name: family.expert_key(layer, index, projection)
        for layer, projection, name in feed_forward_names(num_hidden_layers)
    }


def expert_head(family: Family, layout: Mapping[str, TensorType], manifest: str) -> bytes:
    """Return what comes before the tensors in an expert's file.

    Args:
        family: Of its anchor.
        layout: As from ``expert_layout``.
        manifest: The expert's manifest, as text.
    """
    return header_bytes(layout, {MANIFEST_KEY: manifest}, _data_start(family, layout, manifest))


def merged_expert_head(family: Family, architecture: Architecture, index: int, manifest: str | None) -> bytes:
    """Return what comes before the tensors in an expert's file of a merged model.

    Args:
        family: Of the anchor.
        architecture: Of the anchor.
        index: Of the expert.
        manifest: The owner's manifest, verbatim; None for the public expert.
    """
    layout = expert_layout(architecture)
    keys = feed_forward_keys(family, architecture.num_hidden_layers, index)
    tensors = {key: layout[name] for name, key in keys.items()}
    return header_bytes(tensors, _merged_metadata(manifest), _data_start(family, layout, manifest))


def stock_head(tensors: Mapping[str, Typed]) -> bytes:
    """Return what comes before the tensors in a file of ours that has no manifest."""
    return header_bytes(tensors, STOCK_METADATA)


def index_json(weight_map: Mapping[str, str], tensors: Mapping[str, Typed]) -> bytes:
    """Return model.safetensors.index.json.

    Args:
        weight_map: Key -> file.
        tensors: Key -> dtype and shape, by the same keys.
    """
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "total_size": sum(map(size_of, tensors.values())),
    }
    return indented_json({"metadata": metadata, "weight_map": dict(weight_map)})


def shared_order(tensors: Mapping[str, AnyTyped]) -> dict[str, AnyTyped]:
    """Return tensors in the order of model-shared: wide dtypes first, so that all are aligned, then by name."""
    return dict(sorted(tensors.items(), key=lambda item: (-ITEM_SIZES[item[1].dtype], item[0])))


def _rank_of(a: Typed, highest: int) -> int:
    """Return the rank that A has, or the highest that it may have where it has none."""
    return a.shape[0] if a.shape and 1 <= a.shape[0] <= highest else highest


def _merged_metadata(manifest: str | None) -> dict[str, str]:
    return STOCK_METADATA if manifest is None else {MANIFEST_KEY: manifest, **STOCK_METADATA}


def _data_start(family: Family, layout: Mapping[str, TensorType], manifest: str | None) -> int:
    reference = {_reference_key(family, name): tensor for name, tensor in layout.items()}
    return len(header_bytes(reference, _merged_metadata(manifest)))


def _reference_key(family: Family, name: str) -> str:
    """Return an expert tensor's merged key with four-digit indices; a low-rank part keeps its suffix."""
    if name == ROUTER_TENSOR:
        return name
    _, layer, _, projection, _, *suffix = name.split(".")
    if projection not in PROJECTIONS:
        raise ValueError(f"{name} is no expert tensor")
    return ".".join([family.expert_key(layer.zfill(4), "0000", projection), *suffix])
