"""Changing a merged model: a workspace's own in place, any other only where that was asked for."""

from __future__ import annotations

from pathlib import Path

from flexctl.steps.change import place_of_change


def test_a_workspace_s_own_model_changes_in_place(in_empty_folder: Path) -> None:
    elsewhere = in_empty_folder / "elsewhere/other"
    assert place_of_change(Path("merged"), None) == (Path("merged"), True)
    assert place_of_change(in_empty_folder / "merged", Path("merged")) == (Path("merged"), True)
    assert place_of_change(Path("merged"), Path("new")) == (Path("new"), False)
    assert place_of_change(elsewhere, None) == (elsewhere, False)
    assert place_of_change(elsewhere.with_name("merged"), None) == (elsewhere.with_name("merged"), True)
