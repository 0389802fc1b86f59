"""Norms in one kernel: Transformers' figures, dtype and names."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from flexctl.model import norms
from flexctl.model.norms import FusedNorm, fuse_norms


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_it_computes_what_the_family_s_norms_compute(model_type: str, dtype: torch.dtype, close: float) -> None:
    dense = tiny.make_dense(tiny.dense_config(model_type)).to(dtype)
    found_norms = [module for module in dense.modules() if hasattr(module, "variance_epsilon")]
    assert len(found_norms) == {"olmo2": 9, "llama": 5, "mistral": 5, "qwen3": 9}[model_type]
    for norm in found_norms:
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


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
def test_a_model_stays_what_it_is_and_is_saved_as_it_was(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_has_kernel", lambda _device: True)
    dense, other = (tiny.make_dense(tiny.dense_config(model_type)) for _ in range(2))
    fuse_norms(dense, torch.device("cpu"))
    assert not [module for module in dense.modules() if hasattr(module, "variance_epsilon")]
    assert list(dense.state_dict()) == list(other.state_dict())
    ids = tiny.some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(dense(ids).logits, other(ids).logits, rtol=0, atol=1e-4)
    for model, name in ((dense, "fused"), (other, "plain")):
        model.save_pretrained(tmp_path / name)
    saved = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fused", "plain")]
    assert saved[0] == saved[1]


def test_a_model_on_a_cpu_keeps_its_norms() -> None:
    dense = tiny.make_dense(tiny.dense_config())
    kinds = [type(module) for module in dense.modules()]
    assert [type(module) for module in fuse_norms(dense, torch.device("cpu")).modules()] == kinds
