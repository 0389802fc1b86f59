"""Copying: in the kernel, by hand, or by sharing blocks, and the same bytes come of it."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import World, make_world, read_directory

from flexctl.bundle import copying, hashing
from flexctl.bundle.copying import clone_range, copy_range
from flexctl.bundle.headers import read_header
from flexctl.engine.merge import MergeConfig, MergeResult, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError

NAMES = ("code", "law", "low", "math")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="files share blocks on Linux alone")


def no_kernel_copy(*_: Any) -> int:
    raise OSError(errno.EXDEV, "other file system")


@pytest.mark.parametrize("kernel", [True, False])
def test_ranges_are_copied_in_the_kernel_or_by_hand(
    tmp_path: Path, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(os, "copy_file_range", no_kernel_copy, raising=False)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 10_000)
    with (tmp_path / "target").open("wb") as target:
        copy_range(source, 100, target.fileno(), 7, 2_000_000)
    assert (tmp_path / "target").read_bytes() == bytes(7) + source.read_bytes()[100:2_000_100]
    with (tmp_path / "target").open("wb") as target, pytest.raises(BundleError, match="source: is truncated"):
        copy_range(source, 100, target.fileno(), 0, 2_560_000)


def test_other_errors_of_the_kernel_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    (tmp_path / "source").write_bytes(b"x")
    with (tmp_path / "target").open("wb") as target, pytest.raises(OSError, match="No space left"):
        copy_range(tmp_path / "source", 0, target.fileno(), 0, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    # Each file ends in the middle of a block.
    return make_world(tmp_path_factory.mktemp("world"), NAMES, dtype="BF16", hidden=64, inner=100)


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


def merged(world: World, output: str, *names: str) -> MergeResult:
    return merge(MergeConfig(experts=world.files(*names), anchor=world.anchor.path, output=Path(output)))


class Sharing:
    """Plays a file system whose files can share blocks: what is shared is copied, and counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        self.shared_bytes = 0
        monkeypatch.setattr(fcntl, "ioctl", self)

    def __call__(self, target: int, request: int, argument: bytes) -> int:
        source, start, count, target_start = struct.unpack("=qQQQ", argument)
        block = os.fstatvfs(target).f_frsize
        if request != 0x4020940D or start % block or target_start % block or count % block:
            raise OSError(errno.EINVAL, "not whole blocks")
        assert os.pwrite(target, os.pread(source, count, start), target_start) == count
        self.shared_bytes += count
        return 0


