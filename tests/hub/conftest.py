"""A Hub on this machine for every test, an anchor with experts, and a terminal to run commands in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from builders import World, make_world
from hub import server
from hub.terminal import Terminal

from flexctl.engine.merge import MergeConfig, merge


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[server.Hub]:
    """A Hub that huggingface_hub talks to, with its token set, an empty cache, and no waiting between tries."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setenv("HF_TOKEN", server.TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    impatient = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
    huggingface_hub.close_session()
    with server.running() as running:
        for name, value in {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield running
        huggingface_hub.close_session()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An anchor, three experts, and merged models of some of them, in a folder of their own."""
    made = make_world(tmp_path_factory.mktemp("world"), hidden=64, inner=96)
    for name, experts in (("merged", ("code", "law")), ("without-law", ("code",))):
        files = made.files(*experts)
        merge(MergeConfig(experts=files, anchor=made.anchor.path, output=made.root / name))
    return made


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], in_empty_folder: Path) -> Terminal:
    assert in_empty_folder == Path.cwd()
    return Terminal(capsys)
