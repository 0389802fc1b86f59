"""Rights: they travel, run out, rule experts out of a purpose, and conflict."""

from __future__ import annotations

import datetime
import shlex
from pathlib import Path

import pytest
from builders import World, make_expert, make_world

from flexctl.bundle import open_merged
from flexctl.cli.app import main
from flexctl.engine.check_rights import CheckRightsConfig, check_rights
from flexctl.engine.list import ListConfig
from flexctl.engine.list import list as list_
from flexctl.engine.merge import MergeConfig, merge
from flexctl.errors import UsageError
from flexctl.runtime import SilentReporter

TODAY = datetime.date(2126, 6, 15)


class Listener(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, /) -> None:
        self.warnings.append(text)


@pytest.fixture
def world(in_empty_folder: Path) -> World:
    world = make_world(in_empty_folder, ("code",))
    for name, license, purposes, expires, contact in (
        ("law", "CC-BY-4.0", ("research", "Commercial "), "2126-07-01", "law@example.org"),
        ("news", "CC-BY-NC-4.0", ("research",), None, "rights@news.example"),
        ("poems", "MIT", ("research",), "2126-06-20", None),
    ):
        path = Path(f"experts/{name}.st")
        made = make_expert(
            path, world.anchor, name, license=license, purposes=purposes, expires=expires, contact=contact
        )
        world.experts[name] = made
    return world


def merged(world: World, *names: str) -> Listener:
    listener = Listener()
    config = MergeConfig(experts=world.files(*names), output=Path("merged"), overwrite=True)
    merge(config, listener, today=TODAY)
    return listener


def test_rights_travel_into_the_manifest_and_the_card(world: World) -> None:
    merged(world)
    entries = {entry.name: entry for entry in open_merged(Path("merged")).manifest.experts}
    law = entries["law"]
    assert (law.license, law.purposes, law.expires) == ("CC-BY-4.0", ("research", "Commercial "), "2126-07-01")
    assert (law.contact, entries["code"].contact) == ("law@example.org", None)
    card = Path("merged/README.md").read_text()
    assert "| law | CC-BY-4.0 | research, Commercial | 2126-07-01 |" in card
    assert "## Whom to ask\n\n- law: law@example.org\n- news: rights@news.example\n\n## Use" in card


def test_a_model_whose_owners_named_nobody_is_the_same_bytes_as_before(world: World) -> None:
    merged(world, "code", "poems")
    assert '"contact":' not in Path("merged/flexctl.json").read_text()
    assert "Whom to ask" not in Path("merged/README.md").read_text()


def test_who_must_be_left_out_and_the_command_that_does_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    merged(world)
    result = check_rights(CheckRightsConfig(path=Path("merged"), purpose=("commercial",)), today=TODAY)
    assert result.allowed == ("code", "law")
    assert [(out.name, out.contact) for out in result.ruled_out] == [("news", "rights@news.example"), ("poems", None)]
    assert result.ruled_out[0].reason == "it is for research, not for 'commercial'"
    assert (result.exit_code, result.remedy) == (3, "flexctl remove news poems --from merged")
    assert main([*shlex.split(result.remedy)[1:], "-o", "rest", "-q"]) == 0
    assert open_merged(Path("rest")).names == result.allowed
    rest = check_rights(CheckRightsConfig(path=Path("rest"), purpose=("commercial",)), today=TODAY)
    assert (rest.ruled_out, rest.remedy, rest.exit_code) == ((), None, 0)
    assert main(["check-rights", "merged", "--purpose", "commercial"]) == 3
    out = capsys.readouterr().out
    assert "must be left out: news: it is for research, not for 'commercial'; ask rights@news.example\n" in out
    assert out.endswith("\nflexctl remove news poems --from merged\n")


def test_the_calendar_rules_out_and_several_purposes_must_all_be_allowed(world: World) -> None:
    merged(world)
    later = check_rights(CheckRightsConfig(path=Path("merged")), today=datetime.date(2126, 6, 21))
    assert [out.name for out in later.ruled_out] == ["poems"]
    assert later.ruled_out[0].reason == "its rights ended on 2126-06-20"
    both = check_rights(CheckRightsConfig(path=Path("merged"), purpose=("research", "commercial")), today=TODAY)
    assert both.allowed == ("code", "law")
    with pytest.raises(UsageError, match=r"code\.st is no merged model but an expert"):
        check_rights(CheckRightsConfig(path=world.experts["code"].path))


def test_merge_warns_once_of_licenses_that_conflict(world: World) -> None:
    warned = [text for text in merged(world).warnings if "may not go together" in text]
    assert warned == ["licenses that may not go together: news (CC-BY-NC-4.0) forbids commercial use, law is for it"]
    assert not [text for text in merged(world, "code", "law").warnings if "may not go together" in text]
    asked = check_rights(CheckRightsConfig(path=Path("merged")), today=TODAY)
    assert asked.conflicts == ()


def test_whose_rights_end_soon(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    def soon(days: str, today: datetime.date = TODAY) -> list[str]:
        return [expert.name for expert in list_(ListConfig(expiring=days), today=today).experts]

    assert (soon("4d"), soon("5d"), soon("30d")) == ([], ["poems"], ["law", "poems"])
    assert soon("0d", datetime.date(2127, 1, 1)) == ["law", "poems"]
    for wrong in ("30", "d", "-1d", "1e3d"):
        with pytest.raises(UsageError, match=rf"expiring: is '{wrong}'; expected days, as 30d"):
            ListConfig(expiring=wrong)
    assert main(["list", "--expiring", "99999d"]) == 0
    assert "law: ask law@example.org\n" in capsys.readouterr().out
    make_expert(Path("alone/experts/x.st"), world.anchor, "x")
    assert main(["list", "alone", "--expiring", "30d"]) == 0
    assert "no expert's rights end within 30d\n" in capsys.readouterr().out
