"""inspect: what every kind says, from manifests alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import World, make_world

from flexctl.bundle import RouterInfo, write_router_file
from flexctl.engine.inspect import InspectConfig, inspect
from flexctl.engine.merge import MergeConfig, merge
from flexctl.errors import BundleError, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = make_world(tmp_path_factory.mktemp("world"), ("code", "law"))
    merge(MergeConfig(experts=world.files(), anchor=world.anchor.path, output=world.root / "m"))
    info = RouterInfo(kind="hidden", samples=1, encoder=None, trained=False, bias=(0.0, -1.0))
    rows = world.experts["code"].router()
    write_router_file(world.root / "r.st", anchor=world.anchor, name="rows", rows=rows, router=info, overwrite=False)
    return world


@pytest.mark.parametrize(
    ("place", "kind", "name", "parameters"),
    [
        ("anchor", "anchor", "tiny-anchor", None),
        ("experts/code.st", "expert", "code", 2 * 3 * 8 * 12 + 16),
        ("r.st", "router", "rows", 16),
        ("m", "merged", None, None),
    ],
)
def test_every_kind_is_shown(world: World, place: str, kind: str, name: str | None, parameters: int | None) -> None:
    path = world.root / place
    result = inspect(InspectConfig(path=path))
    assert (result.kind, result.name) == (kind, name)
    assert parameters in (None, result.num_parameters)
    files = path.iterdir() if path.is_dir() else [path]
    assert result.size_bytes == sum(file.stat().st_size for file in files)
    assert result.digest == result.manifest["digest"]
    assert result.num_tensors == len(result.manifest["tensors"])
    json.dumps(result.manifest, allow_nan=False)


def test_weights_are_not_read(world: World) -> None:
    path = world.root / "anchor"
    (path / "model.safetensors").rename(path / "away")
    try:
        assert inspect(InspectConfig(path=path)).kind == "anchor"
    finally:
        (path / "away").rename(path / "model.safetensors")


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"flexctl.json: is missing"):
        inspect(InspectConfig(path=tmp_path))
    with pytest.raises(UsageError, match="no such file or directory") as caught:
        inspect(InspectConfig(path=tmp_path / "none"))
    assert caught.value.hint == "flexctl list shows the bundles of the workspace"
