"""What serve refuses before it reads weights, and what it serves besides merged models."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from serving.running import a_server

from flexctl.cli.app import main
from flexctl.engine.serve import ServeConfig, serve
from flexctl.errors import FlexctlError, UsageError
from flexctl.model import building

ASK = {"prompt": "def value", "max_tokens": 4, "temperature": 0}


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(building, "build_model", fail)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "a+b"}, "name: 'a\\+b' must be 1 to 96 letters"),
        ({"name": "-x"}, "name: '-x' must be 1 to 96 letters"),
        ({"max_context": 129}, "max_context: 129 is more than the 128 that the model can hold"),
        ({"api_keys": Path("nobody.toml")}, "nobody.toml: cannot be read"),
        ({"host": "no such host"}, "host: 'no such host' is no address of this machine"),
        ({"port": 65536}, "port: 65536 is not below 65536"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"bundle": Path("nowhere")}, "nowhere"),
    ],
)
def test_what_is_wrong_is_refused_before_weights_are_read(merged: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        serve(ServeConfig(**({"bundle": merged, "port": 0} | settings)))


@pytest.mark.usefixtures("no_weights")
def test_an_address_that_somebody_has(merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FlexctlError, match=f"127.0.0.1:{port} cannot be taken: Address already in use"):
            serve(ServeConfig(bundle=merged, port=port))
        assert main(["serve", str(merged), "--port", str(port)]) == 1
    assert "take another with --port" in capsys.readouterr().err


def test_without_what_serves_it_says_what_to_install(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    monkeypatch.setattr("flexctl.serving.requirements.find_spec", importlib.util.find_spec)
    with pytest.raises(UsageError, match="serve needs uvicorn") as caught:
        serve(ServeConfig(bundle=merged))
    assert caught.value.hint == "pip install 'flexctl[serve]'"


def test_an_anchor_and_an_expert_are_served_too(anchor: Path, experts: dict[str, Path]) -> None:
    with a_server(anchor) as server, server.client() as client:
        (only,) = client.models.list()
        assert only.id == "anchor"
        alone = client.completions.create(model="anchor", **ASK)
        assert alone.flexctl["experts"] == ["public"]  # type: ignore[attr-defined]
    with a_server(experts["code"], anchor=anchor) as server, server.client() as client:
        assert [model.id for model in client.models.list()] == ["code", "code-without-code"]
        without = client.completions.create(model="code-without-code", **ASK)
        assert without.choices[0].text == alone.choices[0].text
        assert without.flexctl["experts"] == ["public"]  # type: ignore[attr-defined]


def test_what_a_bundle_without_a_chat_template_says(anchor: Path) -> None:
    body = json.dumps({"model": "anchor", "messages": [{"role": "user", "content": "a"}]}).encode()
    with a_server(anchor) as server:
        status, said = server.post("/v1/chat/completions", body)
        assert (status, said["error"]["code"]) == (400, "no_chat_template")
        assert server.result is None
    assert server.result is not None
    assert server.result.requests == 1
    assert len(server.result.experts) == 1
