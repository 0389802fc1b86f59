"""verify: it finds every change of every byte, says which file, and proves who is not inside."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import World, forge_expert, make_anchor, make_expert, make_world, read_directory
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.bundle import RawTensor, RouterInfo, open_bundle, open_merged, write_router_file
from flexctl.bundle.card import merged_card
from flexctl.bundle.codec import canonical_json, encode, indented_json
from flexctl.bundle.hashing import hash_spans
from flexctl.bundle.headers import read_header
from flexctl.bundle.manifest import digest_of
from flexctl.bundle.validation import read_manifest
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, VerifyResult, verify
from flexctl.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), ("code", "law", "low"), dtype="BF16", shards=2)
    merge(MergeConfig(experts=world.files("code", "low"), anchor=world.anchor.path, output=world.root / "m"))
    return world


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


def copy_of(world: World, name: str) -> Path:
    shutil.rmtree("copy", ignore_errors=True)
    source = {"anchor": world.anchor.path, "m": world.root / "m"}[name]
    return Path(shutil.copytree(source, "copy"))


def failures(result: VerifyResult) -> dict[str, str]:
    assert result.ok == all(check.ok for check in result.checks)
    for check in result.checks:
        assert set(asdict(check)) == {"name", "ok", "detail"}
        assert "\n" not in check.detail
    return {check.name: check.detail for check in result.checks if not check.ok}


def test_what_is_right_verifies(world: World, tmp_path: Path) -> None:
    info = RouterInfo(kind="hidden", samples=1, encoder=None, trained=False, bias=(0.0, -1.0))
    rows = world.experts["code"].router()
    router = write_router_file(
        tmp_path / "r.st", anchor=world.anchor, name="x", rows=rows, router=info, overwrite=False
    )
    for path in (world.anchor.path, *world.files(), world.root / "m", router.path):
        for anchor in (None, world.anchor.path):
            result = verify(VerifyConfig(path=path, anchor=anchor))
            assert failures(result) == {}
            assert result.digest == open_bundle(path).digest


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_byte_of_a_merged_model_is_found(world: World, data: st.DataObject) -> None:
    good = world.root / "m"
    file = data.draw(st.sampled_from(sorted(path.name for path in good.iterdir())))
    content = bytearray((good / file).read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    path = copy_of(world, "m")
    (path / file).write_bytes(bytes(content))
    assert failures(verify(VerifyConfig(path=path)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_changed_weight_of_an_expert_is_found(world: World, data: st.DataObject) -> None:
    expert = world.experts[data.draw(st.sampled_from(["code", "low"]))]
    content = bytearray(expert.path.read_bytes())
    start = next(iter(expert.spans.values())).start
    content[data.draw(st.integers(start, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    Path("x.st").write_bytes(bytes(content))
    assert list(failures(verify(VerifyConfig(path=Path("x.st"))))) == ["tensors"]


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "flexctl.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "public-sample.safetensors",
        "router-space.safetensors",
        "tokenizer.json",
    ],
)
def test_a_changed_file_of_an_anchor_is_found_and_named(world: World, file: str) -> None:
    path = copy_of(world, "anchor")
    content = bytearray((path / file).read_bytes())
    content[-1] ^= 1
    (path / file).write_bytes(bytes(content))
    found = failures(verify(VerifyConfig(path=path)))
    assert any(file in detail for detail in found.values())


def test_missing_and_unknown_files_are_found(world: World) -> None:
    for kind in ("anchor", "m"):
        for file in sorted(read_directory(world.anchor.path if kind == "anchor" else world.root / "m")):
            path = copy_of(world, kind)
            (path / file).unlink()
            assert any(
                file in detail or file == "model.safetensors.index.json"
                for detail in failures(verify(VerifyConfig(path=path))).values()
            )
        path = copy_of(world, kind)
        for tolerated in ("run.json", "results.json", ".gitattributes"):
            (path / tolerated).write_text("x")
        assert failures(verify(VerifyConfig(path=path))) == {}
        for unknown in ("notes.txt", "model-expert-x.safetensors", ".hidden", "pytorch_model.bin"):
            (path / unknown).write_text("x")
            assert unknown in failures(verify(VerifyConfig(path=path)))["nothing else"]
            (path / unknown).unlink()
        (path / "run.json").unlink()
        (path / "run.json").mkdir()
        assert "run.json" in failures(verify(VerifyConfig(path=path)))["nothing else"]


def reseal(path: Path, **changes: Any) -> None:
    """Change a merged model's manifest, and make its digest fit again, as somebody with intent would."""
    manifest = json.loads((path / "flexctl.json").read_bytes()) | changes
    for file in manifest["files"]:
        if not file.startswith("model-"):
            manifest["files"][file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
    manifest["digest"] = digest_in(manifest)
    (path / "flexctl.json").write_bytes(canonical_json(manifest))


def digest_in(manifest: dict[str, Any]) -> str:
    content = {"files": manifest["files"], "tensors": manifest["tensors"]}
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"license": "MIT"}, "card"),
        ({"num_experts_per_tok_requested": 5}, "card"),
        ({"removed": [{"name": "law", "digest": "sha256:" + "0" * 64}]}, "card"),
    ],
)
def test_a_resealed_manifest_no_longer_fits_its_card(world: World, changes: dict[str, Any], check: str) -> None:
    path = copy_of(world, "m")
    reseal(path, **changes)
    assert check in failures(verify(VerifyConfig(path=path)))


