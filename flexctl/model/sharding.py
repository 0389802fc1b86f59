"""Models of which every process has a part: PyTorch's FSDP2 over the layers, each filled from its own rows on disk.

A matrix's rows lie in equal parts with the processes. A layer's frozen weights are one group that is gathered when the
layer runs, the trained expert's another, so that gradients are summed, and optimiser state kept, for it alone. The
embedding, the last norm, the head and the router rows are whole everywhere. Where every weight trains, a layer is one
group, and what is outside of layers another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from flexctl.families import PROJECTIONS
from flexctl.model.norms import fuse_norms
from flexctl.model.rounded import RoundedLinear
from flexctl.model.tensors import RawBytes, rows_of, to_torch
from flexctl.processes import World

__all__ = [
    "HEAD",
    "gathering",
    "local_rows",
    "network_of_rows",
    "rows_like",
    "shard_frozen",
    "shard_trained",
    "shard_whole",
    "trained_copy",
    "whole",
]

HEAD = "lm_head.weight"
"""A checkpoint that has none has the embedding for it."""

Given = ParamSpec("Given")


def shard_frozen(model: Any, tensors: Mapping[str, RawBytes], *, device: torch.device, world: World) -> None:
    """Fill a routed model that is on the meta device; of layers, this process reads its rows alone.

    Args:
        model: As from ``route``, its routers already where they run.
        tensors: By the model's names.
        device: Where it runs.
        world: The processes.
    """
    base = model.model
    _fill_buffers(model, device)
    dtype = model.dtype
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        if name in tensors and not name.startswith("model.layers."):
            _assign(model, name, to_torch(tensors[name]).to(device, dtype))
    if HEAD not in tensors:
        model.lm_head.weight = base.embed_tokens.weight
    fuse_norms(model, device)
    for index, layer in enumerate(base.layers):
        router = layer.mlp.router
        layer.mlp.router = None
        _shard(layer, world, set())
        layer.to_empty(device=device)
        prefix = f"model.layers.{index}."
        _fill(
            layer, world, {name.removeprefix(prefix): raw for name, raw in tensors.items() if name.startswith(prefix)}
        )
        layer.mlp.router = router.to(device)
    whole_ones = {value for name, value in model.named_parameters() if not hasattr(value, "full_tensor")}
    _shard(base, world, whole_ones)


def shard_whole(
    model: Any, tensors: Mapping[str, RawBytes], *, device: torch.device, runs_in: torch.dtype | None, world: World
) -> None:
    """Fill a dense model that is on the meta device and is to train; this process reads its rows of each weight alone.

    Args:
        model: Of its family's class in Transformers, float32.
        tensors: By the model's names.
        device: Where it runs.
        runs_in: Dtype of the layers' products; None for float32.
        world: The processes; one has all rows.
    """
    fuse_norms(model, device)
    if world.size > 1:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=runs_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            _shard(layer, world, set(), mp_policy=policy)
        _shard(model, world, set())
    model.to_empty(device=device)
    _fill_buffers(model, device)
    if HEAD not in tensors:
        model.lm_head.weight = model.model.embed_tokens.weight
    _fill(model, world, tensors)


def gathering(model: nn.Module, work: Callable[Given, Tensor], world: World) -> Callable[Given, Tensor]:
    """Return ``work`` so that a model has its weights whole while it runs, as for a forward pass.

    Args:
        model: What ``work`` uses weights of.
        work: Calls some of its modules, and may look at the weights of others.
        world: The processes that share the model.
    """
    if world.size == 1:
        return work
    from torch.distributed.fsdp import register_fsdp_forward_method

    run: Any = model
    run.work = work
    register_fsdp_forward_method(model, "work")
    found: Callable[Given, Tensor] = run.work
    return found


def trained_copy(public: Any, *, device: torch.device, world: World) -> nn.Module:
    """Return a feed-forward network in float32 that trains and begins as another; its rows lie where the other's do."""
    network: nn.Module
    if world.size == 1:
        network = copy.deepcopy(public).float().requires_grad_(True)
        for projection in PROJECTIONS:
            setattr(network, projection, RoundedLinear(getattr(network, projection)))
        return network
    runs_in = public.gate_proj.weight.dtype
    with torch.device("meta"):
        network = type(public)(public.config).float()
    shard_trained(network, runs_in=runs_in, world=world)
    network.to_empty(device=device)
    with torch.no_grad():
        for own, theirs in zip(network.parameters(), public.parameters(), strict=True):
            local_rows(own).copy_(local_rows(theirs))
    return network


def shard_trained(network: nn.Module, *, runs_in: torch.dtype, world: World, entries: Sequence[str] = ()) -> None:
    """Share out a feed-forward network that trains by itself; its products are in ``runs_in``.

    One process has it whole, as it is.

    Args:
        network: All of it trains.
        runs_in: Dtype of its products.
        world: The processes.
        entries: Methods beside ``forward`` by which it is called.
    """
    if world.size == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=runs_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    _shard(network, world, set(), mp_policy=policy)
    for entry in entries:
        register_fsdp_forward_method(network, entry)


def network_of_rows(public: Any, rows: Mapping[str, Tensor], *, world: World) -> nn.Module:
    """Return a frozen feed-forward network of another's kind, of which this process has some rows.

    Args:
        public: The other.
        rows: By projection, this process's rows, on the device and in the dtype that it runs in.
        world: The processes; one has all rows.
    """
    like = next(iter(rows.values()))
    with torch.device("meta"):
        network: nn.Module = type(public)(public.config).to(like.dtype).requires_grad_(False)
    if world.size > 1:
        _shard(network, world, set())
    network.to_empty(device=like.device)
    for projection in PROJECTIONS:
        local_rows(getattr(network, projection).weight).copy_(rows[projection])
    return network


def local_rows(tensor: Any) -> Tensor:
    """Return the rows of a tensor that this process has; of one that is not sharded, all."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def rows_like(parameter: Any, tensor: Tensor, world: World) -> Tensor:
    """Return of a tensor of a parameter's shape what this process has of the parameter; any other as it is."""
    if tensor.shape != parameter.shape or not hasattr(parameter, "to_local") or hasattr(tensor, "to_local"):
        return tensor
    mine = torch.empty_like(parameter, requires_grad=False)
    first, last = world.rows(len(tensor))
    local_rows(mine).copy_(tensor[first:last])
    return mine


def whole(tensor: Any) -> Tensor:
    """Return all rows of a tensor, from all processes that have some."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _shard(module: nn.Module, world: World, ignored: set[Any], **how: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    sharded: Any = fully_shard(module, mesh=world.mesh, reshard_after_forward=True, ignored_params=ignored, **how)
    # Gradients are of a sum over all rows, so that they add up; FSDP would give their mean.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Compute the one buffer that these families have."""
    base = model.model
    base.rotary_emb = type(base.rotary_emb)(config=model.config).to(device)


@torch.no_grad()
def _fill(module: nn.Module, world: World, tensors: Mapping[str, RawBytes]) -> None:
    """Give parameters this process's rows of what is on disk."""
    for name, parameter in module.named_parameters():
        first, last = world.rows(parameter.shape[0])
        local_rows(parameter).copy_(rows_of(tensors[name.replace(".experts.0.", ".")], first, last))


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, nn.Parameter(value, requires_grad=False))
