"""Kernels of another package in a training step: the same numbers, in the right places, and nothing left behind.

Stand-ins take the place of liger-kernel's functions and overwrite what those overwrite; tests/gpu has the real ones.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import standin
import tiny
import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn

from flexctl.model.kernels import KNOWN, Kernels, find_kernels, fused
from flexctl.model.losses import training_loss
from flexctl.model.recompute import recompute_layers
from flexctl.runtime import SILENT, SilentReporter
from flexctl.training.pair import Pair

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("olmo2", "llama", "mistral", "qwen3")
CARD = torch.device("cuda")


class Listening(SilentReporter):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warned: list[str] = []

    def warn(self, message: str) -> None:
        self.warned.append(message)


def make_pair(model_type: str, rank: int | None = None, *, recompute: bool = False, **changes: Any) -> tuple[Any, Pair]:
    model = tiny.build(tiny.make_weights(tiny.dense_config(model_type, **changes)))
    rows = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    pair = Pair(model, rows, public_match=1.0, rank=rank)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(6)
        for group in pair.groups():
            for weight in group.parameters:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    if recompute:
        recompute_layers(model)
    return model, pair


def step(model: Any, pair: Pair, kernels: Kernels | None) -> tuple[Tensor, list[Tensor]]:
    """The loss of a step with its match, and the gradients of all that trains."""
    ids, public = tiny.some_tokens(4, 17), torch.tensor([False, True, False, True])
    weights = [weight for group in pair.groups() for weight in group.parameters]
    with fused(model, kernels) as loss_of, pair.match(public) as matched:
        loss = loss_of(model, ids[:, :-1], ids[:, 1:], 0.01, None) + matched()
        gradients = torch.autograd.grad(loss / 64, weights)
    return loss.detach(), list(gradients)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pair_s_loss_and_gradients_are_those_of_plain_code(
    model_type: str, rank: int | None, recompute: bool
) -> None:
    model, pair = make_pair(model_type, rank, recompute=recompute)
    expected, plain = step(model, pair, None)
    found, gradients = step(model, pair, standin.kernels())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert all(float(one.norm()) > 0 for one in plain)
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_part_runs_by_its_kernel_and_all_is_put_back(model_type: str, rank: int | None) -> None:
    calls = {"rope": 0, "silu_mul": 0, "head_loss": 0}

    def counting(name: str) -> Any:
        def call(*given: Any) -> Any:
            calls[name] += 1
            return getattr(standin.kernels(), name)(*given)

        return call

    model, pair = make_pair(model_type, rank)
    family: Any = sys.modules[type(model).__module__]
    before = family.apply_rotary_pos_emb, state(model)
    expected, _ = step(model, pair, None)
    step(model, pair, Kernels(name="counting", **{name: counting(name) for name in calls}))
    # Two layers with two networks each.
    assert calls == {"rope": 2, "silu_mul": 4, "head_loss": 1}
    assert (family.apply_rotary_pos_emb, state(model)) == before
    again, _ = step(model, pair, None)
    assert calls["rope"] == 2
    assert torch.equal(again, expected)


def state(model: nn.Module) -> list[tuple[str, type, list[Any]]]:
    """Names, classes and own functions of all modules."""
    return [
        (name, type(module), [vars(module).get(part) for part in ("forward", "inside")])
        for name, module in model.named_modules()
    ]


def test_all_is_put_back_where_training_fails() -> None:
    model, _ = make_pair("llama")
    family: Any = sys.modules[type(model).__module__]
    before = family.apply_rotary_pos_emb, state(model)

    def fail() -> None:
        with fused(model, standin.kernels()):
            assert (family.apply_rotary_pos_emb, state(model)) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (family.apply_rotary_pos_emb, state(model)) == before


def test_without_kernels_nothing_is_touched() -> None:
    model, _ = make_pair("qwen3")
    family: Any = sys.modules[type(model).__module__]
    before = family.apply_rotary_pos_emb, state(model)
    with fused(model, None) as loss_of:
        assert loss_of is training_loss
        assert (family.apply_rotary_pos_emb, state(model)) == before


@pytest.mark.parametrize("rank", [None, 2])
def test_networks_of_another_activation_compute_as_ever(rank: int | None) -> None:
    def refuse(_gate: Tensor, _up: Tensor) -> Tensor:
        raise AssertionError("silu is not its activation")

    model, pair = make_pair("llama", rank, hidden_act="gelu")
    expected, plain = step(model, pair, None)
    found, gradients = step(model, pair, dataclasses.replace(standin.kernels(), silu_mul=refuse))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for one, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_rows_that_stand_in_are_weighed_by_the_plain_loss() -> None:
    model, _ = make_pair("olmo2")
    ids = tiny.some_tokens(2, 9)
    weights = torch.tensor([1.0, 0.0])[:, None].expand(-1, 8)
    given = (model, ids[:, :-1], ids[:, 1:], 0.01, weights)
    with fused(model, standin.kernels()) as loss_of:
        torch.testing.assert_close(loss_of(*given), training_loss(*given), rtol=1e-6, atol=0)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """liger-kernel 0.8.5 as it would be found, with stand-ins that see what they are given."""
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")

    class Loss:
        @staticmethod
        def apply(*given: Any) -> tuple[Tensor, None]:
            ops.given = given
            return torch.zeros(()), None

    class Product:
        @staticmethod
        def apply(gate: Tensor, up: Tensor, *factors: float) -> Tensor:
            assert factors == (1.0, 1.0)
            return standin.SiluMul.apply(gate, up)

    ops.LigerFusedLinearCrossEntropyFunction = Loss
    ops.LigerRopeFunction = standin.Rope
    ops.LigerSiLUMulFunction = Product
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    installed(monkeypatch, "0.8.5")
    return ops


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    real = metadata.version

    def say(name: str) -> str:
        if name != "liger-kernel":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", say)


def test_what_is_installed_is_found_and_given_its_arguments(liger: Any) -> None:
    found = find_kernels(CARD, torch.bfloat16, SILENT)
    assert found is not None
    assert found.name == "liger-kernel 0.8.5"
    states, head, targets = torch.ones(6, 4), torch.ones(10, 4), torch.zeros(6, dtype=torch.int64)
    assert found.head_loss(states, head, targets, 0.5, 3).shape == ()
    # As the function names them: after weights and bias the ignored target, the z-loss, and at the end the chunks.
    assert liger.given[:3] == (states, head, targets)
    assert liger.given[3:] == (None, None, -100, 0.5, 0.0, "sum", None, False, None, False, False, False, None, None, 3)
    product = found.silu_mul(states, states)
    torch.testing.assert_close(product, nn.functional.silu(states) * states)
    turned = found.rope(torch.ones(1, 2, 3, 4), torch.ones(1, 1, 3, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 4))
    assert [one[0, 0, 0].tolist() for one in turned] == [[-1.0, -1.0, 1.0, 1.0]] * 2


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize(
    ("device", "autocast"), [("cpu", torch.bfloat16), ("cpu", None), ("cuda", None), ("cuda", torch.float16)]
)
def test_elsewhere_than_in_bfloat16_on_a_gpu_there_are_none(device: str, autocast: torch.dtype | None) -> None:
    assert find_kernels(torch.device(device), autocast, SILENT) is None


def test_where_it_is_not_installed_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None)
    listening = Listening()
    assert find_kernels(CARD, torch.bfloat16, listening) is None
    assert listening.warned == []


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("version", ["0.8.4", "0.9.0", "1.0"])
def test_a_release_that_is_not_known_is_left_out(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, version)
    listening = Listening()
    assert find_kernels(CARD, torch.bfloat16, listening) is None
    assert listening.warned == [f"liger-kernel {version} is left out: flexctl knows {KNOWN}"]


def test_one_that_cannot_be_loaded_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "0.8.6")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    listening = Listening()
    assert find_kernels(CARD, torch.bfloat16, listening) is None
    [said] = listening.warned
    assert said.startswith("liger-kernel 0.8.6 is left out, as it cannot be loaded: ")


@pytest.mark.parametrize(
    "code",
    [
        "raise ImportError('two\\nlines')",
        "raise RuntimeError('0 active drivers ([]). There should only be one.')",
        "import math; math.no_such_kernel",
        "raise OSError('libcuda.so.1: cannot open shared object file')",
        "",
    ],
)
def test_one_that_is_broken_is_left_out_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    installed(monkeypatch, "0.8.6")
    (tmp_path / "liger_kernel").mkdir()
    (tmp_path / "liger_kernel" / "__init__.py").touch()
    (tmp_path / "liger_kernel" / "ops.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    listening = Listening()
    assert find_kernels(CARD, torch.bfloat16, listening) is None
    [said] = listening.warned
    assert said.startswith("liger-kernel 0.8.6 is left out, as it cannot be loaded: ")
    assert "\n" not in said
    for name in ("liger_kernel", "liger_kernel.ops"):
        sys.modules.pop(name, None)


def test_the_extra_asks_for_the_releases_that_are_known() -> None:
    [asked] = re.findall(r'"liger-kernel(.*)"', (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    assert SpecifierSet(asked) == KNOWN
