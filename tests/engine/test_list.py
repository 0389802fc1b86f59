"""list: what a workspace holds, whole or broken."""

from __future__ import annotations

import datetime
from dataclasses import asdict
from pathlib import Path

import pytest
from builders import World, make_anchor, make_expert, make_world

from flexctl import workspace
from flexctl.bundle import RouterInfo, write_router_file
from flexctl.engine.list import ListConfig
from flexctl.engine.list import list as list_
from flexctl.engine.merge import MergeConfig, merge


@pytest.fixture
def world(in_empty_folder: Path) -> World:
    return make_world(in_empty_folder, ("code", "law"))


def test_an_empty_folder_holds_nothing(in_empty_folder: Path) -> None:
    result = list_(ListConfig())
    assert (result.path, result.anchor, result.experts, result.merged) == (in_empty_folder, None, (), None)


def test_a_workspace_is_listed_from_wherever_one_stands_in_it(world: World) -> None:
    workspace.ensure(world.root)
    merge(MergeConfig(experts=world.files("code")))
    make_expert(world.root / "experts/law.st", world.anchor, "law", seed=3, license="MIT", overwrite=True)
    result = list_(ListConfig(path=world.root / "experts"))
    assert result.path == world.root
    assert result.anchor is not None
    assert asdict(result.anchor) == {
        "path": world.root / "anchor",
        "name": "tiny-anchor",
        "digest": world.anchor.digest,
        "size_bytes": sum(file.stat().st_size for file in (world.root / "anchor").iterdir()),
        "model_type": "olmo2",
        "license": "Apache-2.0",
        "error": None,
    }
    code, law = result.experts
    assert asdict(code) == {
        "name": "code",
        "path": world.experts["code"].path,
        "digest": world.experts["code"].digest,
        "size_bytes": world.experts["code"].path.stat().st_size,
        "rank": None,
        "license": "Apache-2.0",
        "expires": None,
        "expired": False,
        "in_merged": True,
        "other_in_merged": False,
        "contact": None,
        "error": None,
    }
    assert (law.license, law.in_merged, law.other_in_merged) == ("MIT", False, False)
    assert result.merged is not None
    assert result.merged.experts == ("public", "code")
    assert result.merged.num_experts_per_tok == 2


def test_an_old_version_of_an_expert_is_not_the_one_inside(world: World) -> None:
    merge(MergeConfig(experts=world.files()))
    make_expert(world.root / "experts/law.st", world.anchor, "law", seed=3, overwrite=True)
    experts = list_(ListConfig()).experts
    assert [expert.in_merged for expert in experts] == [True, False]
    assert [expert.other_in_merged for expert in experts] == [False, True]


def test_rank_and_expired_rights(world: World) -> None:
    make_expert(world.root / "experts/low.st", world.anchor, "low", rank=2, expires="2030-06-30")
    day = datetime.date(2030, 6, 30)
    last = list_(ListConfig(), today=day).experts[-1]
    assert (last.name, last.rank, last.expires, last.expired) == ("low", 2, "2030-06-30", False)
    assert list_(ListConfig(), today=day + datetime.timedelta(days=1)).experts[-1].expired


def test_what_is_broken_is_listed_with_its_error(world: World) -> None:
    (world.root / "experts/bad.st").write_bytes(b"short")
    (world.root / "anchor/flexctl.json").write_bytes(b"{}")
    (world.root / "merged").mkdir()
    info = RouterInfo(kind="hidden", samples=1, encoder=None, trained=False, bias=(0.0, -1.0))
    rows = world.experts["code"].router()
    write_router_file(
        world.root / "experts/rows.st", anchor=world.anchor, name="rows", rows=rows, router=info, overwrite=False
    )
    result = list_(ListConfig())
    assert [expert.name for expert in result.experts] == ["bad", "code", "law"]
    assert "is truncated" in str(result.experts[0].error)
    assert result.anchor is not None
    assert "schema_version" in str(result.anchor.error)
    assert result.merged is not None
    assert "is missing" in str(result.merged.error)


def test_places_that_hold_another_kind_are_said_to(world: World) -> None:
    make_anchor(world.root / "merged")
    (world.root / "anchor").rename(world.root / "x")
    merge(MergeConfig(anchor=world.root / "x", output=world.root / "anchor"))
    result = list_(ListConfig())
    assert result.merged is not None
    assert "expected 'merged'" in str(result.merged.error)
    assert result.anchor is not None
    assert "expected 'anchor'" in str(result.anchor.error)
