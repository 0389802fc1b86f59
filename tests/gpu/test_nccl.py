"""On a CUDA device: the path of several processes, by one that has met nobody else.

There is one card, and NCCL takes no two processes on one; how several share work is tested with gloo on CPUs, in
tests/test_processes.py. Here it is what runs on the card that counts: the groups, FSDP2, and what flexctl says of
processes that find no card left.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from flexctl import processes
from flexctl.model.building import build_model
from flexctl.model.routed import routed_layers
from flexctl.model.sharding import _shard, local_rows, shard_frozen, whole
from flexctl.processes import World

DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread", "in_empty_folder")]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A group of one process, which on a card is NCCL's."""
    from torch import distributed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    processes._meet(0, 1, DEVICE.type)
    yield processes._Together(0, 1, DEVICE.type)
    distributed.destroy_process_group()


def test_what_processes_tell_each_other(world: World) -> None:
    ones = torch.ones(3, 2, device=DEVICE)
    assert torch.equal(world.sum(ones), ones)
    assert torch.equal(world.gather(world.part(3), ones), ones)
    weight = nn.Parameter(ones.clone())
    weight.grad = ones.clone()
    world.sum_gradients([weight])
    assert torch.equal(weight.grad, ones)
    assert world.most(3, 4) == (3, 4)
    assert world.by_writer(lambda: "told") == "told"


@pytest.mark.parametrize("model_type", ["olmo2", "qwen3"])
def test_a_sharded_model_computes_and_trains_as_one_that_is_whole(world: World, model_type: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import AutoConfig, AutoModelForCausalLM

    from flexctl.model.building import route

    weights: Any = tiny.make_weights(tiny.dense_config(model_type))
    plain: Any = build_model(weights, device=DEVICE, dtype=torch.float32)
    config = AutoConfig.for_model(**dict(weights.dense_config))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config).float()
    sharded: Any = route(dense)
    tensors = {**weights.shared, **{f"model.{name}": raw for name, raw in weights.experts["public"].items()}}
    shard_frozen(sharded, tensors, device=DEVICE, world=world)
    networks = []
    for model in (plain, sharded):
        block = routed_layers(model)[-1]
        network = type(block.experts[0])(block.experts[0].config).to(DEVICE)
        torch.manual_seed(0)
        for weight in network.parameters():
            nn.init.normal_(weight, std=0.1)
        networks.append(network)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    _shard(networks[1], world, set(), mp_policy=policy)
    for model, network in zip((plain, sharded), networks, strict=True):
        model.requires_grad_(False)
        routed_layers(model)[-1].experts[0] = network
    ids = tiny.some_tokens().to(DEVICE)
    logits = []
    for model, network in zip((plain, sharded), networks, strict=True):
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            found = model(ids, use_cache=False).logits
            found.logsumexp(dim=-1).mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        logits.append(found.detach())
    assert torch.allclose(logits[0], logits[1], atol=1e-4)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert local_rows(other).device.type == DEVICE.type
        assert torch.allclose(one, whole(other), atol=1e-5)


def test_processes_beyond_the_cards_are_told_so(anchor: Path, texts: Any, tmp_path: Path) -> None:
    if DEVICE.type == "cpu":
        pytest.skip("there is no card to count")
    cards = torch.cuda.device_count()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards + 1)]
    command = ["-m", "flexctl", "train-expert", "--data", str(texts.code), "--anchor", str(anchor)]
    command += ["-o", str(tmp_path / "x.st"), "--device", "cuda", "--max-steps", "1"]
    done = subprocess.run([*launch, *command], capture_output=True, text=True, timeout=90, check=False)
    said = [line for line in done.stderr.splitlines() if "processes were started on this machine" in line]
    assert done.returncode != 0
    assert len(said) == 1, done.stderr[-2000:]
    assert said[0].startswith(f"error: process {cards}: --device: cuda: {cards + 1} processes were started")
