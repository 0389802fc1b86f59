"""Bundles on the Hub are run, verified and compared with as those on disk are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Texts
from hub.server import Hub
from hub.terminal import Terminal
from serving.running import a_server

from flexctl.engine.push import PushConfig, push

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture
def published(hub: Hub, anchor: Path, experts: dict[str, Path], merged: Path) -> Hub:
    """The Hub with an anchor, two trained experts and their merged model."""
    for name, path in {"anchor": anchor, "merged": merged, **experts}.items():
        push(PushConfig(path=path, repository=f"acme/{name}"))
    hub.requests.clear()
    return hub


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("path", "results", "peak_rss_bytes")}


def test_evaluate(published: Hub, anchor: Path, experts: dict[str, Path], texts: Texts, terminal: Terminal) -> None:
    asked = ("--data", f"code={texts.code_test}", "--seq-len", "32")
    there = terminal.json("evaluate", "hf://acme/code", "--anchor", "hf://acme/anchor", *asked)
    assert there["path"] == "hf://acme/code"
    assert there["results"] is None
    assert figures(there) == figures(terminal.json("evaluate", experts["code"], "--anchor", anchor, *asked))
    published.requests.clear()
    assert (
        terminal.json("evaluate", "hf://acme/merged", "--anchor", "hf://acme/anchor", *asked)["experts"][0] == "public"
    )
    assert not [request for request in published.requests if "anchor" in request], "a merged model needs none"


def test_generate(published: Hub, merged: Path, terminal: Terminal) -> None:
    assert published.repositories
    asked = ("--prompt", "def value", "--max-new-tokens", "4")
    there = terminal.json("generate", "hf://acme/merged", *asked)
    assert (there["path"], there["tokens"]) == ("hf://acme/merged", 4)
    assert figures(there) == figures(terminal.json("generate", merged, *asked))


def test_serve(published: Hub, anchor: Path) -> None:
    assert published.repositories
    with a_server(Path("hf://acme/merged@main")) as server, server.client() as client:
        assert [model.id for model in client.models.list()][:2] == ["merged", "merged-without-code"]
        assert client.completions.create(model="merged", prompt="def", max_tokens=2).usage
    assert server.result is not None
    assert server.result.path == "hf://acme/merged@main"
    with a_server(Path("hf://acme/code"), anchor=anchor) as server:
        assert server.said[0].startswith("code answers at")


def test_verify(published: Hub, merged: Path, terminal: Terminal) -> None:
    for name in ("anchor", "code", "merged"):
        found = terminal.json("verify", f"hf://acme/{name}", "--anchor", "hf://acme/anchor")
        assert (found["ok"], found["path"]) == (True, f"hf://acme/{name}")
    here = terminal.json("verify", merged, "--absent", "hf://acme/code", code=3)
    there = terminal.json("verify", "hf://acme/merged", "--absent", "hf://acme/code", code=3)
    assert [check["name"] for check in there["checks"] if not check["ok"]] == ["absent code"]
    assert [check["ok"] for check in there["checks"]] == [check["ok"] for check in here["checks"]]
    published.requests.clear()
    Path("flexctl.toml").write_text('[verify]\nanchor = "hf://acme/anchor"\n')
    assert terminal.json("verify", merged)["checks"][-1]["name"] == "anchor"
    assert [request for request in published.requests if "acme/anchor" in request]


def test_what_verify_finds_names_the_address(published: Hub, terminal: Terminal) -> None:
    repository = published.repositories["acme/merged"]
    files = dict(repository.head())
    files["tokenizer.json"] += b" "
    repository.commit("main", "tampered", files)
    found = terminal.json("verify", "hf://acme/merged", code=3)
    wrong = [check["detail"] for check in found["checks"] if not check["ok"]]
    assert wrong == ["hf://acme/merged/tokenizer.json: its bytes are not those of the manifest"]


@pytest.mark.parametrize("command", ["evaluate", "generate", "verify", "embed-router"])
def test_code_is_refused_and_never_fetched(
    published: Hub, texts: Texts, anchor: Path, terminal: Terminal, command: str
) -> None:
    repository = published.repositories["acme/merged"]
    repository.commit("main", "evil", {**repository.head(), "modeling_evil.py": b"open('executed', 'w')"})
    extra = {
        "evaluate": ("hf://acme/merged", "--data", f"code={texts.code_test}"),
        "generate": ("hf://acme/merged", "--prompt", "def"),
        "verify": ("hf://acme/merged",),
        "embed-router": ("--data", texts.code, "--anchor", anchor, "--against", "hf://acme/merged"),
    }
    assert "modeling_evil.py is no part" in terminal.error(command, *extra[command], code=3)
    assert not [request for request in published.requests if "modeling_evil" in request]
    assert list(Path().iterdir()) == []


def test_embed_router(published: Hub, anchor: Path, experts: dict[str, Path], texts: Texts, terminal: Terminal) -> None:
    assert published.repositories
    here = ("--anchor", anchor, "--expert", experts["code"], "--against", experts["sums"])
    there = ("--anchor", "hf://acme/anchor", "--expert", "hf://acme/code", "--against", "hf://acme/sums")
    one = terminal.json("embed-router", "--data", texts.code, *here, "-o", "one.st")
    two = terminal.json("embed-router", "--data", texts.code, *there, "-o", "two.st")
    assert one["digest"] == two["digest"]
    assert one["layers"] == two["layers"]
    assert Path("one.st").read_bytes() == Path("two.st").read_bytes()


def test_replace(published: Hub, merged: Path, terminal: Terminal) -> None:
    assert published.repositories
    asked = ("--from", merged, "-o", "new")
    assert "code is the expert in" in terminal.error("replace", "code", "hf://acme/code", *asked, code=2)
    assert "expected 'sums'" in terminal.error("replace", "sums", "hf://acme/code", *asked, code=3)
    assert not Path("new").exists()
