"""Each hostile file beside this is refused: in one line, with the right exit code, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from flexctl.cli.app import main
from flexctl.engine.merge import MergeConfig, merge

HERE = Path(__file__).parent
ATTACKS = json.loads((HERE / "attacks.json").read_text(encoding="utf-8"))
GOOD = {"law.st", "law.st.sig", "trust.toml"}


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack["file"])
def test_a_hostile_file_is_refused_in_one_line(
    attack: dict[str, Any], in_empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in HERE.iterdir():
        if path.is_file() and path.suffix != ".py":
            shutil.copy(path, in_empty_folder)
    anchor = HERE.parent / "vectors/anchor"
    merge(MergeConfig(experts=(HERE.parent / "vectors/code.st",), anchor=anchor, output=Path("merged")))
    capsys.readouterr()
    command = attack["command"].split()
    more = ["--anchor", str(anchor), "-o", "new"] if command[0] == "merge" else []
    assert main([*command, *more]) == attack["code"]
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if attack["says"] in line]
    assert len(lines) == 1, said
    assert "unexpected" not in said.err
    assert not Path("new").exists()


def test_every_file_is_one_claim_or_what_a_claim_needs() -> None:
    files = {path.name for path in HERE.iterdir() if path.suffix in (".st", ".sig", ".toml", ".json")} - {
        "attacks.json"
    }
    claimed = {attack["file"] for attack in ATTACKS}
    assert len(claimed) == len(ATTACKS)
    assert claimed <= files
    assert files - claimed - GOOD <= {name.removesuffix(".sig") for name in claimed}
    assert all(attack["tried"] for attack in ATTACKS)
