"""What push sends, what it refuses to send, and what it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from builders import World, make_anchor, make_expert
from hub.server import READ_TOKEN, Hub
from hub.terminal import Terminal

from flexctl.cli.app import main

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def copy(world: World, name: str, target: str) -> Path:
    return Path(shutil.copytree(world.root / name, target))


def front_matter(card: bytes) -> str:
    found = re.match(r"---\n(.*?)\n---\n", card.decode(), re.DOTALL)
    assert found
    return found[1]


def test_a_dry_run_lists_files_and_sends_nothing(hub: Hub, world: World, terminal: Terminal) -> None:
    out, _ = terminal.text("push", world.root / "merged", "acme/merged", "--dry-run")
    assert out.startswith("Dry run, nothing sent. ")
    assert re.search(r"^model-expert-law\.safetensors +\d+\.\d kB$", out, re.MULTILINE)
    assert (hub.requests, hub.repositories) == ([], {})
    result = terminal.json("push", world.root / "merged", "acme/merged", "--dry-run")
    sizes = {file["name"]: file["size_bytes"] for file in result["files"]}
    assert sizes == {item.name: item.stat().st_size for item in (world.root / "merged").iterdir()}
    assert (result["commit"], result["size_bytes"]) == (None, sum(sizes.values()))


def test_results_go_along_and_runs_stay(hub: Hub, world: World, terminal: Terminal) -> None:
    folder = copy(world, "merged", "mine")
    (folder / "run.json").write_text("{}")
    (folder / "results.json").write_text('{"bits_per_byte": 1}')
    terminal.json("push", folder, "acme/merged")
    assert "run.json" not in hub.repositories["acme/merged"].head()
    terminal.json("pull", "acme/merged")
    assert Path("merged/results.json").read_text() == '{"bits_per_byte": 1}'
    expert = Path(shutil.copy(world.experts["law"].path, "law.st"))
    Path("law.run.json").write_text("{}")
    Path("law.results.json").write_text("[]")
    terminal.json("push", expert, "acme/law")
    assert set(hub.repositories["acme/law"].head()) == {".gitattributes", "README.md", "law.st", "results.json"}


def test_results_of_an_earlier_expert_stay(hub: Hub, world: World, terminal: Terminal) -> None:
    expert = Path(shutil.copy(world.experts["law"].path, "law.st"))
    Path("law.results.json").write_text('{"digest": "sha256:00"}')
    _, warned = terminal.text("push", expert, "acme/law")
    assert "law.results.json: is of sha256:00; it is not sent" in warned
    assert "results.json" not in hub.repositories["acme/law"].head()
    Path("law.results.json").write_text(f'{{"digest": "{world.experts["law"].digest}"}}')
    terminal.text("push", expert, "acme/law")
    assert "results.json" in hub.repositories["acme/law"].head()


def test_the_cards(hub: Hub, world: World, terminal: Terminal) -> None:
    for path in (world.anchor.path, world.experts["law"].path, world.root / "merged"):
        terminal.json("push", path, f"acme/{path.name.replace('.', '-')}")
    cards = {name: repository.head()["README.md"] for name, repository in hub.repositories.items()}
    assert front_matter(cards["acme/law-st"]).splitlines() == [
        "library_name: flexctl",
        "license: apache-2.0",
        'base_model: "tiny-anchor"',
        "base_model_relation: adapter",
        "tags:",
        "- moe",
        "- flexctl",
        "- flexctl-expert",
    ]
    assert "base_model" not in front_matter(cards["acme/anchor"])
    assert "flexctl merge hf://acme/law-st" in cards["acme/law-st"].decode()
    assert "base_model_relation: merge" in front_matter(cards["acme/merged"])
    for card in cards.values():
        assert str(world.root) not in card.decode()
        assert not re.search(r"[( `\"]/(?!/)\w+/", card.decode()), "a local path"
    terminal.json("push", world.experts["law"].path, "acme/law-st", "--base-model", "acme/anchor")
    assert 'base_model: "acme/anchor"' in front_matter(hub.repositories["acme/law-st"].head()["README.md"])
    message = terminal.error("push", world.root / "merged", "acme/merged", "--base-model", "acme/anchor", code=2)
    assert "--base-model" in message


def test_an_anchors_own_card_is_kept(hub: Hub, world: World, terminal: Terminal) -> None:
    folder = copy(world, "anchor", "mine")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    terminal.json("push", folder, "acme/anchor")
    assert hub.repositories["acme/anchor"].head()["README.md"].endswith(b"# Mine\n")


@pytest.mark.parametrize(
    ("license", "said", "lines"),
    [
        (None, "its license is unknown", "license: other\nlicense_name: unknown\nlicense_link: README.md"),
        ("ask\n---\nus: x", "has no id", 'license: other\nlicense_name: "ask\\n---\\nus: x"\nlicense_link: README.md'),
    ],
)
def test_a_license_that_the_hub_does_not_know(
    hub: Hub, world: World, terminal: Terminal, license: str | None, said: str, lines: str
) -> None:
    make_expert(Path("own.st"), world.anchor, "own", license=license)
    _, err = terminal.text("push", "own.st", "acme/own")
    assert said in err
    assert lines in front_matter(hub.repositories["acme/own"].head()["README.md"])
    anchor = make_anchor(Path("a"), license=license, hidden=64, inner=96)
    _, err = terminal.text("push", anchor.path, "acme/a")
    assert said in err
    assert lines in front_matter(hub.repositories["acme/a"].head()["README.md"])


def test_what_does_not_verify_is_not_sent(hub: Hub, world: World, terminal: Terminal) -> None:
    folder = copy(world, "merged", "mine")
    file = folder / "model-expert-law.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "model-expert-law.safetensors" in terminal.error("push", folder, "acme/merged", code=3)
    make_expert(Path("old.st"), world.anchor, "old", expires="2020-01-01")
    message = terminal.error("push", "old.st", "acme/old", code=3)
    assert "which is past" in message
    assert "--allow-expired" in message
    assert hub.requests == []
    terminal.json("push", "old.st", "acme/old", "--allow-expired")
    assert "--allow-expired" in terminal.error("pull", "acme/old", code=3)
    terminal.json("pull", "acme/old", "--allow-expired")
    assert terminal.error("push", "nothing", "acme/old", code=2)


def test_a_private_repository(hub: Hub, world: World, terminal: Terminal) -> None:
    law = world.experts["law"].path
    terminal.json("push", law, "acme/law", "--private")
    assert hub.repositories["acme/law"].private
    terminal.json("push", law, "acme/law", "--private")
    hub.make("acme/open", {})
    assert "is public" in terminal.error("push", law, "acme/open", "--private", code=2)
    assert "law.st" not in hub.repositories["acme/open"].head()


def test_a_branch_and_a_message(hub: Hub, world: World, terminal: Terminal) -> None:
    law = world.experts["law"].path
    sent = terminal.json("push", law, "acme/law", "--revision", "v2", "--message", "the second")
    repository = hub.repositories["acme/law"]
    assert repository.commits[sent["commit"]].message == "the second"
    assert "law.st" not in repository.head("main")
    assert "no bundle" in terminal.error("pull", "acme/law", code=3)
    assert terminal.json("pull", "acme/law", "--revision", "v2")["digest"] == sent["digest"]
    assert terminal.json("pull", "hf://acme/law@v2/law.st", "-o", "again.st")["digest"] == sent["digest"]
    assert "no such revision" in terminal.error("pull", "acme/law", "--revision", "v3", code=2)
    assert "names another" in terminal.error("pull", "hf://acme/law@v2", "--revision", "v3", code=2)
    assert "a branch is --revision" in terminal.error("push", law, "hf://acme/law@v2", code=2)


def test_a_new_branch_holds_nothing_of_the_one_it_starts_from(hub: Hub, world: World, terminal: Terminal) -> None:
    terminal.json("push", world.root / "merged", "acme/merged")
    _, err = terminal.text("push", world.root / "without-law", "acme/merged", "--revision", "v2")
    assert "history still holds law" in err
    repository = hub.repositories["acme/merged"]
    assert "model-expert-law.safetensors" in repository.head("main")
    assert "model-expert-law.safetensors" not in repository.head("v2")


def test_a_second_push_replaces_the_first(hub: Hub, world: World, terminal: Terminal) -> None:
    terminal.json("push", world.root / "without-law", "acme/merged")
    sent = terminal.json("push", world.root / "merged", "acme/merged")
    assert terminal.json("push", world.root / "merged", "acme/merged")["commit"] == sent["commit"], "no empty commit"
    assert len(hub.repositories["acme/merged"].commits) == 3
    assert len([request for request in hub.requests if "PUT" in request and "lfs" in request]) == 6


def test_a_removed_expert_goes_and_its_owner_is_told_of_the_history(hub: Hub, world: World, terminal: Terminal) -> None:
    terminal.json("push", world.root / "merged", "acme/merged")
    _, err = terminal.text("push", world.root / "without-law", "acme/merged")
    assert "warning: acme/merged: its history still holds law" in err
    assert "super_squash_history('acme/merged')" in err
    assert "model-expert-law.safetensors" not in hub.repositories["acme/merged"].head()
    terminal.json("pull", "acme/merged")
    assert terminal.json("verify", "merged", "--absent", "law")["ok"]
    _, err = terminal.text("push", world.root / "without-law", "acme/merged")
    assert "its history still holds law" in err, "until it does not"


def test_any_earlier_commit_counts_until_the_history_is_purged(hub: Hub, world: World, terminal: Terminal) -> None:
    anchor_only = Path(terminal.json("merge", "--anchor", world.anchor.path, "-o", "alone")["path"])
    first = terminal.json("push", world.root / "merged", "acme/merged")["commit"]
    terminal.text("push", world.root / "without-law", "acme/merged")
    _, err = terminal.text("push", anchor_only, "acme/merged")
    assert "its history still holds code, law, and" in err
    _, err = terminal.text("push", anchor_only, "acme/merged")
    assert "No files have been modified" not in err, "huggingface_hub says nothing of its own"
    assert "its history still holds code, law, and" in err
    repository = hub.repositories["acme/merged"]
    repository.commit("main", "notes", {**repository.head(), "flexctl.json": b"{}"})
    repository.commit("main", "back", repository.commits[repository.commits[repository.branches["main"]].parent].files)
    hub.requests.clear()
    _, err = terminal.text("push", anchor_only, "acme/merged")
    assert "its history still holds code, law, and" in err
    assert not [request for request in hub.requests if first in request], "what was looked at once is cached"
    head = repository.head()
    repository.commits.clear()
    repository.branches.clear()
    repository.commit("main", "squashed", head)
    _, err = terminal.text("push", anchor_only, "acme/merged")
    assert "history" not in err


def test_a_repository_that_holds_something_else_is_left_alone(hub: Hub, world: World, terminal: Terminal) -> None:
    law, code = world.experts["law"].path, world.experts["code"].path
    hub.make("acme/other", {"pytorch_model.bin": b"x"})
    assert "holds pytorch_model.bin and no bundle" in terminal.error("push", law, "acme/other", code=2)
    terminal.json("push", code, "acme/code")
    assert "holds expert code; this is expert law" in terminal.error("push", law, "acme/code", code=2)
    assert "holds expert code; this is" in terminal.error("push", world.root / "merged", "acme/code", code=2)
    hub.repositories["acme/code"].commit("main", "notes", {**hub.repositories["acme/code"].head(), "notes.txt": b"x"})
    assert "notes.txt is no part" in terminal.error("push", code, "acme/code", code=3)
    hub.make("acme/new", {"README.md": b"---\nlicense: mit\n---\n"})
    terminal.json("push", law, "acme/new")


def test_a_branch_that_moves_meanwhile_is_not_written_over(hub: Hub, world: World, terminal: Terminal) -> None:
    terminal.json("push", world.root / "without-law", "acme/merged")
    hub.fail("POST .*/commit/", status=412, times=1, message="A commit has happened since")
    assert "was changed meanwhile (412)" in terminal.error("push", world.root / "merged", "acme/merged", code=1)
    hub.failures.clear()
    terminal.json("push", world.root / "merged", "acme/merged")


def test_tokens_that_may_not_write(hub: Hub, world: World, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    law = world.experts["law"].path
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    message = terminal.error("push", law, "acme/law", code=1)
    assert "(403)" in message
    assert "your token (token) can only read" in message
    monkeypatch.delenv("HF_TOKEN")
    assert "wants a valid token (401)" in terminal.error("push", law, "acme/law", code=1)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "wants a valid token (401)" in terminal.error("push", law, "acme/law", code=1)
    assert hub.repositories == {}


def test_a_repository_needs_an_owner(hub: Hub, world: World, terminal: Terminal) -> None:
    law = world.experts["law"].path
    assert "OWNER/NAME" in terminal.error("push", law, "law", code=2)
    assert "no name of a repository" in terminal.error("push", law, "acme/a--b", code=2)
    assert hub.requests == []


def test_the_json_of_an_error(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.repositories == {}
    assert main(["pull", "acme/nothing", "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["type"], error["exit_code"]) == ("UsageError", 2)
    assert error["hint"] == "hf auth login, or set HF_TOKEN"
