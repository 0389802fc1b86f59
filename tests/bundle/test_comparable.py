"""Stock checkpoints, dense and mixture, open as models of the anchor's sizes, or are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import make_anchor, make_checkpoint

from flexctl.bundle import Weights, open_anchor, open_merged
from flexctl.bundle.comparable import alone, is_mixture, open_checkpoint
from flexctl.errors import BundleError


@pytest.fixture
def tiny_anchor(tmp_path: Path) -> Weights:
    return make_anchor(tmp_path / "anchor").weights()


def same(one: Weights, other: Weights) -> bool:
    def flat(weights: Weights) -> dict[str, bytes]:
        experts = {f"{who} {name}": raw for who, own in weights.experts.items() for name, raw in own.items()}
        return {name: bytes(raw.data) for name, raw in {**weights.shared, **experts}.items()}

    return flat(one) == flat(other) and [bytes(r.data) for r in one.router] == [bytes(r.data) for r in other.router]


def test_anchor_is_a_dense_checkpoint_too(tmp_path: Path, tiny_anchor: Weights) -> None:
    opened = open_checkpoint(tmp_path / "anchor", tiny_anchor)
    assert same(opened, tiny_anchor)
    assert not is_mixture(tmp_path / "anchor", tiny_anchor)


def test_other_float_dtypes_and_shards_open(tmp_path: Path, tiny_anchor: Weights) -> None:
    make_checkpoint(tmp_path / "half", dtype="BF16", shards=2)
    opened = open_checkpoint(tmp_path / "half", tiny_anchor)
    assert {raw.dtype for raw in opened.shared.values()} == {"BF16"}
    assert list(opened.experts) == ["public"]


def test_mixture_opens_as_the_merged_model_that_it_is(anchor: Path, merged: Path) -> None:
    base, expected = open_anchor(anchor).weights(), open_merged(merged).weights()
    opened = open_checkpoint(merged, base)
    assert is_mixture(merged, base)
    assert list(opened.experts) == ["public", "expert-1", "expert-2"]
    renamed = dict(zip(opened.experts, expected.experts.values(), strict=True))
    assert all(
        bytes(raw.data) == bytes(renamed[who][name].data)
        for who, own in opened.experts.items()
        for name, raw in own.items()
    )
    assert [bytes(raw.data) for raw in opened.router] == [bytes(raw.data) for raw in expected.router]
    assert opened.num_experts_per_tok == 3


def test_the_public_expert_alone_is_the_anchor(anchor: Path, merged: Path) -> None:
    found = alone(open_merged(merged).weights())
    assert same(found, open_anchor(anchor).weights())
    assert found.num_experts_per_tok == 1
    assert not np.any(found.router[0].data)


def test_what_does_not_fit_is_refused(tmp_path: Path, tiny_anchor: Weights, merged: Path) -> None:
    make_checkpoint(tmp_path / "wide", hidden=16)
    with pytest.raises(BundleError, match="shape is"):
        open_checkpoint(tmp_path / "wide", tiny_anchor)
    make_checkpoint(tmp_path / "deep", layers=3)
    with pytest.raises(BundleError, match="is extra"):
        open_checkpoint(tmp_path / "deep", tiny_anchor)
    make_checkpoint(tmp_path / "llama", model_type="llama")
    with pytest.raises(BundleError, match="model_type is 'llama'; expected 'olmo2' or 'flex_olmo'"):
        open_checkpoint(tmp_path / "llama", tiny_anchor)
    shutil.copytree(merged, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    (tmp_path / "merged" / "config.json").write_text(json.dumps({**config, "num_experts": "many"}))
    with pytest.raises(BundleError, match="num_experts is 'many'"):
        open_checkpoint(tmp_path / "merged", tiny_anchor)
