"""Laws 8 and 9 through files: what merge and remove write loads in stock Transformers and computes what ours does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from builders import make_expert, make_tensors

from flexctl.bundle import Anchor, open_anchor, open_merged
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.families import FAMILIES, family_of
from flexctl.model.building import build_model, stock_problems
from flexctl.model.routed import exclude

TOLERANCE = 1e-4

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """An anchor of one family and where to put things."""

    root: Path
    anchor: Anchor

    def expert(self, name: str, **settings: Any) -> Path:
        path = self.root / f"{name}.st"
        make_expert(path, self.anchor, name, **settings)
        return path

    def merge(self, *experts: Path, top_k: int | None = None, to: str = "merged") -> Path:
        path = self.root / to
        merge(MergeConfig(experts=experts, anchor=self.anchor.path, output=path, top_k=top_k))
        return path


def make_world(root: Path, texts: Any, tokenizer: Any, model_type: str, **config: Any) -> World:
    dtype = config.get("dtype", "float32")
    model = tiny.make_dense(tiny.dense_config(model_type, **config)).to(getattr(torch, dtype))
    model.save_pretrained(root / "stock")
    tokenizer.save_pretrained(root / "stock")
    settings = {"data": (texts.public_test,), "source": str(root / "stock"), "sample_tokens": 1500, "threads": 1}
    init_anchor(InitAnchorConfig(output=root / "anchor", **settings))
    return World(root=root, anchor=open_anchor(root / "anchor"))


@pytest.fixture(params=[(family.dense_type, tied) for family in FAMILIES for tied in (False, True)], ids=str)
def world(request: pytest.FixtureRequest, tmp_path: Path, texts: Any, tokenizer: Any) -> World:
    model_type, tied = request.param
    return make_world(tmp_path, texts, tokenizer, model_type, tie_word_embeddings=tied)


@torch.no_grad()
def stock_logits(path: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(tiny.some_tokens()).logits.float()


@torch.no_grad()
def our_logits(path: Path, without: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    bundle = open_merged(path) if (path / "model-router.safetensors").exists() else open_anchor(path)
    model = build_model(bundle.weights(), device=torch.device("cpu"), dtype=dtype)
    exclude(model, without)
    return model(tiny.some_tokens()).logits.float()


def assert_same(one: torch.Tensor, other: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert float((one - other).abs().max()) <= tolerance


def test_merged_directory_computes_the_same_in_stock_software(world: World) -> None:
    merged = world.merge(world.expert("law"), world.expert("code"), world.expert("zoo"), top_k=2)
    assert stock_problems(merged) == []
    ours = our_logits(merged)
    assert_same(stock_logits(merged), ours)
    assert float((ours - our_logits(world.anchor.path)).abs().max()) > 0.05


def test_removed_equals_masked(world: World) -> None:
    merged = world.merge(world.expert("law"), world.expert("code"), world.expert("zoo"), top_k=3)
    remove(RemoveConfig(names=("law",), source=merged, output=world.root / "removed"))
    removed = stock_logits(world.root / "removed")
    assert_same(our_logits(merged, without=(2,)), removed)
    assert_same(our_logits(world.root / "removed"), removed)


def test_anchor_only_merge_is_the_dense_model(world: World) -> None:
    merged = world.merge()
    dense = stock_logits(world.root / "stock")
    assert_same(stock_logits(world.anchor.path), dense, 0.0)
    assert_same(stock_logits(merged), dense)
    assert_same(our_logits(merged), dense)


@pytest.mark.parametrize("top_k", [1, 3])
def test_experts_after_no_step_are_the_dense_model(world: World, top_k: int) -> None:
    if top_k == 1 and not family_of(world.anchor.manifest.model_type).renormalises:
        pytest.skip("kept probabilities do not add up to 1")
    public = dict(world.anchor.weights().experts["public"])
    names = ("law", "code")
    experts = []
    for seed, name in enumerate(names):
        rows = {"router.weight": make_tensors(world.anchor, seed)["router.weight"]}
        experts.append(world.expert(name, tensors=public | rows))
    merged = world.merge(*experts, top_k=top_k)
    dense = stock_logits(world.root / "stock")
    assert_same(stock_logits(merged), dense)
    assert_same(our_logits(merged), dense)


def test_bfloat16_merge_keeps_its_dtype_and_loads(tmp_path: Path, texts: Any, tokenizer: Any) -> None:
    world = make_world(tmp_path, texts, tokenizer, "olmo2", dtype="bfloat16")
    merged = world.merge(world.expert("law"), world.expert("code"))
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert_same(stock_logits(merged), our_logits(merged))
    assert_same(stock_logits(merged, torch.bfloat16), our_logits(merged, dtype=torch.bfloat16), 0.1)


def test_trained_experts_too(merged: Path, anchor: Path, experts: dict[str, Path], tmp_path: Path) -> None:
    assert stock_problems(merged) == []
    assert_same(stock_logits(merged), our_logits(merged))
    merge(MergeConfig(experts=(experts["sums"],), anchor=anchor, output=tmp_path / "one"))
    assert_same(our_logits(merged, without=(1,)), stock_logits(tmp_path / "one"))
