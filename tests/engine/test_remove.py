"""remove: law 2 and law 7, refusals, tombstones, linking."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import World, make_expert, make_world, read_directory
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.bundle import open_merged
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import SilentReporter

NAMES = ("code", "law", "low", "math", "news")


class Listener(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), NAMES, dtype="BF16")


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


def merged(world: World, output: str, *names: str, **settings: Any) -> Path:
    files = world.files(*names) if names else ()
    return merge(MergeConfig(experts=files, anchor=world.anchor.path, output=Path(output), **settings)).path


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_law_2_removing_equals_never_having_merged(world: World, data: st.DataObject) -> None:
    root = Path("law2")
    shutil.rmtree(root, ignore_errors=True)
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1), label="merged")
    gone = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1), label="removed")
    top_k = data.draw(st.none() | st.integers(1, 6), label="top_k")
    merged(world, "law2/all", *names, top_k=top_k)
    fresh = merged(world, "law2/fresh", *sorted(set(names) - set(gone)), top_k=top_k)
    output = data.draw(st.sampled_from([None, Path("law2/rest")]), label="output")
    result = remove(RemoveConfig(names=tuple(gone), source=root / "all", output=output, overwrite=output is None))
    assert read_directory(result.path) == read_directory(fresh)
    assert result.digest == open_merged(fresh).digest
    assert result.exact
    assert set(result.remaining) == set(names) - set(gone)
    assert sorted(os.listdir(root)) == sorted(["all", "fresh"] + (["rest"] if output else []))


def test_one_by_one_equals_all_at_once(world: World) -> None:
    merged(world, "merged", *NAMES)
    for name in ("low", "code", "news"):
        remove(RemoveConfig(names=(name,)))
    merge(MergeConfig(experts=(Path("merged"), *world.files("news"))))
    assert read_directory(Path("merged")) == read_directory(merged(world, "fresh", "law", "math", "news"))


def test_a_removed_name_stands_in_no_file(world: World) -> None:
    path = merged(world, "merged", *NAMES)
    assert b"news" in b"".join(read_directory(path).values())
    remove(RemoveConfig(names=("news",)))
    files = read_directory(path)
    assert b"news" not in b"".join([*files.values(), *(name.encode() for name in files)])


def test_a_tombstone_keeps_name_and_digest(world: World) -> None:
    merged(world, "merged", *NAMES)
    result = remove(RemoveConfig(names=("news", "law"), tombstone=True))
    assert not result.exact
    stones = json.loads(Path("merged/flexctl.json").read_text())["removed"]
    assert stones == [{"name": name, "digest": world.experts[name].digest} for name in ("law", "news")]
    assert "## Removed" in Path("merged/README.md").read_text()
    result = remove(RemoveConfig(names=("math",)))
    assert not result.exact
    assert len(open_merged(Path("merged")).manifest.removed) == 2
    merge(MergeConfig(experts=(Path("merged"), *world.files("law"))))
    assert [stone.name for stone in open_merged(Path("merged")).manifest.removed] == ["news"]
    assert verify(VerifyConfig(path=Path("merged"), absent=("news",))).ok


def test_files_of_experts_that_keep_their_index_move_over(world: World) -> None:
    merged(world, "merged", "code", "law", "math")
    inodes = {file.name: file.stat().st_ino for file in Path("merged").iterdir()}
    sizes = {file.name: file.stat().st_size for file in Path("merged").iterdir()}
    result = remove(RemoveConfig(names=("law",)))
    kept = {file.name for file in Path("merged").iterdir() if file.stat().st_ino == inodes[file.name]}
    assert kept == {f"model-{part}.safetensors" for part in ("shared", "expert-public", "expert-code")}
    assert all(file.stat().st_nlink == 1 for file in Path("merged").iterdir())
    assert result.bytes_written < sum(sizes.values()) - sum(sizes[name] for name in kept)


def test_nothing_is_linked_when_the_old_one_stays(world: World) -> None:
    merged(world, "merged", *NAMES)
    before = read_directory(Path("merged"))
    remove(RemoveConfig(names=("law",), output=Path("rest")))
    assert read_directory(Path("merged")) == before
    assert all(file.stat().st_nlink == 1 for folder in ("merged", "rest") for file in Path(folder).iterdir())


def test_clamping_is_said_and_forgotten_again(world: World) -> None:
    merged(world, "merged", "code", "law", "math")
    listener = Listener()
    result = remove(RemoveConfig(names=("law",)), listener)
    assert listener.warnings == ["num_experts_per_tok goes from 4 to 3: there are no more experts"]
    assert result.num_experts_per_tok == 3
    assert json.loads(Path("merged/config.json").read_text())["num_experts_per_tok"] == 3
    assert merge(MergeConfig(experts=(Path("merged"), *world.files("law")))).num_experts_per_tok == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("public",), "the public expert is the anchor's own and cannot be removed"),
        (("none",), "has no expert 'none'"),
        (("code", "none"), "has no expert 'none'"),
        (("../code",), "has no expert"),
        ((), "needs the NAME"),
    ],
)
def test_what_is_not_there_cannot_be_removed(world: World, names: tuple[str, ...], message: str) -> None:
    merged(world, "merged", "code", "law")
    before = read_directory(Path())
    with pytest.raises(UsageError, match=message) as caught:
        remove(RemoveConfig(names=names))
    assert caught.value.hint or "public" in message
    assert read_directory(Path()) == before


def test_targets_that_exist_are_refused_unless_told(world: World) -> None:
    merged(world, "other", "code", "law")
    merged(world, "third", "code")
    before = read_directory(Path())
    with pytest.raises(UsageError, match=r"other: exists already"):
        remove(RemoveConfig(names=("law",), source=Path("other")))
    with pytest.raises(UsageError, match=r"third: exists already"):
        remove(RemoveConfig(names=("law",), source=Path("other"), output=Path("third")))
    with pytest.raises(UsageError, match=r"no such directory"):
        remove(RemoveConfig(names=("law",)))
    assert read_directory(Path()) == before
    remove(RemoveConfig(names=("law",), source=Path("other"), output=Path("third"), overwrite=True))
    assert open_merged(Path("third")).names == ("code",)


def test_a_dry_run_tells_and_writes_nothing(world: World) -> None:
    merged(world, "merged", "code", "law")
    before = read_directory(Path())
    result = remove(RemoveConfig(names=("law",), dry_run=True))
    assert (result.digest, result.removed, result.remaining, result.dry_run) == (None, ("law",), ("code",), True)
    assert read_directory(Path()) == before


def test_what_is_kept_is_hashed_again(world: World) -> None:
    path = merged(world, "merged", "code", "law", "math")
    for file in ("model-expert-code.safetensors", "model-expert-math.safetensors", "model-shared.safetensors"):
        good = (path / file).read_bytes()
        (path / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        before = read_directory(Path())
        with pytest.raises(BundleError, match=rf"merged/{file}: tensor \S+: its bytes are not those"):
            remove(RemoveConfig(names=("law",)))
        assert read_directory(Path()) == before
        (path / file).write_bytes(good)


def test_unknown_files_are_not_deleted_with_the_old_model(world: World) -> None:
    path = merged(world, "merged", "code", "law")
    (path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes.txt: would be deleted"):
        remove(RemoveConfig(names=("law",)))
    assert (path / "notes.txt").read_text() == "mine"
    (path / "notes.txt").unlink()
    (path / "results.json").write_text("{}")
    remove(RemoveConfig(names=("law",)))
    assert not (path / "results.json").exists()


def test_an_expert_that_has_expired_can_go_and_others_do_not_stop_it(world: World) -> None:
    for name in ("old", "older"):
        make_expert(Path(f"{name}.st"), world.anchor, name, expires="2020-01-01")
    config = MergeConfig(
        experts=(Path("old.st"), Path("older.st")), anchor=world.anchor.path, output=Path("merged"), allow_expired=True
    )
    merge(config)
    assert remove(RemoveConfig(names=("old",))).remaining == ("older",)


# Law 7: whatever moment a command is killed at, the target is the old artefact or the new one.

KILL = """
import os, random, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from builders import read_directory
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.merge import MergeConfig, merge

