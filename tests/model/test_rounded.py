"""Linear maps that train in float32 and multiply in bfloat16: the numbers of autocast, gradients in half the bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flexctl.model.rounded import RoundedLinear, keep_rounded

needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 and later")


def twins() -> tuple[nn.Linear, RoundedLinear, Tensor]:
    generator = torch.Generator().manual_seed(1)
    plain, same = (nn.Linear(24, 40, bias=False) for _ in range(2))
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
        same.weight.copy_(plain.weight)
    return plain, RoundedLinear(same), torch.randn(7, 24, generator=generator)


def backward(linear: nn.Linear, inputs: Tensor, *, autocast: bool) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = linear(inputs)
    outputs.float().square().sum().backward()
    assert linear.weight.grad is not None
    return linear.weight.grad


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_gradients_are_those_of_a_plain_map(autocast: bool, keep: bool) -> None:
    plain, rounded, inputs = twins()
    keep_rounded(nn.Sequential(rounded), keep=keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(rounded(inputs), plain(inputs))
    found, expected = (backward(linear, inputs, autocast=autocast) for linear in (rounded, plain))
    assert expected.dtype == torch.float32
    assert torch.equal(found.float(), expected)


@needs_grad_dtype
def test_a_gradient_that_stays_has_half_the_bytes() -> None:
    _, rounded, inputs = twins()
    keep_rounded(rounded, keep=True)
    assert backward(rounded, inputs, autocast=True).dtype == torch.bfloat16
    assert backward(twins()[1], inputs, autocast=True).dtype == torch.float32


def test_gradients_of_several_passes_are_summed_in_float32() -> None:
    """Also where those of one pass stayed before."""
    plain, rounded, inputs = twins()
    keep_rounded(rounded, keep=True)
    backward(rounded, inputs, autocast=True)
    rounded.weight.grad = None
    keep_rounded(rounded, keep=False)
    for part in (inputs[:3], inputs[3:] / 7, inputs):
        found, expected = (backward(linear, part, autocast=True) for linear in (rounded, plain))
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
