"""Low-rank differences: they begin at nothing, share what they differ from, and stand for what readers expand."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from builders import make_anchor, make_expert
from torch import Tensor, nn

from flexctl.bundle import pair_weights
from flexctl.families import PROJECTIONS
from flexctl.model.building import add_expert
from flexctl.model.lowrank import LowRankDifference, LowRankNetwork, expand
from flexctl.model.routed import routed_layers
from flexctl.model.tensors import to_torch

pytestmark = pytest.mark.usefixtures("one_thread")


def make_map(rank: int = 3, seed: int = 0) -> LowRankDifference:
    return LowRankDifference(torch.zeros(12, 8), rank, torch.Generator().manual_seed(seed))


def trained(made: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(6)
    for name, parameter in made.named_parameters():
        if name.endswith("b"):
            nn.init.normal_(parameter, generator=generator)
    return made


def test_it_begins_as_nothing() -> None:
    assert not make_map()(torch.randn(5, 8)).any()


def test_it_computes_the_matrix_that_it_stands_for() -> None:
    made, inputs, base = trained(make_map()), torch.randn(5, 8), torch.randn(12, 8)
    matrix = expand(base, made.a.detach(), made.b.detach())
    assert (matrix - base).abs().max() > 0.1
    assert (inputs @ base.T + made(inputs) - inputs @ matrix.T).abs().max() <= 1e-5


def test_all_of_it_trains_and_its_start_follows_from_the_seed() -> None:
    made = make_map()
    made(torch.randn(5, 8)).sum().backward()
    assert {name for name, parameter in made.named_parameters() if parameter.grad is not None} == {"a", "b"}
    assert torch.equal(made.a, make_map().a)
    assert not torch.equal(made.a, make_map(seed=1).a)
    assert made.a.abs().max() <= 8**-0.5
    assert not made.b.any()


def test_expand_leaves_its_base_as_it_is() -> None:
    base = torch.randn(12, 8)
    kept = base.clone()
    expand(base, torch.randn(3, 8), torch.randn(12, 3))
    assert torch.equal(base, kept)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_expand_gives_the_bytes_that_merge_writes(tmp_path: Path, dtype: str) -> None:
    anchor = make_anchor(tmp_path / "anchor", dtype=dtype)
    expert = make_expert(tmp_path / "low.st", anchor, "low", rank=5)
    public = anchor.weights().experts["public"]

    def part(name: str) -> Tensor:
        return to_torch(expert.tensor(name))

    for name, raw in pair_weights(anchor, expert).experts["low"].items():
        matrix = expand(to_torch(public[name]), part(f"{name}.lora_A"), part(f"{name}.lora_B"))
        assert torch.equal(matrix, to_torch(raw))


class Network(nn.Module):
    """A feed-forward network as Transformers has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn, self.config = nn.SiLU(), SimpleNamespace(hidden_act="silu")

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return found


@pytest.fixture
def public() -> Network:
    torch.manual_seed(5)
    return Network().requires_grad_(False)


def expanded(low: LowRankNetwork, public: Network) -> Network:
    """The network of whole matrices that a low-rank one stands for; its gradients are theirs."""
    network = copy.deepcopy(public)
    for name in PROJECTIONS:
        linear, part = getattr(network, name), getattr(low, name)
        linear.weight = nn.Parameter(linear.weight + part.b.detach() @ part.a.detach())
    return network


def test_a_network_begins_as_the_public_one_bit_for_bit_and_has_differences_alone(public: Network) -> None:
    made, inputs = LowRankNetwork(public, 2, torch.Generator().manual_seed(0)), torch.randn(5, 8)
    assert torch.equal(made(inputs), public(inputs))
    assert torch.equal(made.mix(inputs, torch.tensor([[0.75, 0.25]]).expand(5, 2)), public(inputs))
    assert {name for name, _ in made.named_parameters()} == {
        f"{name}.{part}" for name in ("gate_proj", "up_proj", "down_proj") for part in "ab"
    }
    assert {tuple(part.shape) for part in made.parameters()} == {(2, 8), (12, 2), (2, 12), (8, 2)}


def test_the_mixture_is_the_weighted_sum_of_both_networks_by_one_product_each(public: Network) -> None:
    low = trained(LowRankNetwork(public, 3, torch.Generator().manual_seed(0)))
    own, weights = expanded(low, public), torch.rand(5, 1)
    weights = torch.cat([1 - weights, weights], dim=1).requires_grad_()
    inputs = torch.randn(5, 8, requires_grad=True)
    calls: list[nn.Module] = []
    hooks = [part.register_forward_hook(lambda module, *_: calls.append(module)) for part in public.children()]
    found = low.mix(inputs, weights)
    for hook in hooks:
        hook.remove()
    assert calls == [public.gate_proj, public.up_proj, public.down_proj]
    expected = weights[:, :1] * public(inputs) + weights[:, 1:] * own(inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(low(inputs), own(inputs))
    given = [inputs, *(part for name in PROJECTIONS for part in (getattr(low, name).a, getattr(low, name).b))]
    mine = torch.autograd.grad(found.square().sum(), given)
    matrices = [getattr(own, name).weight for name in PROJECTIONS]
    at_inputs, *whole = torch.autograd.grad(expected.square().sum(), [inputs, *matrices])
    torch.testing.assert_close(mine[0], at_inputs, rtol=1e-4, atol=1e-4)
    for name, gradient, (a, b) in zip(PROJECTIONS, whole, zip(mine[1::2], mine[2::2], strict=True), strict=True):
        part = getattr(low, name)
        torch.testing.assert_close(a, part.b.detach().T @ gradient, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b, gradient @ part.a.detach().T, rtol=1e-4, atol=1e-4)


def test_who_watches_sees_what_the_own_network_gives_more_on_some_tokens(public: Network) -> None:
    low = trained(LowRankNetwork(public, 3, torch.Generator().manual_seed(0)))
    inputs, chosen = torch.randn(6, 8, requires_grad=True), torch.tensor([1, 4])
    seen: list[Tensor] = []
    low.watching = (lambda tensor: tensor[chosen]), (lambda *given: seen.extend(given))
    weight = torch.linspace(0.1, 0.9, 6)[:, None]
    low.mix(inputs, torch.cat([1 - weight, weight], dim=1))
    theirs, more = seen
    torch.testing.assert_close(theirs, public(inputs)[chosen].detach(), rtol=1e-4, atol=1e-5)
    assert not theirs.requires_grad
    torch.testing.assert_close(more, (low(inputs) - public(inputs))[chosen], rtol=1e-4, atol=1e-5)
    # The public outputs are the aim: nothing goes back through them.
    [found] = torch.autograd.grad(more.square().sum(), inputs)
    apart = (low(inputs) - public(inputs).detach())[chosen]
    torch.testing.assert_close(found, torch.autograd.grad(apart.square().sum(), inputs)[0], rtol=1e-4, atol=1e-4)
    assert found.any()


@pytest.mark.parametrize("ranks", [(3, 3), (3, None), (None, 3)])
def test_a_low_rank_expert_beside_several_is_one_of_them(ranks: tuple[int | None, int | None]) -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    for seed, rank in enumerate(ranks):
        add_expert(model, tiny.scrambled((2, 32), seed, 0.5), rank, seed)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    inputs = torch.randn(9, 32, generator=generator)
    for block in routed_layers(model):
        shares = block.route(inputs)
        assert shares.shape == (9, 3)
        expected = sum(share[:, None] * expert(inputs) for share, expert in zip(shares.T, block.experts, strict=True))
        torch.testing.assert_close(block(inputs), expected)