mode, anchor, expert = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
target, saved = Path("merged"), Path("saved")
old = {} if mode == "fresh" else read_directory(saved)

def command():
    if mode == "remove":
        remove(RemoveConfig(names=("law",)))
    elif mode == "add":
        merge(MergeConfig(experts=(target, expert)))
    else:
        merge(MergeConfig(experts=(expert,), anchor=anchor))

def reset():
    shutil.rmtree(target, ignore_errors=True)
    if old:
        shutil.copytree(saved, target)

def run(arm):
    # Runs the command in a child that may kill itself; says whether it lived.
    child = os.fork()
    if child == 0:
        arm()
        command()
        os._exit(0)
    return child

def await_(child):
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return not os.WIFSIGNALED(status)

reset()
command()
new = read_directory(target)
assert new != old

def count_then_kill(limit):
    seen = [0]
    def hook(event, args):
        if event == "open" or event.split(".")[0] in ("os", "shutil", "ctypes"):
            seen[0] += 1
            if seen[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)

def check():
    found = read_directory(target) if target.exists() else {}
    assert found in (old, new), "the target is neither the old nor the new model"
    states.add(found == new)
    leftovers.update(item.name for item in Path().iterdir() if item.name.startswith("."))

states, leftovers, point, lived = set(), set(), 0, False
while not lived:
    point += 5
    reset()
    lived = await_(run(count_then_kill(point)))
    check()
assert states == {False, True}, "it must have been killed before and after the swap"
assert leftovers, "it must have been killed with a half-written sibling"

began = time.monotonic()
reset()
await_(run(lambda: None))
whole = time.monotonic() - began
chance = random.Random(0)
for _ in range(15):
    reset()
    child = run(lambda: None)
    time.sleep(chance.uniform(0, whole))
    os.kill(child, signal.SIGKILL)
    await_(child)
    check()

reset()
command()
assert [item.name for item in Path().iterdir() if item.name.startswith(".")] == [], "what was left must be swept"
print(point)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("mode", ["remove", "add", "fresh"])
def test_law_7_a_killed_command_leaves_the_old_model_or_the_new_one(world: World, mode: str) -> None:
    merged(world, "saved", "code", "law", "math")
    tests = str(Path(__file__).parent.parent)
    arguments = [tests, mode, str(world.anchor.path), str(world.experts["low"].path)]
    done = subprocess.run([sys.executable, "-c", KILL, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
