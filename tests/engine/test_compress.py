"""compress: the nearest matrices of low rank, the owner's words kept, sizes kept to, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from builders import forge_expert, make_anchor, make_expert, read_directory

from flexctl.bundle import PrivacyInfo, open_anchor, open_expert, open_merged, pair_weights, write_expert
from flexctl.engine.compress import CompressConfig, CompressResult, compress
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.model.building import build_model
from flexctl.model.tensors import to_torch

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


@pytest.fixture
def code(experts: dict[str, Path]) -> Path:
    return experts["code"]


def make(code: Path, anchor: Path, texts: Any, output: Path | None = None, **settings: Any) -> CompressResult:
    given = {"expert": code, "anchor": anchor, "data": (texts.code_test,), "output": output, "threads": 1}
    return compress(CompressConfig(**{**given, **settings}))


def matrices(path: Path, anchor: Path) -> dict[str, np.ndarray[Any, Any]]:
    expert = open_expert(path)
    own = pair_weights(open_anchor(anchor), expert).experts[expert.manifest.name]
    return {name: to_torch(raw).float().numpy() for name, raw in own.items()}


def publics(anchor: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: to_torch(raw).float().numpy() for name, raw in open_anchor(anchor).weights().experts["public"].items()
    }


@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_nearest_difference_of_its_rank(
    tmp_path: Path, code: Path, anchor: Path, texts: Any, rank: int
) -> None:
    make(code, anchor, texts, tmp_path / "x.st", rank=rank)
    full, cut, public = matrices(code, anchor), matrices(tmp_path / "x.st", anchor), publics(anchor)
    for name in full:
        left, values, right = np.linalg.svd(full[name] - public[name], full_matrices=False)
        nearest = public[name] + (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.abs(cut[name] - nearest).max() <= 1e-5
        assert np.abs(cut[name] - full[name]).max() > 1e-4


def test_a_difference_that_has_the_rank_comes_back(tmp_path: Path, code: Path, anchor: Path, texts: Any) -> None:
    """Within rounding: the expert that is cut is itself a cut one, written out in full."""
    make(code, anchor, texts, tmp_path / "low.st", rank=3)
    low, made_for = open_expert(tmp_path / "low.st"), open_anchor(anchor)
    manifest = low.manifest
    full = write_expert(
        tmp_path / "full.st",
        anchor=made_for,
        name="code",
        tensors={**low.feed_forward(made_for), "router.weight": low.router()},
        data=manifest.data,
        training=manifest.training,
        router=manifest.router,
        run={},
        overwrite=False,
    )
    make(full.path, anchor, texts, tmp_path / "again.st", rank=3)
    before, after = matrices(full.path, anchor), matrices(tmp_path / "again.st", anchor)
    assert max(float(np.abs(before[name] - after[name]).max()) for name in before) <= 2e-6


def test_what_the_owner_said_stays_and_the_parent_is_named(
    tmp_path: Path, code: Path, anchor: Path, texts: Any
) -> None:
    before = code.read_bytes()
    result = make(code, anchor, texts, tmp_path / "x.st", rank=4)
    old, new = open_expert(code).manifest, open_expert(tmp_path / "x.st").manifest
    assert (new.name, new.data, new.training, new.router) == (old.name, old.data, old.training, old.router)
    assert new.tensors["router.weight"] == old.tensors["router.weight"]
    assert new.parents == (old.digest,) == (result.parent,)
    assert new.digest == result.digest != old.digest
    assert (new.rank, result.rank) == (4, 4)
    assert result.ranks == [{"gate": 4, "up": 4, "down": 4}] * 2
    assert code.read_bytes() == before
    assert (result.bytes_before, result.bytes_written) == (len(before), (tmp_path / "x.st").stat().st_size)
    assert result.bytes_written < result.bytes_before
    assert make(code, anchor, texts, tmp_path / "y.st", rank=4).digest == result.digest


def test_losses_lie_between_the_expert_s_and_the_anchor_s(tmp_path: Path, code: Path, anchor: Path, texts: Any) -> None:
    found = make(code, anchor, texts, tmp_path / "x.st", rank=2).held_out
    assert set(found) == {"own", "public"}
    assert found["own"]["before"] < found["own"]["after"] < found["own"]["anchor"]
    more = make(code, anchor, texts, tmp_path / "y.st", rank=15).held_out
    assert more["own"]["before"] == found["own"]["before"]
    assert abs(more["own"]["after"] - more["own"]["before"]) < found["own"]["after"] - found["own"]["before"]


@pytest.mark.parametrize("size", [0.1, 0.4])
def test_auto_keeps_to_the_size_and_may_differ_from_matrix_to_matrix(
    tmp_path: Path, code: Path, anchor: Path, texts: Any, size: float
) -> None:
    result = make(code, anchor, texts, size=size, output=tmp_path / "x.st")
    expert = open_expert(tmp_path / "x.st")
    weights = sum(span.stop - span.start for name, span in expert.spans.items() if "lora" in name)
    assert 0.5 * size < weights / (6 * 48 * 32 * 4) <= size
    ranks = [rank for layer in result.ranks for rank in layer.values()]
    assert (len(ranks), max(ranks)) == (6, result.rank)
    assert result.held_out["own"]["after"] < result.held_out["own"]["anchor"]
    assert make(code, anchor, texts, size=size, output=tmp_path / "y.st").digest == result.digest


def test_it_merges_with_a_full_expert_and_either_goes_again(
    tmp_path: Path, code: Path, experts: dict[str, Path], anchor: Path, texts: Any
) -> None:
    """Laws 1, 2 and 9, with matrices of several ranks."""
    low = make(code, anchor, texts, size=0.3, output=tmp_path / "low.st").path
    full = experts["sums"]

    def merged(name: str, *files: Path) -> Path:
        merge(MergeConfig(experts=files, anchor=anchor, output=tmp_path / name))
        return tmp_path / name

    both = merged("both", full, low)
    assert read_directory(merged("turned", low, full)) == read_directory(both)
    for gone, left in (("code", merged("full", full)), ("sums", merged("low", low))):
        remove(RemoveConfig(names=(gone,), source=both, output=tmp_path / f"without-{gone}"))
        assert read_directory(tmp_path / f"without-{gone}") == read_directory(left)
    ours = build_model(open_merged(both).weights(), device=torch.device("cpu"), dtype=torch.float32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(both, dtype=torch.float32)
    with torch.no_grad():
        assert (ours(tiny.some_tokens()).logits - stock(tiny.some_tokens()).logits).abs().max() <= 1e-4


@pytest.mark.parametrize(("settings", "name"), [({"rank": 2}, "code-r2.st"), ({}, "code-auto.st")])
def test_it_goes_beside_the_expert_and_replaces_only_when_told(
    tmp_path: Path, code: Path, anchor: Path, texts: Any, settings: dict[str, Any], name: str
) -> None:
    copy = tmp_path / "code.st"
    copy.write_bytes(code.read_bytes())
    first = make(copy, anchor, texts, **settings)
    assert first.path == tmp_path / name
    with pytest.raises(UsageError, match="exists"):
        make(copy, anchor, texts, **settings)
    with pytest.raises(UsageError, match="exists"):
        make(copy, anchor, texts, copy, **settings)
    assert make(copy, anchor, texts, copy, overwrite=True, **settings).digest == first.digest
    assert open_expert(copy).digest == first.digest


def test_dry_run_writes_nothing(tmp_path: Path, code: Path, anchor: Path, texts: Any) -> None:
    result = make(code, anchor, texts, tmp_path / "x.st", dry_run=True)
    assert (result.digest, result.name, result.dry_run) == (None, "code", True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rank": 0}, "rank: 0"),
        ({"rank": "some"}, "rank: 'some' is neither a number nor auto"),
        ({"rank": 20}, "the highest that is smaller is 19"),
        ({"size": 0.0}, "size: 0.0"),
        ({"size": 0.2, "rank": 3}, "size: rank 3 decides the size"),
        ({"size": 1.0}, "size: 1.0"),
        ({"size": 0.01}, "size: 0.01 is too small for rank 1 in every matrix, which takes 0.0521"),
        ({"threads": 0}, "threads"),
        ({"data": (Path("nowhere"),)}, "nowhere does not exist"),
        ({"expert": Path("nothing.st")}, "nothing.st: no such file"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_wrong_settings_are_refused_and_leave_nothing(
    tmp_path: Path, code: Path, anchor: Path, texts: Any, settings: dict[str, Any], says: str, dry_run: bool
) -> None:
    with pytest.raises(FlexctlError) as caught:
        make(code, anchor, texts, **{"output": tmp_path / "x.st", **settings}, dry_run=dry_run)
    assert says in caught.value.message
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_empty_text_is_refused(tmp_path: Path, code: Path, anchor: Path, texts: Any) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no document with text"):
        make(code, anchor, texts, tmp_path / "x.st", data=(tmp_path / "empty.txt",))


def test_experts_that_cannot_be_compressed(tmp_path: Path, code: Path, anchor: Path, texts: Any) -> None:
    low = make(code, anchor, texts, tmp_path / "low.st", rank=3).path
    with pytest.raises(UsageError, match="is low-rank already, of rank 3"):
        make(low, anchor, texts, tmp_path / "x.st", rank=2)
    stranger = make_anchor(tmp_path / "other")
    with pytest.raises(BundleError, match=r"anchor\.digest is"):
        make(make_expert(tmp_path / "law.st", stranger, "law").path, anchor, texts, tmp_path / "x.st", rank=2)
    gate = "layers.0.mlp.gate_proj.weight"
    tampered = forge_expert(tmp_path / "tampered.st", open_expert(code))
    data = bytearray(tampered.read_bytes())
    data[open_expert(tampered).spans[gate].start] ^= 1
    tampered.write_bytes(data)
    with pytest.raises(BundleError, match=rf"tampered\.st: tensor {gate}"):
        make(tampered, anchor, texts, tmp_path / "x.st", rank=2)
    assert not (tmp_path / "x.st").exists()


def test_a_guarantee_of_privacy_survives_a_given_rank_only(
    tmp_path: Path, code: Path, anchor: Path, texts: Any
) -> None:
    expert = open_expert(code)
    guarantee = PrivacyInfo(
        mechanism="dp-sgd",
        epsilon=8.0,
        delta=1e-6,
        unit="document",
        accountant="prv",
        noise_multiplier=0.8,
        sampling_rate=0.01,
        steps=12,
        max_grad_norm=1.0,
    )
    private = write_expert(
        tmp_path / "private.st",
        anchor=open_anchor(anchor),
        name="code",
        tensors={name: expert.tensor(name) for name in expert.spans},
        data=expert.manifest.data,
        training=expert.manifest.training,
        router=expert.manifest.router,
        run={},
        overwrite=False,
        privacy=guarantee,
    ).path
    given = make(private, anchor, texts, tmp_path / "r.st", rank=2)
    chosen = make(private, anchor, texts, tmp_path / "a.st")
    assert open_expert(given.path).manifest.privacy == guarantee
    assert open_expert(chosen.path).manifest.privacy is None
