"""Text without a document, or in another field, is refused at once by every command that reads it, dry run or not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from conftest import write_folder

from flexctl.cli.app import main

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

BAD = {
    "blank.txt": (" \n\t\n", "no document with text in blank.txt"),
    "body.jsonl": ('{"body": "some words"}\n', "body.jsonl, line 1: no field 'text'; there are 'body'"),
    "cut.json": ('[{"text": "some', "cut.json: not JSON"),
}
COMMANDS = {
    "init-anchor": "init-anchor {checkpoint} -o made --data BAD",
    "init-anchor, from scratch": "init-anchor --preset nano -o made --data BAD",
    "init-anchor --calibrate": "init-anchor {checkpoint} -o made --data {own} --calibrate BAD",
    "init-anchor --decontaminate": "init-anchor {checkpoint} -o made --data {own} --decontaminate BAD",
    "train-expert": "train-expert -o made.st --anchor {anchor} --data BAD",
    "train-expert --public": "train-expert -o made.st --anchor {anchor} --data {own} --public BAD",
    "train-expert --decontaminate": "train-expert -o made.st --anchor {anchor} --data {own} --decontaminate BAD",
    "import-expert": "import-expert {checkpoint} -o made.st --anchor {anchor} --name x --data BAD",
    "compress": "compress {expert} -o made.st --anchor {anchor} --data BAD",
    "embed-router": "embed-router -o made.st --anchor {anchor} --data BAD",
    "select-proxy": "select-proxy -o made.json --anchor {anchor} --data BAD",
    "select-proxy --public": "select-proxy -o made.json --anchor {anchor} --data {own} --public BAD",
    "evaluate": "evaluate {merged} --data BAD",
    "merge --data": "merge {expert} -o made --anchor {anchor} --admit --data own={own} --data x=BAD",
    "replace --data": "replace code {expert} --from {merged} -o made --data own={own} --data x=BAD",
    "trace-index": "trace-index -o made.index --data BAD",
    "audit": "audit {merged} --name code --data BAD --report made.html",
    "audit --held-out": "audit {merged} --name code --data {own} --held-out BAD --report made.html",
}


def no_work(*_given: object) -> None:
    raise AssertionError("a model runs")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_before_any_work(
    command: str,
    bad: str,
    checkpoint: Path,
    anchor: Path,
    experts: dict[str, Path],
    merged: Path,
    in_empty_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, says = BAD[bad]
    Path(bad).write_text(content)
    write_folder(in_empty_folder / "own", tiny.make_texts("code", 8), "txt")
    places = {"checkpoint": checkpoint, "anchor": anchor, "expert": experts["code"], "merged": merged, "own": "own"}
    arguments = COMMANDS[command].replace("BAD", bad).format(**places).split()
    monkeypatch.setattr(torch.nn.functional, "linear", no_work)
    for dry_run in (["--dry-run"], []):
        assert main([*arguments, *dry_run]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert re.search(rf"error: (--\S+ )?{re.escape(says)}", said), said
        assert not any(work in said for work in ("hashing", "measuring", "training", "scoring", "comparing"))
    assert sorted(path.name for path in in_empty_folder.iterdir()) == sorted([bad, "own"])


def test_one_source_of_several_may_be_blank_and_none_in_another_field(anchor: Path, in_empty_folder: Path) -> None:
    for name, (content, _) in BAD.items():
        Path(name).write_text(content)
    write_folder(in_empty_folder / "own", tiny.make_texts("code", 8), "txt")
    command = ["train-expert", "--anchor", str(anchor), "--name", "x", "--data", "own", "--dry-run", "--data"]
    assert [main([*command, name]) for name in BAD] == [0, 2, 2]
