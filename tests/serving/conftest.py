"""One server for the tests that only ask it things."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from builders import anchor_with_chat_template, make_expert
from serving.running import Server, a_server

from flexctl.bundle import open_anchor
from flexctl.engine.merge import MergeConfig, merge


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A merged model with a chat template: "code" is for research, the rights in "old" are over, "sums" is free."""
    root = tmp_path_factory.mktemp("chatty")
    base = open_anchor(anchor_with_chat_template(checkpoint, root))
    terms = {"code": {"purposes": ("research",)}, "old": {"expires": "2020-01-31"}, "sums": {}}
    made = tuple(make_expert(root / f"{name}.st", base, name, **given).path for name, given in terms.items())
    merge(MergeConfig(experts=made, anchor=base.path, output=root / "merged", allow_expired=True))
    return root / "merged"


@pytest.fixture(scope="session")
def server(chatty: Path) -> Iterator[Server]:
    with a_server(chatty, explain=True, max_new_tokens=64) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as found:
        yield found
