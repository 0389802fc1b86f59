"""A bench to try every command that writes on, with its inputs, a key, an index and a Hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks.bench import Bench, running, state_of
from attacks.trials import may_be_a_stranger
from attacks.writers import STRANGER, make_inputs
from conftest import Texts
from hub import server
from signers import cheap_keys, make_key

from flexctl.engine.trace_index import TraceIndexConfig, trace_index


@pytest.fixture(scope="session")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    texts: Texts,
    checkpoint: Path,
    anchor: Path,
    experts: dict[str, Path],
) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("writers")
    inputs = root / "in"
    make_inputs(inputs, texts, checkpoint, anchor, experts)
    trace_index(TraceIndexConfig(data=(inputs / "code",), output=inputs / "law.index"))
    with pytest.MonkeyPatch.context() as patch:
        cheap_keys(patch)
        patch.chdir(inputs)
        make_key("k")
    if may_be_a_stranger():
        for path in inputs.rglob("*"):
            if path.stat().st_mode & 0o044:  # a key and an index are for the eyes of whoever runs the command
                shutil.chown(path, STRANGER, STRANGER)
    with server.running() as hub:
        hub.make("acme/code", {"code.st": (inputs / "code.st").read_bytes()})
        hub.make("acme/merged", {file.name: file.read_bytes() for file in sorted((inputs / "merged").iterdir())})
        settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        with running(root, HF_HUB_CACHE=str(root / "hub"), NO_PROXY="127.0.0.1", **settings) as made:
            before = state_of(inputs)
            yield made
            assert state_of(inputs) == before, "inputs are as they were"