def test_a_resealed_license_is_found_in_the_owners_manifests(world: World) -> None:
    path = copy_of(world, "m")
    experts = json.loads((path / "flexctl.json").read_bytes())["experts"]
    experts[1]["license"] = "MIT"
    reseal(path, experts=experts)
    assert "not what the expert's own manifest says" in failures(verify(VerifyConfig(path=path)))["experts"]


def test_a_resealed_config_or_index_is_found(world: World) -> None:
    path = copy_of(world, "m")
    config = json.loads((path / "config.json").read_bytes())
    (path / "config.json").write_bytes(indented_json(config | {"num_experts_per_tok": 1}))
    reseal(path)
    assert "config" in failures(verify(VerifyConfig(path=path)))
    (path / "config.json").write_bytes(indented_json(config | {"rope_theta": 7}))
    reseal(path)
    assert failures(verify(VerifyConfig(path=path))) == {}
    assert "moe_config" in failures(verify(VerifyConfig(path=path, anchor=world.anchor.path)))["anchor"]
    (path / "model.safetensors.index.json").write_text("{}")
    reseal(path)
    assert "index" in failures(verify(VerifyConfig(path=path)))


def test_non_finite_tensors_are_reported(world: World, tmp_path: Path) -> None:
    expert = world.experts["code"]
    tensors = {name: expert.tensor(name) for name in expert.spans}
    bad = np.full((2, 8), np.inf, np.float32)
    tensors["router.weight"] = RawTensor("F32", (2, 8), bad.reshape(-1).view(np.uint8))
    forged = forge_expert(tmp_path / "x.st", expert, tensors)
    assert "router.weight: holds NaN or infinity" in failures(verify(VerifyConfig(path=forged)))["tensors"]


def test_the_anchor_binds(world: World, tmp_path: Path) -> None:
    other = make_anchor(tmp_path / "other", dtype="BF16", seed=8)
    for path in (world.root / "m", *world.files("code")):
        assert "anchor.digest" in failures(verify(VerifyConfig(path=path, anchor=other.path)))["anchor"]
    shutil.copytree(other.path, "anchor")
    assert "anchor" in failures(verify(VerifyConfig(path=world.root / "m")))
    assert failures(verify(VerifyConfig(path=Path("anchor")))) == {}


def test_expired_rights_are_reported_unless_allowed(world: World, tmp_path: Path) -> None:
    old = make_expert(tmp_path / "old.st", world.anchor, "old", expires="2026-03-01")
    config = MergeConfig(experts=(old.path,), anchor=world.anchor.path, output=Path("old"), allow_expired=True)
    merge(config)
    for path in (old.path, Path("old")):
        found = failures(verify(VerifyConfig(path=path), today=datetime.date(2026, 3, 2)))
        assert "2026-03-01" in found["rights"]
        assert not failures(verify(VerifyConfig(path=path), today=datetime.date(2026, 3, 1)))
        assert not failures(verify(VerifyConfig(path=path, allow_expired=True), today=datetime.date(2027, 1, 1)))


