"""replace: the result is a merge with the new expert, and the changes are told."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from builders import World, forge_expert, make_anchor, make_expert, make_world, read_directory

from flexctl.bundle import open_merged
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.replace import Change, ReplaceConfig, replace
from flexctl.errors import BundleError, FlexctlError, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("code", "law", "math"), dtype="BF16")


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


@pytest.fixture
def merged(world: World) -> Path:
    return merge(MergeConfig(experts=world.files(), anchor=world.anchor.path, output=Path("merged"))).path


@pytest.mark.parametrize("rank", [None, 2])
def test_it_equals_a_merge_with_the_new_one(world: World, merged: Path, tmp_path: Path, rank: int | None) -> None:
    new = make_expert(tmp_path / "law-2.st", world.anchor, "law", seed=9, rank=rank, license="MIT", label="more law")
    result = replace(ReplaceConfig(name="law", expert=new.path))
    fresh = MergeConfig(experts=(*world.files("code", "math"), new.path), anchor=world.anchor.path, output=Path("f"))
    assert result.digest == merge(fresh).digest
    assert read_directory(merged) == read_directory(Path("f"))
    assert (result.old_digest, result.new_digest) == (world.experts["law"].digest, new.digest)
    changes = {change.field: (change.old, change.new) for change in result.changes}
    assert changes["data.license"] == ("Apache-2.0", "MIT")
    assert changes["data.label"] == (None, "more law")
    assert changes["training.seed"] == (sum(b"law"), 9)
    assert changes.get("rank") == (None if rank is None else (None, 2))
    assert not any(field.startswith("tensors") for field in changes)


def test_only_its_own_file_is_written(world: World, merged: Path, tmp_path: Path) -> None:
    inodes = {file.name: file.stat().st_ino for file in merged.iterdir()}
    new = make_expert(tmp_path / "law-2.st", world.anchor, "law", seed=9)
    replace(ReplaceConfig(name="law", expert=new.path))
    moved = {file.name for file in merged.iterdir() if file.stat().st_ino != inodes[file.name]}
    assert {name for name in moved if "expert" in name or "shared" in name} == {"model-expert-law.safetensors"}


def test_a_new_statement_about_the_same_weights_is_a_replacement(world: World, merged: Path, tmp_path: Path) -> None:
    new = forge_expert(tmp_path / "law-2.st", world.experts["law"], data__license="MIT")
    result = replace(ReplaceConfig(name="law", expert=new))
    assert result.old_digest == result.new_digest
    assert list(result.changes) == [Change(field="data.license", old="Apache-2.0", new="MIT")]
    assert open_merged(merged).manifest.license == "other"


@pytest.mark.usefixtures("merged")
def test_refusals_write_nothing(world: World, tmp_path: Path) -> None:
    stranger = make_expert(tmp_path / "s.st", make_anchor(tmp_path / "other", seed=4, dtype="BF16"), "law")
    expired = make_expert(tmp_path / "e.st", world.anchor, "law", seed=5, expires="2020-01-01")
    twin = forge_expert(tmp_path / "t.st", world.experts["math"], name="law")
    news = make_expert(tmp_path / "n.st", world.anchor, "news")
    before = read_directory(Path())
    for name, expert, message, error in (
        ("law", world.experts["code"].path, r"code.st: name is 'code'; expected 'law'", BundleError),
        ("none", world.experts["code"].path, r"name is 'code'; expected 'none'", BundleError),
        ("law", world.experts["law"].path, r"law is the expert in .* already", UsageError),
        ("law", stranger.path, r"s.st: anchor.digest is", BundleError),
        ("law", expired.path, r"e.st: data.expires of law is 2020-01-01, which is past", BundleError),
        ("law", twin, r"t.st: digest is .* and so is that of .*merged", BundleError),
        ("law", tmp_path / "none.st", r"none.st: no such file", UsageError),
    ):
        with pytest.raises(error, match=message) as caught:
            replace(ReplaceConfig(name=name, expert=expert))
        assert "\n" not in caught.value.message
    with pytest.raises(UsageError, match="has no expert 'news'"):
        replace(ReplaceConfig(name="news", expert=news.path))
    assert read_directory(Path()) == before
    allowed = ReplaceConfig(name="law", expert=expired.path, allow_expired=True, output=Path("out"))
    assert replace(allowed).new_digest == expired.digest
    assert replace(ReplaceConfig(name="law", expert=expired.path, output=Path("out2")), today=datetime.date(2020, 1, 1))


def test_a_dry_run_tells_and_writes_nothing(world: World, merged: Path, tmp_path: Path) -> None:
    new = make_expert(tmp_path / "law-2.st", world.anchor, "law", seed=9)
    before = read_directory(Path())
    result = replace(ReplaceConfig(name="law", expert=new.path, dry_run=True))
    assert result.digest is None
    assert result.changes
    assert read_directory(Path()) == before
    elsewhere: dict[str, Any] = {"name": "law", "expert": new.path, "source": merged.rename("elsewhere")}
    with pytest.raises(FlexctlError, match="exists already"):
        replace(ReplaceConfig(**elsewhere, dry_run=True))
