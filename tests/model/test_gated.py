"""The product inside a feed-forward network: the same bits, and less that is kept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from flexctl.model.gated import Product, compute_by, gated_silu, product_of

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(run: Product, *given: Tensor) -> set[int]:
    """Places of the tensors that a function keeps for the way back."""
    places: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        places.add(tensor.data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run(*given)
    return places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_the_two_operations_bit_for_bit(dtype: torch.dtype) -> None:
    gate, up, grad = (3 * torch.randn(9, 33, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    gate, up = gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()
    found, expected = gated_silu(gate, up), F.silu(gate) * up
    assert torch.equal(found, expected)
    mine, theirs = (torch.autograd.grad(each, [gate, up], grad.to(dtype)) for each in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_it_keeps_what_goes_in_and_nothing_else() -> None:
    gate, up = (torch.randn(9, 33, requires_grad=True) for _ in range(2))
    assert kept(gated_silu, gate, up) == {gate.data_ptr(), up.data_ptr()}
    assert len(kept(lambda one, other: F.silu(one) * other, gate, up)) == 3


class Network(nn.Module):
    def __init__(self, hidden_act: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_act=hidden_act)
        self.gate_proj, self.up_proj = (nn.Linear(8, 12, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(12, 8, bias=False)
        self.act_fn = {"silu": nn.SiLU(), "gelu": nn.GELU()}[hidden_act]

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(inputs)) * self.up_proj(inputs))
        return found


@pytest.mark.parametrize("hidden_act", ["silu", "gelu"])
def test_a_network_computes_the_same_and_goes_back_to_what_it_was(hidden_act: str) -> None:
    network, inputs = Network(hidden_act), torch.randn(5, 8)
    expected, names = network(inputs), list(network.state_dict())
    undo = compute_by(network, product_of(network))
    again = compute_by(network, lambda gate, _up: gate)
    assert not torch.equal(network(inputs), expected)
    again()
    assert torch.equal(network(inputs), expected)
    assert list(network.state_dict()) == names
    undo()
    assert "forward" not in vars(network)
    assert torch.equal(network(inputs), expected)