def test_absence_is_proved_by_name_and_by_content(world: World, tmp_path: Path) -> None:
    merged = world.root / "m"
    law, code = world.experts["law"], world.experts["code"]
    assert not failures(verify(VerifyConfig(path=merged, absent=("law", str(law.path), "never-seen"))))
    found = failures(verify(VerifyConfig(path=merged, absent=("code", "public", "law"))))
    assert set(found) == {"absent code", "absent public"}
    smuggled = forge_expert(tmp_path / "smuggled.st", code, name="smuggled")
    config = MergeConfig(experts=(smuggled,), anchor=world.anchor.path, output=Path("m"))
    merge(config)
    assert not failures(verify(VerifyConfig(path=Path("m"), absent=("code",))))
    found = failures(verify(VerifyConfig(path=Path("m"), absent=(str(code.path),))))
    assert "is layers.0.mlp.down_proj.weight of" in found["absent code"]
    remove(RemoveConfig(names=("smuggled",), source=Path("m"), output=Path("n"), tombstone=True))
    result = verify(VerifyConfig(path=Path("n"), absent=("smuggled", str(code.path))))
    assert not failures(result)
    assert "tombstone" in next(check.detail for check in result.checks if check.name == "absent smuggled")
    with pytest.raises(UsageError, match="is no merged model but an expert"):
        verify(VerifyConfig(path=code.path, absent=("law",)))


def test_a_bundle_that_cannot_be_opened_is_a_failure_and_nothing_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "x.st").write_bytes(b"short")
    result = verify(VerifyConfig(path=tmp_path / "x.st"))
    assert result.digest is None
    assert "is truncated" in failures(result)["structure"]
    with pytest.raises(UsageError, match="no such file"):
        verify(VerifyConfig(path=tmp_path / "none"))


def test_the_tuned_router_goes_back_to_the_owners_rows(world: World) -> None:
    """No command tunes routers yet, but the format has a place for it, and add and remove go back."""
    path = copy_of(world, "m")
    router = path / "model-router.safetensors"
    shutil.copy(router, path / "router-untuned.safetensors")
    header = read_header(router)
    content = bytearray(router.read_bytes())
    content[len(header.head) : len(header.head) + 96] = bytes(96)
    router.write_bytes(bytes(content))
    manifest = json.loads((path / "flexctl.json").read_bytes())
    manifest["router"]["tuned_with"] = ["code", "low"]
    for name, info, _ in hash_spans(router, header.tensors):
        manifest["tensors"][name] = encode(info)
    manifest["files"]["router-untuned.safetensors"] = hashlib.sha256(
        (path / "router-untuned.safetensors").read_bytes()
    ).hexdigest()
    manifest["digest"] = digest_in(manifest)
    decoded = read_manifest(canonical_json(manifest), "f")
    (path / "README.md").write_text(merged_card(decoded))  # type: ignore[arg-type]
    reseal(path, **manifest)
    assert failures(verify(VerifyConfig(path=path))) == {}
    remove(RemoveConfig(names=("low",), source=path, output=Path("rest")))
    merge(MergeConfig(experts=world.files("code"), anchor=world.anchor.path, output=Path("fresh")))
    assert read_directory(Path("rest")) == read_directory(Path("fresh"))
    assert open_merged(Path("rest")).manifest.router.tuned_with is None


def test_digests_are_of_tensors_and_files(world: World) -> None:
    manifest = open_merged(world.root / "m").manifest
    assert manifest.digest == digest_of(manifest.tensors, manifest.files)
    assert world.experts["code"].digest == digest_of(world.experts["code"].manifest.tensors)
    with pytest.raises(BundleError, match=r"digest is .* another"):
        read_manifest(canonical_json(encode(manifest) | {"digest": "sha256:" + "0" * 64}), "f")
