"""What is pushed comes back with the same digest, and nothing comes along that should not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import World, read_directory
from hub.server import Hub
from hub.terminal import Terminal

from flexctl.engine.pull import PullConfig, pull
from flexctl.engine.push import PushConfig, push
from flexctl.runtime import Progress, SilentReporter

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def source(world: World, kind: str) -> Path:
    return {"anchor": world.anchor.path, "expert": world.experts["law"].path, "merged": world.root / "merged"}[kind]


@pytest.mark.parametrize("kind", ["anchor", "expert", "merged"])
def test_push_and_pull_give_the_same_bytes(hub: Hub, world: World, terminal: Terminal, kind: str) -> None:
    path = source(world, kind)
    sent = terminal.json("push", path, "acme/thing")
    assert sent["kind"] == kind
    assert sent["commit"] == hub.repositories["acme/thing"].branches["main"]
    got = terminal.json("pull", "acme/thing")
    place = {"anchor": "anchor", "expert": "experts/law.st", "merged": "merged"}[kind]
    assert got["path"] == str(Path(place).absolute())
    assert got["digest"] == sent["digest"]
    assert got["commit"] == sent["commit"]
    if kind == "expert":
        assert Path(place).read_bytes() == path.read_bytes()
    else:
        assert read_directory(Path(place)) == {n: d for n, d in read_directory(path).items() if n != "run.json"}
    assert terminal.json("verify", place)["ok"]
    assert not hub.cdn_tokens
    assert not [item for item in Path(place).parent.iterdir() if item.name.endswith(".tmp")]


class Counting(SilentReporter):
    """Keeps how far every task went."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[float, float]] = {}

    @contextmanager
    def progress(self, title: str, total: float, unit: str, /) -> Iterator[Progress]:
        assert unit == "bytes"
        counting = self
        self.tasks[title] = (0.0, total)

        class Task:
            def advance(self, amount: float, **figures: float | str) -> None:
                assert not figures
                done, whole = counting.tasks[title]
                counting.tasks[title] = (done + amount, whole)

        yield Task()


def test_one_line_of_progress_that_ends_at_all_of_it(hub: Hub, world: World, in_empty_folder: Path) -> None:
    assert hub.repositories == {}
    sending, fetching = Counting(), Counting()
    sent = push(PushConfig(path=world.root / "merged", repository="acme/merged"), sending)
    assert sending.tasks["sending to acme/merged"] == (sent.size_bytes, sent.size_bytes)
    pull(PullConfig(repository="acme/merged", output=in_empty_folder / "a"), fetching)
    done, total = fetching.tasks["fetching hf://acme/merged"]
    assert done == total >= sent.size_bytes
    assert set(fetching.tasks) == {"fetching hf://acme/merged", "hashing"}
