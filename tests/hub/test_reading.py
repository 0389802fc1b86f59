"""Bundles that are named by their address on the Hub."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from builders import World, make_checkpoint, read_directory
from hub.server import TOKEN, Hub
from hub.terminal import Terminal

from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.push import PushConfig, push
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.errors import UsageError
from flexctl.hub import Address, fetch_checkpoint, is_remote, parse

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def published(hub: Hub, world: World) -> Hub:
    """The Hub with an anchor, two experts and a merged model."""
    for name, path in {
        "anchor": world.anchor.path,
        "law": world.experts["law"].path,
        "code": world.experts["code"].path,
        "merged": world.root / "without-law",
    }.items():
        push(PushConfig(path=path, repository=f"acme/{name}"))
    hub.sent_bytes = 0
    return hub


def test_addresses() -> None:
    whole = Address(repository="acme/law", revision="refs/pr/1", file="law.st")
    assert str(whole) == "hf://acme/law@refs%2Fpr%2F1/law.st"
    assert parse(str(whole)) == parse(Path(str(whole))) == parse("hf://acme/law@refs/pr/1/law.st") == whole
    assert parse("acme/law") == Address(repository="acme/law")
    assert is_remote(Path("hf://acme/law"))
    assert not is_remote(Path("acme/law"))
    for text in ("law", "hf://law", "hf://a/b/c.py", "hf://a/b/../c.st", "https://x/y", "hf://a/b@"):
        with pytest.raises(UsageError, match="is no repository on the Hub"):
            parse(text)


def test_a_plan_fetches_config_json(published: Hub, world: World, terminal: Terminal) -> None:
    where = ("--data", "nowhere", "--plan", "--plan-tflops", "1", "--anchor")
    there = terminal.json("train-expert", *where, "hf://acme/anchor")
    assert published.sent_bytes < 16_000
    assert there["plan"] == terminal.json("train-expert", *where, world.anchor.path)["plan"]
    assert "no such" in terminal.error("train-expert", *where, "hf://acme/nothing", code=2)


def test_inspect_fetches_a_few_kilobytes(published: Hub, world: World, terminal: Terminal) -> None:
    for name, local in (("law", world.experts["law"].path), ("anchor", world.anchor.path)):
        published.sent_bytes = 0
        there = terminal.json("inspect", f"hf://acme/{name}")
        assert there["path"] == f"hf://acme/{name}"
        here = terminal.json("inspect", local)
        assert {**there, "path": 0, "size_bytes": 0} == {**here, "path": 0, "size_bytes": 0}
        assert there["size_bytes"] > 100_000
        assert published.sent_bytes < 16_000
    assert terminal.json("inspect", "hf://acme/law@main/law.st")["digest"] == world.experts["law"].digest
    out, _ = terminal.text("inspect", "hf://acme/law")
    assert "hf://acme/law" in out
    assert "no such file" in terminal.error("inspect", "hf://acme/law/code.st", code=2)


def test_a_mirror_that_lists_no_sizes_is_asked_for_each(published: Hub, world: World, terminal: Terminal) -> None:
    published.tells_sizes = False
    for name, local in (("law", world.experts["law"].path), ("anchor", world.anchor.path)):
        there, here = terminal.json("inspect", f"hf://acme/{name}"), terminal.json("inspect", local)
        assert (there["digest"], there["kind"]) == (here["digest"], here["kind"])
    assert terminal.json("pull", "acme/law")["size_bytes"] == world.experts["law"].path.stat().st_size


def test_merge_of_experts_on_the_hub_is_the_merge_of_their_files(
    published: Hub, world: World, terminal: Terminal
) -> None:
    terminal.json("merge", "hf://acme/code", "hf://acme/law", "--anchor", "hf://acme/anchor")
    assert read_directory(Path("merged")) == read_directory(world.root / "merged")
    terminal.json("merge", "hf://acme/merged", world.experts["law"].path, "-o", "added")
    assert read_directory(Path("added")) == read_directory(world.root / "merged")
    assert "exists" in terminal.error("merge", "hf://acme/merged", "hf://acme/law", code=2)
    sent = published.sent_bytes
    terminal.json("merge", "hf://acme/merged", "hf://acme/law", "--overwrite")
    assert published.sent_bytes - sent < 60_000, "weights come from the cache"


def test_an_address_in_flexctl_toml(published: Hub, world: World, terminal: Terminal) -> None:
    assert published.repositories
    Path("flexctl.toml").write_text('[merge]\nanchor = "hf://acme/anchor"\n')
    terminal.json("merge", world.experts["code"].path)
    assert read_directory(Path("merged")) == read_directory(world.root / "without-law")


def test_a_repository_with_several_experts(published: Hub, world: World, terminal: Terminal) -> None:
    files = {path.name: path.read_bytes() for path in world.files()}
    published.make("acme/all", files)
    message = terminal.error("pull", "acme/all", code=3)
    assert "holds 3 experts" in message
    assert "hf://acme/all/NAME.st" in message
    got = terminal.json("pull", "hf://acme/all/math.st")
    assert got["digest"] == world.experts["math"].digest
    assert Path(got["path"]) == Path("experts/math.st").absolute()


def test_a_pulls_dry_run_fetches_the_manifest_alone(published: Hub, terminal: Terminal) -> None:
    out, _ = terminal.text("pull", "acme/anchor", "--dry-run")
    assert out.startswith("Dry run, nothing written. anchor of acme/anchor to anchor: ")
    assert "README.md" not in out
    assert published.sent_bytes < 16_000
    assert list(Path().iterdir()) == []


def test_without_the_network_the_cache_does(
    published: Hub, world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    terminal.json("pull", "acme/law")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    published.requests.clear()
    assert terminal.json("pull", "acme/law", "-o", "again.st")["digest"] == world.experts["law"].digest
    assert terminal.json("inspect", "hf://acme/law")["name"] == "law"
    terminal.json("merge", "hf://acme/law", "--anchor", world.anchor.path, "-o", "one")
    for arguments in (("pull", "acme/code"), ("push", world.experts["code"].path, "acme/code")):
        assert "HF_HUB_OFFLINE is set" in terminal.error(*arguments, code=1)
    assert published.requests == []


def test_a_hub_that_is_not_there(hub: Hub, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.endpoint
    assert "connection to the Hub failed" in terminal.error("pull", "acme/law", code=1)


def test_a_checkpoint_from_the_hub(hub: Hub, in_empty_folder: Path, checkpoint: Path) -> None:
    assert in_empty_folder
    files = read_directory(make_checkpoint(Path("base").absolute(), vocab=tiny.VOCAB_SIZE, tokenizer=checkpoint))
    hub.make("acme/base", {**files, "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"x"})
    assert read_directory(fetch_checkpoint("acme/base")) == files
    assert read_directory(fetch_checkpoint("hf://acme/base@main")) == files
    with pytest.raises(UsageError, match="neither a directory nor a repository"):
        fetch_checkpoint("hf://acme/base@other")
    with pytest.raises(UsageError, match="neither a directory nor a repository"):
        fetch_checkpoint("acme/nothing")
    with pytest.raises(UsageError, match="neither a directory nor a repository"):
        fetch_checkpoint("base-that-is-not-there")
    made = init_anchor(InitAnchorConfig(source="acme/base", data=(Path("base"),), dry_run=True))
    assert (made.name, made.hidden_size) == ("base", 8)


def test_an_expert_is_trained_against_an_anchor_on_the_hub(published: Hub, world: World, terminal: Terminal) -> None:
    assert published.repositories
    assert terminal
    Path("law.txt").write_text("The court held that it was so.")
    config = TrainExpertConfig(data=(Path("law.txt"),), anchor=Path("hf://acme/anchor"), dry_run=True)
    assert train_expert(config).anchor_digest == world.anchor.digest


def test_by_the_environment_as_users_have_it(hub: Hub, world: World, tmp_path: Path) -> None:
    """In a process of its own: HF_ENDPOINT and HF_TOKEN are all there is to set; nobody's bars but ours."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def run(*arguments: str | Path) -> str:
        call = [sys.executable, "-m", "flexctl", *map(str, arguments)]
        done = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("push", world.experts["law"].path, "acme/law").count("\n") == 1
    assert run("pull", "acme/law").startswith("Brought expert of acme/law to experts/law.st: 1 file, ")
    assert TOKEN not in "".join(path.read_text(errors="ignore") for path in tmp_path.rglob("*") if path.is_file())
