"""Signatures travel through push, pull and hf://; what is signed wrongly does not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from builders import World
from hub.server import Hub
from hub.terminal import Terminal
from signers import cheap_keys, make_key, make_trust

from flexctl.engine.sign import SignConfig, sign

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def trust(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert terminal is not None
    cheap_keys(monkeypatch)
    return make_trust(make_key("hub")[1])


def copy(world: World, kind: str) -> Path:
    if kind == "expert":
        return Path(shutil.copy(world.experts["law"].path, "law.st"))
    return Path(shutil.copytree(world.anchor.path if kind == "anchor" else world.root / "merged", f"my-{kind}"))


@pytest.mark.parametrize("kind", ["anchor", "expert", "merged"])
def test_signatures_travel(hub: Hub, world: World, terminal: Terminal, trust: Path, kind: str) -> None:
    path = copy(world, kind)
    sign(SignConfig(path=path, key=Path("hub.key")))
    terminal.json("push", path, "acme/thing")
    assert {"flexctl.sig", "law.st.sig"} & set(hub.repositories["acme/thing"].head())
    got = terminal.json("pull", "acme/thing", "-o", "back.st" if kind == "expert" else "back")
    assert {"flexctl.sig", "law.st.sig"} & {file["name"] for file in got["files"]}
    assert terminal.json("verify", got["path"], "--trust", trust)["ok"]
    assert terminal.json("verify", "hf://acme/thing", "--trust", trust)["ok"]


def test_an_expert_on_the_hub_is_merged_with_its_signature(
    hub: Hub, world: World, terminal: Terminal, trust: Path
) -> None:
    path = copy(world, "expert")
    terminal.json("push", path, "acme/law")
    strict = ("--anchor", world.anchor.path, "--require-signed", "--trust", trust, "-o", "merged")
    assert "expert law is not signed" in terminal.error("merge", "hf://acme/law", *strict, code=3)
    sign(SignConfig(path=path, key=Path("hub.key")))
    terminal.json("push", path, "acme/law")
    assert "law.st.sig" in hub.repositories["acme/law"].head()
    for address in ("hf://acme/law", "hf://acme/law/law.st"):
        terminal.json("merge", address, *strict)
        assert Path("merged/model-expert-law.sig").read_bytes() == Path("law.st.sig").read_bytes()
        shutil.rmtree("merged")


def test_a_signature_of_something_else_is_neither_sent_nor_brought(
    hub: Hub, world: World, terminal: Terminal, trust: Path
) -> None:
    assert trust.is_file()
    path, other = copy(world, "expert"), Path(shutil.copy(world.experts["code"].path, "code.st"))
    sign(SignConfig(path=other, key=Path("hub.key")))
    shutil.copy("code.st.sig", "law.st.sig")
    assert "law.st.sig: signs another bundle than law's" in terminal.error("push", path, "acme/law", code=3)
    assert hub.repositories == {}
    Path("law.st.sig").unlink()
    terminal.json("push", path, "acme/law")
    Path("back.st.sig").write_text("of one before")
    terminal.json("pull", "acme/law", "-o", "back.st")
    assert not Path("back.st.sig").exists()
