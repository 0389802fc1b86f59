"""templates/ beside the package and inside it, and what is made of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from flexctl import shipped, workspace

ROOT = Path(__file__).parent.parent


def test_a_checkout_has_its_templates_beside_the_package() -> None:
    files = [file for file in (ROOT / "templates").rglob("*") if file.is_file()]
    assert ROOT / "templates" / "launch" / "slurm.sbatch" in files
    for file in files:
        name = file.relative_to(ROOT / "templates").as_posix()
        assert shipped.template(name) == file.read_text(encoding="utf-8")


def test_an_installed_package_has_them_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, beside = tmp_path / "site" / "flexctl" / "templates", tmp_path / "site" / "templates"
    for folder, text in ((inside, "ours"), (beside, "somebody else's")):
        folder.mkdir(parents=True)
        (folder / "flexctl.toml").write_text(text)
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site" / "flexctl")
    assert shipped.template("flexctl.toml") == "ours"


def test_the_starter_says_where_things_are_without_a_file_too(tmp_path: Path) -> None:
    usual = workspace.find(tmp_path)
    assert not usual.file.exists()
    assert dataclasses.replace(workspace.ensure(tmp_path), defaults={}) == usual
    assert usual.file.read_text(encoding="utf-8") == shipped.template("flexctl.toml")


def test_every_line_of_the_starter_that_is_a_comment_can_be_turned_on(tmp_path: Path) -> None:
    text = shipped.template("flexctl.toml").replace("# [", "[").replace("# max_", "max_")
    (tmp_path / "flexctl.toml").write_text(text, encoding="utf-8")
    assert workspace.find(tmp_path).defaults == {"train_expert": {"max_tokens": 2_000_000}}
