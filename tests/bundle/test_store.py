"""Writing: nothing half done is ever seen, and nothing of somebody else's is ever lost."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from flexctl.bundle import store
from flexctl.bundle.store import (
    check_directory_target,
    new_directory,
    new_file,
    require_space,
)
from flexctl.errors import BundleError, FlexctlError, UsageError


def make_bundle(path: Path, kind: str = "merged", **files: str) -> Path:
    path.mkdir(parents=True)
    (path / "flexctl.json").write_text(f'{{"kind":"{kind}","files":{{"config.json":""}}}}')
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_a_file_appears_whole_and_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a/b/x.st"
    with new_file(target, overwrite=False) as temporary:
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["x.st"]


def test_a_file_inside_a_bundle_is_written_beside_it(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    with new_file(tmp_path / "merged/results.json", overwrite=True, beside=tmp_path / "merged") as temporary:
        temporary.write_bytes(b"new")
        assert temporary.parent == tmp_path
        assert os.listdir(tmp_path / "merged") == []
    assert (tmp_path / "merged/results.json").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["merged"]


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_file(tmp_path / "a/b/x.st", overwrite=False) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_is_refused_and_overwritten_when_told(tmp_path: Path) -> None:
    target = tmp_path / "x.st"
    target.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists already"), new_file(target, overwrite=False):
        pytest.fail("the block must not run")
    with new_file(target, overwrite=True) as temporary:
        temporary.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    with pytest.raises(UsageError, match="is a directory"), new_file(tmp_path, overwrite=True):
        pytest.fail("the block must not run")


def test_a_file_that_appears_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "x.st"

    def race() -> None:
        with new_file(target, overwrite=False) as temporary:
            temporary.write_bytes(b"mine")
            target.write_bytes(b"theirs")

    with pytest.raises(UsageError, match="exists already"):
        race()
    assert target.read_bytes() == b"theirs"


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a/merged"
    with new_directory(target, kind="merged", overwrite=False) as temporary:
        (temporary / "x").write_text("new")
        assert not target.exists()
    assert (target / "x").read_text() == "new"
    assert os.listdir(target.parent) == ["merged"]


def test_a_directory_is_swapped_and_the_old_one_goes(tmp_path: Path) -> None:
    target = make_bundle(tmp_path / "merged", config__json="old", run__json="{}")
    with new_directory(target, kind="merged", overwrite=True) as temporary:
        (temporary / "x").write_text("new")
        assert os.listdir(temporary) == ["x"]
        assert (target / "config.json").read_text() == "old"
    assert os.listdir(target) == ["x"]
    assert os.listdir(tmp_path) == ["merged"]


def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    make_bundle(tmp_path / "disk/v1")
    (tmp_path / "merged").symlink_to("disk/v1")
    with new_directory(tmp_path / "merged", kind="merged", overwrite=True) as temporary:
        (temporary / "x").write_text("new")
    assert (tmp_path / "merged").is_symlink()
    assert os.listdir(tmp_path / "disk/v1") == ["x"]
    (tmp_path / "link.st").symlink_to("disk/a.st")
    (tmp_path / "disk/a.st").write_text("old")
    with new_file(tmp_path / "link.st", overwrite=True) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link.st").is_symlink()
    assert (tmp_path / "disk/a.st").read_text() == "new"


def test_only_bundles_of_the_same_kind_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    make_bundle(tmp_path / "anchor", kind="anchor")
    for name in ("photos", "file", "anchor"):
        with (
            pytest.raises(UsageError, match="holds no merged bundle"),
            new_directory(tmp_path / name, kind="merged", overwrite=True),
        ):
            pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == ["anchor", "file", "photos"]


@pytest.mark.parametrize("mine", ["notes.txt", ".git"])
def test_what_is_no_part_of_the_bundle_is_not_deleted_with_it(tmp_path: Path, mine: str) -> None:
    target = make_bundle(tmp_path / "merged")
    (target / mine).mkdir() if mine == ".git" else (target / mine).write_text("x")
    with (
        pytest.raises(UsageError, match=rf"merged/{mine}: would be deleted"),
        new_directory(target, kind="merged", overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (target / mine).exists()


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with new_file(tmp_path / "x.st", overwrite=False) as temporary:
            temporary.write_text("x")
        with new_directory(tmp_path / "merged", kind="merged", overwrite=False) as temporary:
            (temporary / "y").write_text("y")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.st").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "merged/y").stat().st_mode) == 0o640


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = tmp_path / f".merged.{store._MACHINE}-{int(done.stdout)}-0.tmp"
    dead.mkdir()
    (dead / "x").write_text("left")
    living = tmp_path / f".merged.{store._MACHINE}-{os.getppid()}-0.tmp"
    elsewhere = tmp_path / f".merged.00000000-{int(done.stdout)}-0.tmp"
    other = tmp_path / f".other.{store._MACHINE}-{int(done.stdout)}-0.tmp"
    for path in (living, elsewhere, other):
        path.mkdir()
    with new_directory(tmp_path / "merged", kind="merged", overwrite=False):
        pass
    assert sorted(tmp_path.iterdir()) == sorted([living, elsewhere, other, tmp_path / "merged"])


def test_where_directories_cannot_be_swapped_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_bundle(tmp_path / "merged")
    monkeypatch.setattr(store.sys, "platform", "sunos5")
    with (
        pytest.raises(FlexctlError, match="cannot replace a directory in one step"),
        new_directory(target, kind="merged", overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert os.listdir(tmp_path) == ["merged"]
    assert os.listdir(target) == ["flexctl.json"]


def test_a_full_disk_is_told_before_the_work(tmp_path: Path) -> None:
    require_space(tmp_path / "not/yet/there", 1)
    with pytest.raises(FlexctlError, match="the disk has"):
        require_space(tmp_path / "not/yet/there", 10**18)


def fill(target: Path, *, overwrite: bool = False) -> None:
    with new_directory(target, kind="merged", overwrite=overwrite) as temporary:
        for name in ("config.json", "flexctl.json", "model.safetensors"):
            (temporary / name).write_text("x")


FILES = ["config.json", "flexctl.json", "model.safetensors"]


def test_an_empty_folder_is_as_good_as_none_and_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir(mode=0o700)
    assert check_directory_target(tmp_path / "merged", kind="anchor", overwrite=False) == tmp_path / "merged"
    with new_directory(tmp_path / "merged", kind="merged", overwrite=False) as temporary:
        assert temporary.parent == tmp_path
        assert os.listdir(tmp_path / "merged") == []
    assert stat.S_IMODE((tmp_path / "merged").stat().st_mode) == 0o700
    fill(tmp_path / "merged")
    assert sorted(os.listdir(tmp_path / "merged")) == FILES
    with pytest.raises(UsageError, match="exists already"):
        fill(tmp_path / "merged")


def test_an_empty_folder_that_is_filled_meanwhile_is_not_lost(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()

    def race() -> None:
        with new_directory(tmp_path / "merged", kind="merged", overwrite=False):
            (tmp_path / "merged/theirs").write_text("x")

    with pytest.raises(UsageError, match="exists already"):
        race()
    assert os.listdir(tmp_path / "merged") == ["theirs"]
    assert os.listdir(tmp_path) == ["merged"]


@pytest.fixture(params=["mount", "closed", "here"])
def fixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that must stay the folder that it is."""
    target = tmp_path / "merged"
    target.mkdir()
    if request.param == "mount":
        monkeypatch.setattr(store, "_is_mount", lambda path: path == target)
    elif request.param == "closed":
        monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    else:
        monkeypatch.chdir(target)
    return target


