"""prove: what a model is built from is hashed once, and again when a file changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from builders import World, make_world

from flexctl.bundle import checks, hashing, open_anchor, open_expert, open_merged
from flexctl.bundle.assembly import write_merged
from flexctl.bundle.checks import prove
from flexctl.bundle.composition import compose_anchor
from flexctl.errors import BundleError
from flexctl.runtime import SILENT


@pytest.fixture
def world(in_empty_folder: Path) -> World:
    return make_world(in_empty_folder, ("law",))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the weight files that are hashed, in a cache of their own."""
    names: list[str] = []

    def spy(path: Path, *rest: Any) -> Any:
        names.append(path.name)
        return hashing.check_tensors(path, *rest)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(checks, "check_tensors", spy)
    return names


def change_byte(path: Path, position: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def test_files_are_hashed_once_until_one_changes(world: World, hashed: list[str]) -> None:
    write_merged(Path("m"), compose_anchor(world.anchor).adding([world.experts["law"]]), overwrite=False)
    for bundle in (world.anchor, world.experts["law"], open_merged(Path("m"))):
        del hashed[:]
        prove(bundle, SILENT)
        assert hashed
        del hashed[:]
        prove(bundle, SILENT)
        assert hashed == []
    file = Path("m/model-expert-law.safetensors")
    change_byte(file, -1)
    with pytest.raises(
        BundleError, match=r"model-expert-law\.safetensors: tensor .* not those of the manifest"
    ) as caught:
        prove(open_merged(Path("m")), SILENT)
    assert hashed == [file.name]
    assert caught.value.exit_code == 3


def test_a_changed_expert_is_refused(world: World) -> None:
    path = world.experts["law"].path
    prove(open_expert(path), SILENT)
    change_byte(path, -1)
    with pytest.raises(BundleError, match=r"law\.st: tensor router\.weight"):
        prove(open_expert(path), SILENT)


def test_a_changed_tokenizer_is_refused(world: World) -> None:
    prove(world.anchor, SILENT)
    change_byte(world.anchor.path / "tokenizer.json", 0)
    with pytest.raises(BundleError, match=r"tokenizer\.json: its bytes are not those of the manifest"):
        prove(open_anchor(world.anchor.path), SILENT)
