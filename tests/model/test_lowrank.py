"""Low-rank differences: they begin at nothing, share what they differ from, and stand for what readers expand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import make_anchor, make_expert
from torch import Tensor, nn

from flexctl.bundle import pair_weights
from flexctl.model.lowrank import LowRankLinear, expand, low_rank_copy
from flexctl.model.tensors import to_torch

pytestmark = pytest.mark.usefixtures("one_thread")


def make_map(rank: int = 3, seed: int = 0) -> LowRankLinear:
    torch.manual_seed(5)
    base = nn.Linear(8, 12, bias=False).requires_grad_(False)
    return LowRankLinear(base, rank, torch.Generator().manual_seed(seed))


def trained(made: LowRankLinear) -> LowRankLinear:
    nn.init.normal_(made.b, generator=torch.Generator().manual_seed(6))
    return made


def test_it_begins_as_the_base_bit_for_bit() -> None:
    made, inputs = make_map(), torch.randn(5, 8)
    assert torch.equal(made(inputs), made.base(inputs))


def test_it_computes_the_matrix_that_it_stands_for() -> None:
    made, inputs = trained(make_map()), torch.randn(5, 8)
    matrix = expand(made.base.weight, made.a.detach(), made.b.detach())
    assert (matrix - made.base.weight).abs().max() > 0.1
    assert (made(inputs) - inputs @ matrix.T).abs().max() <= 1e-5


def test_only_the_difference_trains_and_its_start_follows_from_the_seed() -> None:
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


def test_a_copy_shares_the_matrices_of_the_public_network() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(12, 8, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.down_proj(self.gate_proj(inputs) * self.up_proj(inputs))
            return found

    public = Network().requires_grad_(False)
    made = low_rank_copy(public, 2, torch.Generator().manual_seed(0))
    inputs = torch.randn(5, 8)
    assert torch.equal(made(inputs), public(inputs))
    assert made.gate_proj.base.weight is public.gate_proj.weight  # type: ignore[union-attr]
    assert {tuple(part.shape) for part in made.parameters() if part.requires_grad} == {(2, 8), (12, 2), (2, 12), (8, 2)}
    assert isinstance(public.gate_proj, nn.Linear)


def test_what_the_public_map_has_just_computed_is_not_computed_again() -> None:
    public = nn.Linear(8, 12, bias=False).requires_grad_(False)
    made, calls = trained(LowRankLinear(copy.deepcopy(public), 3, torch.Generator().manual_seed(0))), []
    made.base.register_forward_hook(lambda *_: calls.append(1))
    inputs, others = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    alone = made(inputs)
    [expected] = torch.autograd.grad(alone.square().sum() + public(inputs).sum(), inputs)
    assert len(calls) == 1
    made.follow(public)
    beside = public(inputs)
    found = made(inputs)
    assert torch.equal(found, alone)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum() + beside.sum(), inputs)[0], expected)
    assert len(calls) == 1
    public(inputs)
    made(others)
    made(inputs)
    assert len(calls) == 3
    made.leave()
    public(inputs)
    made(inputs)
    assert len(calls) == 4