def test_a_folder_that_cannot_be_replaced_is_filled(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename, moved = fixed.stat().st_ino, os.rename, []

    def watching(source: Path, target: Path) -> None:
        moved.append(Path(target).name)
        assert not (fixed / "flexctl.json").exists()
        rename(source, target)

    monkeypatch.setattr(os, "rename", watching)
    fill(fixed)
    assert (fixed.stat().st_ino, sorted(os.listdir(fixed))) == (folder, FILES)
    assert moved[-1] == "flexctl.json"
    assert os.listdir(fixed.parent) == ["merged"]


def test_what_fails_in_a_folder_that_is_filled_leaves_it_empty(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> None:
        with new_directory(fixed, kind="merged", overwrite=False) as temporary:
            (temporary / "x").write_text("x")
            raise BundleError("no")

    with pytest.raises(BundleError):
        failing()
    assert os.listdir(fixed) == []
    rename = os.rename

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "flexctl.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        fill(fixed)
    assert os.listdir(fixed) == []


def test_what_a_killed_process_left_inside_is_swept(fixed: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = fixed / f".merged.{store._MACHINE}-{int(done.stdout)}-0.tmp"
    left.mkdir()
    (left / "x").write_text("x")
    fill(fixed)
    assert sorted(os.listdir(fixed)) == FILES


MOUNTED = """
import os, sys
from pathlib import Path
from flexctl.bundle.store import check_directory_target, new_directory, new_file
from flexctl.errors import UsageError
target = Path(sys.argv[1])
device = target.stat().st_dev
with new_directory(target, kind="merged", overwrite=False) as temporary:
    (temporary / "flexctl.json").write_text('{"kind": "merged"}')
    (temporary / "config.json").write_text("x")
assert (target.stat().st_dev, sorted(os.listdir(target))) == (device, ["config.json", "flexctl.json"])
with new_file(target / "results.json", overwrite=True, beside=target) as temporary:
    temporary.write_text("x")
assert sorted(os.listdir(target)) == ["config.json", "flexctl.json", "results.json"]
(target / "config.json").unlink()
try:
    check_directory_target(target, kind="merged", overwrite=True)
except UsageError as error:
    print(error.message)
"""


@pytest.mark.parametrize("mount", ["-t tmpfs none", "--bind other"])
def test_a_real_mount_point_is_filled_and_never_replaced(tmp_path: Path, mount: str) -> None:
    for name in ("a merged", "other"):
        (tmp_path / name).mkdir()
    script = f'mount {mount} "$2" && exec "$0" -c "$1" "$2"'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, sys.executable, MOUNTED, "a merged"]
    try:
        subprocess.run([*command[:3], "sh", "-c", f'mount {mount} "a merged"'], check=True, cwd=tmp_path)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("nothing can be mounted here")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a merged: is a mount point, which cannot be replaced in one step" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["a merged", "other"]