@LINUX
def test_as_many_whole_blocks_as_there_are_may_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(30_000))
    block = os.statvfs(tmp_path).f_frsize
    with (tmp_path / "target").open("w+b") as target:
        monkeypatch.setattr("fcntl.ioctl", no_kernel_copy)
        assert clone_range(source, block, target.fileno(), 0, 20_000) == 0
        assert target.read() == b""
        Sharing(monkeypatch)
        assert clone_range(source, block, target.fileno(), block, 20_000) == 20_000 // block * block
        assert clone_range(source, 1, target.fileno(), block, 20_000) == 0
        assert clone_range(source, block, target.fileno(), 0, block - 1) == 0
        target.seek(block)
        assert target.read() == source.read_bytes()[block:][: 20_000 // block * block]


@LINUX
def test_a_merge_that_shares_blocks_gives_the_bytes_of_one_that_copies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = merged(world, "plain", *NAMES)
    sharing = Sharing(monkeypatch)
    shared = merged(world, "shared", *NAMES)
    assert read_directory(shared.path) == read_directory(plain.path)
    assert shared.bytes_written == plain.bytes_written - sharing.shared_bytes
    size = sum(world.experts[name].path.stat().st_size for name in ("code", "law", "math"))
    assert 0.8 * size < sharing.shared_bytes < size
    assert verify(VerifyConfig(path=shared.path, anchor=world.anchor.path)).ok


@LINUX
def test_removing_where_blocks_are_shared_writes_heads_routers_and_small_files(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 2, and what it costs: everybody behind the one that goes is renumbered."""
    Sharing(monkeypatch)
    merged(world, "merged", *NAMES)
    verify(VerifyConfig(path=Path("merged")))
    heads = sum(len(read_header(file).head) for file in Path("merged").glob("*.safetensors"))
    tails = 4096 * len(NAMES)
    result = remove(RemoveConfig(names=("code",), source=Path("merged"), overwrite=True, trust_cache=True))
    fresh = merged(world, "fresh", "law", "low", "math")
    assert read_directory(Path("merged")) == read_directory(fresh.path)
    others = sum(
        file.stat().st_size
        for file in Path("merged").iterdir()
        if "expert" not in file.name and "shared" not in file.name
    )
    assert result.bytes_written <= heads + tails + others


@LINUX
def test_what_is_shared_is_hashed_like_what_is_copied(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Path("law.st")
    shutil.copy(world.experts["law"].path, bad)
    with bad.open("r+b") as file:
        file.seek(read_header(bad).tensors["layers.1.mlp.up_proj.weight"].start + 5)
        file.write(b"\x01\x02")
    Sharing(monkeypatch)
    with pytest.raises(BundleError, match=r"law.st: tensor layers.1.mlp.up_proj.weight: .* not those of the manifest"):
        merge(MergeConfig(experts=(bad,), anchor=world.anchor.path, output=Path("m")))
    assert not Path("m").exists()


def test_pieces_of_any_size_give_the_same_bytes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = merged(world, "plain", *NAMES)
    monkeypatch.setattr(hashing, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(hashing, "BUFFER_BYTES", 5_000)
    monkeypatch.setattr(copying, "KERNEL_COPY_BYTES", 1_000)
    assert len(list(hashing.pieces(world.experts["law"].spans))) == 7
    small = merged(world, "small", *NAMES)
    assert read_directory(small.path) == read_directory(plain.path)
    assert small.bytes_written == plain.bytes_written
    file = Path("small/model-expert-math.safetensors")
    span = read_header(file).tensors["model.layers.1.mlp.experts.4.down_proj.weight"]
    with file.open("r+b") as output:
        output.seek(span.stop - 2)
        output.write(b"\x01\x02")
    [tensors] = [check for check in verify(VerifyConfig(path=Path("small"))).checks if check.name == "tensors"]
    assert not tensors.ok
    assert "model.layers.1.mlp.experts.4.down_proj.weight" in tensors.detail


@pytest.fixture(params=["xfs", "btrfs"])
def reflinks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give a folder on a file system whose files share blocks, in an image that is mounted for the test."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(400_000_000)
    make = [f"mkfs.{request.param}", "-q", str(image)]
    if shutil.which(make[0]) is None or os.geteuid() != 0:
        pytest.skip(f"needs root and {make[0]}")
    subprocess.run(make, check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", str(image), str(folder)], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let one mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def used_bytes(folder: Path) -> int:
    os.sync()
    return shutil.disk_usage(folder).used


@pytest.mark.slow
def test_on_file_systems_that_share_blocks(reflinks: Path) -> None:
    names, sizes = ("a", "b", "c"), {"dtype": "BF16", "layers": 2, "hidden": 512, "inner": 1030}
    plain = merged(make_world(Path("plain-world"), names, **sizes), "plain", *names)
    world = make_world(reflinks / "world", names, **sizes)
    expert_bytes = world.experts["a"].path.stat().st_size
    before = used_bytes(reflinks)
    shared = merged(world, str(reflinks / "merged"), *names)
    assert used_bytes(reflinks) - before < shared.bytes_written + expert_bytes // 2
    assert shared.bytes_written < plain.bytes_written - 2.9 * expert_bytes
    assert read_directory(shared.path) == read_directory(plain.path)
    before = used_bytes(reflinks)
    less = remove(RemoveConfig(names=("a",), source=shared.path, output=reflinks / "less", trust_cache=True))
    assert less.bytes_written < 100_000
    assert used_bytes(reflinks) - before < 1_000_000
    assert read_directory(less.path) == read_directory(merged(world, "fresh", "b", "c").path)
    assert verify(VerifyConfig(path=less.path, anchor=world.anchor.path, absent=("a",))).ok
