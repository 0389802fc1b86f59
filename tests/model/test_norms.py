"""Norms in one kernel: Transformers' figures, dtype and names."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from flexctl.model.norms import FusedNorm, fuse_norms


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_it_computes_what_the_family_s_norms_compute(model_type: str, dtype: torch.dtype, close: float) -> None:
    dense = tiny.make_dense(tiny.dense_config(model_type)).to(dtype)
    norms = [module for module in dense.modules() if hasattr(module, "variance_epsilon")]
    assert len(norms) == {"olmo2": 9, "llama": 5, "mistral": 5, "qwen3": 9}[model_type]
    for norm in norms:
        states = torch.randn(3, 5, len(norm.weight), dtype=dtype, requires_grad=True)
        expected, found = norm(states), FusedNorm(norm.weight, norm.variance_epsilon)(states)
        assert found.dtype == expected.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        slopes = [torch.autograd.grad(made.float().square().sum(), states)[0] for made in (found, expected)]
        torch.testing.assert_close(*slopes, rtol=close, atol=10 * close)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_leaves_the_states_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    norm = FusedNorm(nn.Parameter(torch.ones(8, dtype=weight_dtype)), 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(torch.randn(2, 8, dtype=dtype)).dtype == dtype


def test_a_model_on_a_cpu_keeps_its_norms() -> None:
    dense = tiny.make_dense(tiny.dense_config())
    kinds = [type(module) for module in dense.modules()]
    assert [type(module) for module in fuse_norms(dense).modules()] == kinds
