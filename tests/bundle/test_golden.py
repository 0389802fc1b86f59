"""The same inputs give the same bytes, today as when schema version 1 was released."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_world

from flexctl.engine.merge import MergeConfig, merge

GOLDEN = {
    "anchor": "sha256:f948d5de1d7aec468e7dbfcb8460d6eb9e40bf0f78881e7070503f210777b65b",
    "code": "sha256:0b5c9fb625bcbe675cd09da04cc53bdbebe929668eaf5719885e2f686fcb286a",
    "low": "sha256:3ec3a64ce8562e56ee1b519bf7c0e61f0bf1496eab6823b5f21943cca2bd7a19",
    "merged": "sha256:933613b84a844ea0cd8f763de49124c8475bd47529f99fda292cf95b0f47ef3e",
}


def test_digests_have_not_moved(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged model's digest covers every byte of its directory: headers, owners' manifests, index, config, card."""
    monkeypatch.setattr("flexctl.bundle.expert.software_versions", lambda: {"flexctl": "0.1.0"})
    world = make_world(in_empty_folder, ("code", "low"), dtype="BF16", layers=11)
    result = merge(MergeConfig(experts=world.files()))
    digests = {"anchor": world.anchor.digest, **{name: expert.digest for name, expert in world.experts.items()}}
    assert {**digests, "merged": result.digest} == GOLDEN
