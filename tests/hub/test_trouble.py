"""When the Hub or the network fails, or somebody put something wrong there."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from builders import World, forge_expert, read_directory
from hub.server import READ_TOKEN, Hub
from hub.terminal import Terminal

from flexctl.engine.push import PushConfig, push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def published(hub: Hub, world: World) -> Hub:
    """The Hub with the merged model in acme/merged and the law expert in acme/law."""
    push(PushConfig(path=world.root / "merged", repository="acme/merged"))
    push(PushConfig(path=world.experts["law"].path, repository="acme/law"))
    hub.requests.clear()
    return hub


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, 1, "wants a valid token (401)"),
        (403, 1, "may not do this (403): told to fail"),
        (429, 1, "limits requests (429)"),
        (500, 1, "is in trouble (500)"),
        (503, 1, "is in trouble (503)"),
    ],
)
@pytest.mark.parametrize("pattern", ["GET /api/models", "PUT /lfs|GET /cdn"])
def test_every_answer_is_one_line(
    published: Hub, world: World, terminal: Terminal, pattern: str, status: int, code: int, said: str
) -> None:
    headers = {"Retry-After": "7"} if status == 429 else {}
    published.fail(pattern, status=status, headers=headers)
    for arguments in (("pull", "acme/law"), ("push", world.experts["code"].path, "acme/code")):
        message = terminal.error(*arguments, code=code)
        assert said in message
        if status == 429:
            assert "in 7 s" in message
    assert not Path("experts").exists()
    assert "code.st" not in getattr(published.repositories.get("acme/code"), "head", dict)()


def test_a_busy_hub_is_asked_again(published: Hub, terminal: Terminal) -> None:
    published.fail("GET /cdn", status=429, times=2, headers={"Retry-After": "1"})
    terminal.json("pull", "acme/law")


def test_repositories_that_are_not_for_everyone(
    published: Hub, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such repository" in terminal.error("pull", "acme/nothing", code=2)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    published.repositories["acme/law"].private = True
    assert "a private one that is not yours (404)" in terminal.error("pull", "acme/law", code=2)
    published.repositories["acme/merged"].gated = True
    message = terminal.error("pull", "acme/merged", code=1)
    assert "its owner grants access" in message
    assert "ask for access" in message


def test_an_upload_cut_midway_leaves_no_commit_and_is_gone_on_with(hub: Hub, world: World, terminal: Terminal) -> None:
    hub.fail("PUT /lfs", times=2)  # these two go well
    hub.fail("PUT /lfs", cut=1000)
    assert "connection to the Hub failed" in terminal.error("push", world.root / "merged", "acme/merged", code=1)
    repository = hub.repositories["acme/merged"]
    assert set(repository.head()) == {".gitattributes"}
    assert len(hub.objects) == 2
    hub.failures.clear()
    hub.requests.clear()
    sent = terminal.json("push", world.root / "merged", "acme/merged")
    assert len([request for request in hub.requests if request.startswith("PUT")]) == 3
    assert len(repository.commits) == 2
    assert terminal.json("pull", "acme/merged")["digest"] == sent["digest"]


def test_a_download_cut_midway_leaves_the_target_and_is_gone_on_with(published: Hub, terminal: Terminal) -> None:
    terminal.json("pull", "acme/merged", "-o", "model")
    before = read_directory(Path("model"))
    other = dict(published.repositories["acme/merged"].head())
    published.make("acme/again", {name: data for name, data in other.items() if name != ".gitattributes"})
    published.fail("GET /cdn", cut=1000)
    message = terminal.error("pull", "acme/again", "-o", "model", "--overwrite", code=1)
    assert "connection to the Hub failed" in message
    assert read_directory(Path("model")) == before
    assert [item.name for item in Path().iterdir() if "model" in item.name] == ["model"]
    published.failures.clear()
    already = published.sent_bytes
    terminal.json("pull", "acme/again", "-o", "model", "--overwrite")
    assert published.sent_bytes - already < sum(map(len, other.values()))
    assert read_directory(Path("model")) == before


def test_an_existing_target_is_refused_before_anything_is_fetched(published: Hub, terminal: Terminal) -> None:
    Path("experts").mkdir()
    Path("experts/law.st").write_bytes(b"mine")
    already = published.sent_bytes
    assert "exists already" in terminal.error("pull", "acme/law", code=2)
    assert published.sent_bytes - already < 16_000, "the manifest alone"
    assert Path("experts/law.st").read_bytes() == b"mine"
    terminal.json("pull", "acme/law", "--overwrite")


@pytest.mark.parametrize("file", ["model-expert-law.safetensors", "model-shared.safetensors", "tokenizer.json"])
def test_a_tampered_file_is_refused(published: Hub, terminal: Terminal, file: str) -> None:
    repository = published.repositories["acme/merged"]
    files = dict(repository.head())
    files[file] = files[file][:-2] + bytes([files[file][-2] ^ 1]) + files[file][-1:]
    repository.commit("main", "tampered", files)
    message = terminal.error("pull", "acme/merged", code=3)
    assert file.split(".")[0] in message or "tensor" in message
    assert "hf://acme/merged" in message
    assert not Path("merged").exists()


def test_a_forged_expert_is_refused_like_a_local_one(hub: Hub, world: World, terminal: Terminal) -> None:
    law = world.experts["law"]
    forged = forge_expert(Path("forged.st"), law, anchor__digest="sha256:" + "0" * 64)
    hub.make("acme/forged", {"law.st": forged.read_bytes()})
    terminal.json("pull", "acme/forged", "-o", "somewhere.st")
    Path("flexctl.toml").write_text(f"[workspace]\nanchor = '{world.anchor.path}'\n")
    assert "anchor.digest is sha256:000" in terminal.error("pull", "acme/forged", code=3)
    assert not Path("experts").exists()
    hub.make("acme/cut", {"law.st": law.path.read_bytes()[:-1]})
    message = terminal.error("pull", "acme/cut", code=3)
    assert message.startswith("error: hf://acme/cut")
    assert "truncated" in message
    hub.make("acme/huge", {"law.st": (2**62).to_bytes(8, "little") + b"{}" * 40_000})
    assert "header" in terminal.error("pull", "acme/huge", code=3)


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize(
    "name", ["model.pkl", "modeling_evil.py", "pytorch_model.bin", "sub/model.safetensors", "../up.json", ".hidden"]
)
@pytest.mark.parametrize("command", ["pull", "inspect", "merge"])
def test_code_and_pickles_are_refused_and_never_run(
    published: Hub, world: World, terminal: Terminal, name: str, command: str
) -> None:
    evil = b"open('executed', 'w')" if name.endswith(".py") else pickle.dumps(Boom())
    for repository in ("acme/merged", "acme/law"):
        files = published.repositories[repository].head()
        published.repositories[repository].commit("main", "evil", {**files, name: evil})
        address = repository if command == "pull" else f"hf://{repository}"
        extra = ("--anchor", world.anchor.path) if command == "merge" else ()
        message = terminal.error(command, address, *extra, code=3)
        assert name in message
    assert not [request for request in published.requests if name.split("/")[-1] in request]
    assert list(Path().iterdir()) == []


def test_a_repository_without_a_bundle(hub: Hub, terminal: Terminal) -> None:
    hub.make("acme/empty", {"README.md": b"nothing"})
    assert "holds no bundle" in terminal.error("pull", "acme/empty", code=3)
    hub.make("acme/broken", {"flexctl.json": json.dumps({"schema_version": 9}).encode()})
    assert "hf://acme/broken/flexctl.json: schema_version is 9" in terminal.error("pull", "acme/broken", code=3)
