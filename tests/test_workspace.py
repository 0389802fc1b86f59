from __future__ import annotations

from pathlib import Path

import pytest

from flexctl import workspace
from flexctl.errors import UsageError


@pytest.fixture(autouse=True)
def _no_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ANCHOR", "EXPERTS", "MERGED"):
        monkeypatch.delenv(f"FLEXCTL_{name}", raising=False)


def write(folder: Path, text: str) -> None:
    (folder / "flexctl.toml").write_text(text, encoding="utf-8")


def test_without_a_file_the_places_have_their_usual_names(tmp_path: Path) -> None:
    space = workspace.find(tmp_path)
    assert space.root == tmp_path
    assert (space.anchor, space.experts, space.merged) == tuple(
        tmp_path / name for name in ("anchor", "experts", "merged")
    )
    assert space.defaults == {}


def test_the_nearest_file_upwards_counts_and_its_paths_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, '[workspace]\nanchor = "public/model"\n[merge]\ntop_k = 2\n')
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    space = workspace.find()
    assert space.root == tmp_path
    assert space.anchor == tmp_path / "public" / "model"
    assert space.merged == tmp_path / "merged"
    assert space.defaults == {"merge": {"top_k": 2}}


def test_the_environment_overrides_places_from_where_the_user_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, '[workspace]\nanchor = "public"\n')
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    monkeypatch.setenv("FLEXCTL_ANCHOR", "other")
    assert workspace.find().anchor == tmp_path / "below" / "other"


def test_ensure_writes_a_file_that_find_reads_back(tmp_path: Path) -> None:
    written = workspace.ensure(tmp_path)
    assert written.file.is_file()
    assert workspace.find(tmp_path) == written


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "flexctl.toml").write_bytes(b"\xef\xbb\xbf[workspace]\nanchor = 'a'\n")
    assert workspace.find(tmp_path).anchor == tmp_path / "a"


def test_ensure_leaves_a_workspace_alone_even_from_inside(tmp_path: Path) -> None:
    write(tmp_path, '[workspace]\nanchor = "models/anchor"\n')
    (tmp_path / "models").mkdir()
    before = (tmp_path / "flexctl.toml").read_text()
    assert workspace.ensure(tmp_path / "models").root == tmp_path
    assert (tmp_path / "flexctl.toml").read_text() == before
    assert not (tmp_path / "models" / "flexctl.toml").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[merged]\n", "unknown table [merged]; known are workspace, init_anchor,"),
        ("merge = 3\n", "merge must be a table"),
        (
            '[workspace]\nanker = "x"\n',
            "unknown key 'anker' in [workspace]; known are anchor, experts, merged",
        ),
        ("[workspace]\nanchor = 3\n", "[workspace] anchor is 3; expected a path in quotes"),
        ("[workspace\n", "not valid TOML"),
        ("merge = " + "[" * 100_000 + "]" * 100_000, "not valid TOML"),
    ],
)
def test_mistakes_are_named_with_file_table_and_key(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        workspace.find(tmp_path)
    assert str(tmp_path / "flexctl.toml") in caught.value.message
    assert said in caught.value.message
