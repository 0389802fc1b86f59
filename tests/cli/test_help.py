"""Help pages and docs/cli.md: true, complete, and light."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

import flexctl
from flexctl.cli.app import main
from flexctl.cli.help import examples, page, sections
from flexctl.cli.parsing import Call, make_app
from flexctl.cli.reference import reference, stubs
from flexctl.commands import COMMANDS as ROWS
from flexctl.commands import Command
from flexctl.options import options
from flexctl.workspace import COMMANDS

GROUP = cast(TyperGroup, get_command(make_app(ROWS, [row.shown for row in ROWS])))
MANNERS = {"json", "quiet", "verbose", "help"}
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "cli.md"

SCRIPT = """
import contextlib, io, json, sys
from flexctl.cli.app import main
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), sorted(sys.modules)]))
"""


def shown(command: str) -> str:
    return command.replace("_", "-")


def run_apart(calls: list[list[str]]) -> list[tuple[str, set[str]]]:
    """Run main in a process of its own, once for each call; return what it printed and all modules loaded by then."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(calls)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [code for code, _, _ in answers] == [0] * len(calls)
    return [(page, set(modules)) for _, page, modules in answers]


@pytest.fixture(scope="module")
def pages() -> dict[str, tuple[str, set[str]]]:
    """Command -> its help page, and the modules that a process has loaded after it and those before it."""
    return dict(zip(COMMANDS, run_apart([[shown(command), "--help"] for command in COMMANDS]), strict=True))


def test_every_command_is_there_in_the_order_of_an_experts_life() -> None:
    assert list(GROUP.commands) == [shown(command) for command in COMMANDS]


def test_the_first_help_page_names_every_command_and_loads_next_to_nothing() -> None:
    ((page, modules),) = run_apart([["--help"]])
    for command in COMMANDS:
        assert f"  {shown(command)} " in page
    assert "..." not in page.split("Commands:")[1], "a description is too long for its line"
    assert not modules & {"torch", "transformers", "numpy", "rich", "flexctl.bundle", "flexctl.engine"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_help_page_has_an_example_and_loads_no_torch(pages: dict[str, tuple[str, set[str]]], command: str) -> None:
    page, modules = pages[command]
    assert f"\nExamples:\n  flexctl {shown(command)}" in page
    assert not modules & {"torch", "transformers", "sentence_transformers", "huggingface_hub", "rich"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_flags_and_the_fields_of_the_config_are_the_same(row: Command) -> None:
    parameters = {parameter.name: parameter for parameter in GROUP.commands[row.shown].params}
    config_class = getattr(flexctl, row.config)
    assert set(parameters) - MANNERS == {field.name for field in dataclasses.fields(config_class)}
    for option in options(config_class):
        parameter = parameters[option.field]
        assert isinstance(parameter, TyperOption) == (not option.is_argument)
        if not option.is_argument:
            assert f"--{shown(option.key)}" in parameter.opts
        assert parameter.default is None or option.is_argument, "given must be known"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_examples_can_be_read(row: Command) -> None:
    lines = examples(getattr(flexctl, row.config))
    assert lines
    for example in lines:
        program, *arguments = shlex.split(example)
        call = GROUP.main(args=arguments, prog_name=program, standalone_mode=False)
        assert isinstance(call, Call)
        assert call.command == row.name


def test_a_page_has_the_flags_of_most_people_first_and_the_others_in_sections(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train-expert", "--help"]) == 0
    page = capsys.readouterr().out
    titles = re.findall(r"^([A-Z][a-z ]+):$", page, re.MULTILINE)
    assert titles == ["Most used", "Data", "Training", "Privacy", "Router", "Rights", "Hardware", "Output", "Examples"]
    first = page.split("Most used:\n")[1].split("\n\n")[0]
    assert re.findall(r"--[a-z-]+(?= [A-Z])", first) == ["--data", "--name", "--anchor", "--max-tokens", "--output"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_page_names_flags_and_every_option_once(row: Command) -> None:
    config_class = getattr(flexctl, row.config)
    entries = [flag for rows in sections(config_class).values() for flag, _ in rows]
    assert len(entries) == len(set(entries)) == len(options(config_class)) + len(MANNERS)
    assert "`" not in page(row, config_class)


def test_defaults_are_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help"]) == 0
    page = " ".join(capsys.readouterr().out.split())
    assert f"Length of the answer (default: {flexctl.GenerateConfig(prompt='x').max_new_tokens})." in page


def test_the_reference_is_current() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), "run: make docs"
    for file, content in stubs().items():
        assert (ROOT / file).read_text(encoding="utf-8") == content, "run: make docs"


def test_no_text_breaks_a_table_of_the_reference() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert any("\\|" in row for row in rows)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4}


def test_every_command_is_in_the_reference() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f"\n## {shown(command)}\n" in text
