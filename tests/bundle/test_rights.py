"""What the owners allow: purposes and last days."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from builders import World, make_world

from flexctl.bundle import Rights, forbidden, open_bundle, rights_of

TODAY = datetime.date(2026, 6, 1)
ENTRIES = (
    Rights("code", "MIT", (), None),
    Rights("law", None, ("Research", "teaching"), None),
    Rights("old", None, (), "2026-05-31"),
    Rights("today", None, ("commercial",), "2026-06-01"),
)


@pytest.mark.parametrize(
    ("purpose", "reasons"),
    [
        (None, {"old": "its rights ended on 2026-05-31"}),
        (" research", {"old": "its rights ended on 2026-05-31", "today": "it is for commercial, not for ' research'"}),
        (
            "commercial",
            {
                "law": "it is for Research, teaching, not for 'commercial'",
                "old": "its rights ended on 2026-05-31",
            },
        ),
        (
            "war",
            {
                "law": "it is for Research, teaching, not for 'war'",
                "old": "its rights ended on 2026-05-31",
                "today": "it is for commercial, not for 'war'",
            },
        ),
    ],
)
def test_purposes_and_days(purpose: str | None, reasons: dict[str, str]) -> None:
    assert forbidden(ENTRIES, purpose, TODAY) == reasons


def test_rights_are_read_from_every_bundle(tmp_path: Path) -> None:
    world: World = make_world(tmp_path, ("code", "law"))
    assert rights_of(open_bundle(world.anchor.path)) == ()
    (alone,) = rights_of(open_bundle(world.experts["law"].path))
    data = world.experts["law"].manifest.data
    assert alone == ("law", data.license, data.purposes, data.expires)
