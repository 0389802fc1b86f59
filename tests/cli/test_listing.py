"""How list reads: at a glance, within 80 columns, with a dozen experts."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import World, make_expert, make_world

from flexctl.cli.app import main
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove

NAMES = (
    "academic",
    "code",
    "creative-writing",
    "law",
    "math",
    "medical-notes-2024",
    "news",
    "patents",
    "pes2o",
    "reddit",
    "textbooks",
    "wiki",
)


@pytest.fixture
def world(in_empty_folder: Path) -> World:
    return make_world(in_empty_folder, NAMES)


def listed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["list"]) == 0
    return capsys.readouterr().out.splitlines()


def row_of(name: str, lines: list[str]) -> list[str]:
    return next(line for line in lines if line.startswith(name)).split()


def test_a_dozen_experts_within_80_columns(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    merge(MergeConfig(experts=world.files(*NAMES[:9])))
    make_expert(
        world.root / "experts/wiki.st",
        world.anchor,
        "wiki",
        rank=2,
        license="Licence of ACME, version 7, ask us",
        expires="2024-06-30",
        overwrite=True,
    )
    make_expert(world.root / "experts/law.st", world.anchor, "law", seed=3, license=None, overwrite=True)
    lines = listed(capsys)
    table = lines[lines.index("") + 1 :]
    assert max(map(len, table)) <= 80
    assert table[0].startswith("anchor  tiny-anchor, olmo2, license Apache-2.0, sha256:")
    assert table[1].startswith("merged  public and 9 experts, 4 active, license Apache-2.0, sha256:")
    assert table[3].split() == ["expert", "size", "rank", "license", "expires", "merged"]
    assert [line.split()[0] for line in table[4:]] == list(NAMES)
    assert row_of("code", table)[3:] == ["full", "Apache-2.0", "-", "yes"]
    assert row_of("law", table)[3:] == ["full", "unknown", "-", "another"]
    assert row_of("reddit", table)[-1] == "no"
    assert row_of("wiki", table)[3:] == ["2", "Licence", "of", "AC...", "2024-06-30", "EXPIRED", "no"]


def test_what_is_inside_without_a_file_here_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    merge(MergeConfig(experts=world.files(*NAMES[:3])))
    world.experts["code"].path.unlink()
    world.experts["academic"].path.rename(world.root / "experts/a.st")
    lines = listed(capsys)
    assert "        also holds, without a file here: code" in lines
    assert row_of("academic (a.st)", lines)[-1] == "yes"
    remove(RemoveConfig(names=NAMES[:2]))
    (world.root / "merged").rename(world.root / "m")
    Path("flexctl.toml").write_text('[workspace]\nmerged = "m"\n')
    lines = listed(capsys)
    assert any(line.startswith("merged  m: public and 1 expert, 2 active") for line in lines)
    assert not any("also holds" in line for line in lines)


def test_what_is_broken_is_one_line_each(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.root / "experts/bad.st").write_bytes(b"short")
    (world.root / "anchor/flexctl.json").unlink()
    (world.root / "merged").mkdir()
    lines = listed(capsys)
    assert lines[-1].startswith("broken: experts/bad.st: is truncated")
    assert any(line.startswith("anchor  broken: anchor/flexctl.json: ") for line in lines)
    assert any(line.startswith("merged  broken: merged/flexctl.json: ") for line in lines)
    assert not any(line.startswith("bad ") for line in lines)
