"""On a CUDA device: liger-kernel's functions give a pair's step the loss and the gradients that torch gives it.

``GPU_TESTS_ON=cpu TRITON_INTERPRET=1`` runs them in float32 in Triton's interpreter, as far as that can.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.model import kernels
from flexctl.model.building import build_model
from flexctl.model.recompute import recompute_layers
from flexctl.training.loop import autocasting
from flexctl.training.pair import Pair

pytest.importorskip("liger_kernel")

DEVICE = torch.device(os.environ.get("GPU_TESTS_ON", "cuda"))
ON_CARD = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_thread", "in_empty_folder"),
    pytest.mark.skipif(not ON_CARD and "TRITON_INTERPRET" not in os.environ, reason="Triton compiles for a GPU"),
]


def make_pair(model_type: str, dtype: torch.dtype, rank: int | None, *, recompute: bool) -> tuple[Any, Pair]:
    model: Any = build_model(tiny.make_weights(tiny.dense_config(model_type)), device=DEVICE, dtype=dtype)
    rows = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    pair = Pair(model, rows, public_match=1.0, rank=rank)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for group in pair.groups():
            for weight in group.parameters:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator).to(DEVICE))
    if recompute:
        recompute_layers(model)
    return model, pair


def step(model: Any, pair: Pair, dtype: torch.dtype, found: kernels.Kernels | None) -> tuple[Tensor, Tensor]:
    """The loss of a step with its match, and the gradients of all that trains in one vector."""
    ids, public = tiny.some_tokens(4, 17).to(DEVICE), torch.tensor([False, True, False, True])
    with (
        kernels.fused(model, found) as loss_of,
        autocasting(DEVICE, None if dtype == torch.float32 else dtype),
        pair.match(public) as matched,
    ):
        loss = loss_of(model, ids[:, :-1], ids[:, 1:], 0.01, None) + matched()
        weights = [weight for group in pair.groups() for weight in group.parameters]
        gradients = torch.autograd.grad(loss / 64, weights)
    return loss.detach(), torch.cat([gradient.float().flatten() for gradient in gradients])


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
def test_loss_and_gradients_are_torch_s(model_type: str, rank: int | None, recompute: bool) -> None:
    found = kernels._liger("")
    exact = step(*make_pair(model_type, torch.float32, rank, recompute=recompute), torch.float32, None)
    if not ON_CARD:
        mine = step(*make_pair(model_type, torch.float32, rank, recompute=recompute), torch.float32, found)
        assert float(mine[0]) == pytest.approx(float(exact[0]), rel=1e-5)
        assert apart(mine[1], exact[1]) < 1e-4
        return
    model, pair = make_pair(model_type, torch.bfloat16, rank, recompute=recompute)
    plain = step(model, pair, torch.bfloat16, None)
    mine = step(model, pair, torch.bfloat16, found)
    # Both round, in other places; the kernels' figures are as near to float32's as torch's are.
    assert float(mine[0]) == pytest.approx(float(exact[0]), rel=1e-2)
    assert apart(mine[1], exact[1]) < 1.5 * apart(plain[1], exact[1]) + 2e-3


@pytest.mark.skipif(not ON_CARD, reason="kernels are for a GPU")
@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_by_kernels_is_one_without(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    results = {}
    for name in ("kernels", "plain"):
        with monkeypatch.context() as patch:
            if name == "plain":
                patch.setattr("flexctl.model.kernels.metadata.version", _missing)
            results[name] = train_expert(
                TrainExpertConfig(
                    data=(texts.code,),
                    anchor=anchor,
                    output=tmp_path / f"{name}.st",
                    name="x",
                    max_steps=12,
                    seq_len=32,
                    batch_tokens=256,
                    threads=1,
                    device=str(DEVICE),
                    rank=rank,
                )
            )
        run = json.loads((tmp_path / f"{name}.run.json").read_text())
        assert (run["kernels"] is None) == (name == "plain")
    mine, plain = (results[name] for name in ("kernels", "plain"))
    assert mine.frozen_verified
    assert mine.final_loss == pytest.approx(plain.final_loss, rel=1e-2)
    assert mine.held_out["own"]["after"] == pytest.approx(plain.held_out["own"]["after"], rel=2e-2)


def _missing(name: str) -> str:
    raise kernels.metadata.PackageNotFoundError(name)
