"""Options: a field says all of it once; ranges hold for Python users; one name is one thing."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import types
import typing
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

import flexctl
from flexctl import commands, flags, workspace
from flexctl.cli import app
from flexctl.commands import COMMANDS, Command
from flexctl.errors import UsageError
from flexctl.options import DATA, OUTPUT, SECTIONS, TRAINING, Config, Option, argument, flag, options, switch
from flexctl.runtime import Reporter

ROOT = Path(flexctl.__file__).parent
CONFIGS = {row.name: getattr(flexctl, row.config) for row in COMMANDS}
OPTIONS = [(name, option) for name, config in CONFIGS.items() for option in options(config)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GreetConfig(Config):
    """Whom to greet.

    Says `times` words.

    Examples:
        flexctl greet world --times 2
    """

    name: Annotated[str, argument("NAME", "Whom.")]
    times: Annotated[int, flag("N", "How often.", TRAINING, above=0)] = 1
    loud: Annotated[bool, switch("In capitals; see `times`.", OUTPUT)] = False
    share: Annotated[float, flag("X", "How much of it.", DATA, at_least=0, below=1)] = 0.5
    threads: flags.Threads = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GreetResult:
    """What was said."""

    text: str


def greet(config: GreetConfig, reporter: Reporter) -> GreetResult:
    """Greet."""
    if config.times > 3:
        reporter.warn("`times` is high")
        raise UsageError(f"{config.times} is too often", hint="give less, or a higher `share`", field="times")
    return GreetResult(text=" ".join([config.name.upper() if config.loud else config.name] * config.times))


@pytest.fixture
def greeting(monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path) -> Path:
    """A new command: its module's three names, and one row of the table."""
    row = Command("greet", "Greet somebody.")
    for thing in (GreetConfig, GreetResult, greet):
        monkeypatch.setitem(vars(flexctl), thing.__name__, thing)
    monkeypatch.setattr(app, "COMMANDS", (*COMMANDS, row))
    monkeypatch.setattr(workspace, "COMMANDS", (*workspace.COMMANDS, row.name))
    return in_empty_folder


def test_a_row_and_a_module_are_a_command(
    greeting: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str, code: int = 0) -> str:
        assert app.main(["greet", *arguments]) == code
        out, err = capsys.readouterr()
        return err if code else out

    assert json.loads(said("world", "--times", "2", "--loud", "--json"))["text"] == "WORLD WORLD"
    (greeting / "flexctl.toml").write_text("[greet]\ntimes = 2\n")
    assert said("you") == "text  you you\n"
    monkeypatch.setenv("FLEXCTL_TIMES", "3")
    assert said("you") == "text  you you you\n"
    assert "error: --times: 0 is not above 0\n" in said("you", "--times", "0", code=2)
    assert "error: --share: 1.0 is not below 1\n" in said("you", "--share", "1", code=2)
    assert said("you", "--times", "4", code=2).splitlines() == [
        "warning: --times is high",
        "error: --times: 4 is too often",
        "hint: give less, or a higher --share",
    ]
    assert "error: Missing argument 'NAME'.\n" in said(code=2)
    page = said("--help")
    assert page.startswith("Usage: flexctl greet NAME [OPTIONS]\n\n  Greet somebody.\n\n  Says --times words.\n")
    assert re.search(r"\n  --times N +How often \(default: 1\)\.\n", page)
    assert re.search(r"\n  --loud +In capitals; see --times\.\n", page)
    assert "  greet  " in (app.main(["--help"]), capsys.readouterr().out)[1]


def test_an_option_is_one_field_for_python_too() -> None:
    with pytest.raises(UsageError) as caught:
        GreetConfig(name="you", times=0)
    assert (str(caught.value), caught.value.field) == ("times: 0 is not above 0", "times")
    assert GreetConfig(name="you").threads is None


def test_a_choice_is_checked_for_python_users() -> None:
    with pytest.raises(UsageError, match=r"^preset: 'big' is not one of nano, micro, small$"):
        flexctl.InitAnchorConfig(data=(Path("x"),), preset="big")


def test_a_mistyped_path_is_named_by_its_own_field() -> None:
    from flexctl.text.documents import text_files

    with pytest.raises(UsageError, match=r"^public: nowhere does not exist$"):
        text_files([Path("nowhere")], "public")


def wrong_values(option: Option) -> list[float]:
    """Values that the ranges of an option do not have."""
    at_least = [] if option.at_least is None else [option.at_least - 1]
    ends = [end for end in (option.above, option.below) if end is not None]
    return [*ends, *at_least, *([float("nan")] if ends or at_least else [])]


def filled(config_class: type[Any]) -> dict[str, Any]:
    """A value for each field that must be given."""
    made = {Path: Path("x"), str: "x"}
    needed = [option for option in options(config_class) if option.is_required]
    return {o.field: (made[o.item],) if o.is_list else made[o.item] for o in needed}


@pytest.mark.parametrize(("command", "option"), [pytest.param(c, o, id=f"{c}.{o.field}") for c, o in OPTIONS])
def test_every_range_holds_for_python_users(command: str, option: Option) -> None:
    config_class = CONFIGS[command]
    if option.default is not None:
        config_class(**{**filled(config_class), option.field: option.default})
    for value in wrong_values(option):
        with pytest.raises(UsageError) as caught:
            config_class(**{**filled(config_class), option.field: value})
        assert caught.value.field == option.field
        assert caught.value.message.startswith(f"{option.field}: ")


def test_numbers_have_a_range_unless_all_of_them_can_be_used() -> None:
    free = {o.key for _, o in OPTIONS if o.item in (int, float) and not wrong_values(o)}
    assert free == {"seed"}


def test_every_option_says_what_it_does_and_where_it_stands() -> None:
    for command, option in OPTIONS:
        assert option.help.endswith("."), f"{command}: {option.shown}"
        assert option.section in SECTIONS
        assert option.metavar or option.item is bool


def test_a_flag_of_one_name_is_one_thing() -> None:
    found = defaultdict(set)
    for _, option in OPTIONS:
        if not option.is_argument:
            found[option.key].add((option.section, option.is_list, option.item is bool, option.paths))
    assert {key: kinds for key, kinds in found.items() if len(kinds) > 1} == {}


def texts_of_errors(source: Path) -> list[str]:
    """Every text that a module gives to an error or to the reporter."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    speaking = [call for call in calls if re.search(r"(Error|\.warn)$", ast.unparse(call.func))]
    inside = [node for call in speaking for node in ast.walk(call)]
    return [node.value for node in inside if isinstance(node, ast.Constant) and isinstance(node.value, str)]


BELOW = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.py"))]


@pytest.mark.parametrize("source", [path for path in BELOW if not path.startswith("cli/") and path != "config.py"])
def test_below_the_command_line_nobody_speaks_of_flags(source: str) -> None:
    # A command line to type is one: "flexctl verify PATH --absent NAME".
    texts = [text for text in texts_of_errors(ROOT / source) if "flexctl" not in text]
    assert not [text for text in texts if re.search(r"(^|\s)--?[a-z]", text)]


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: row.name)
def test_every_result_is_typed_to_the_bottom_and_public(row: Command) -> None:
    names = {name: getattr(flexctl, name) for name in flexctl.__all__ if name[0].isupper()}
    pending: list[Any] = [getattr(flexctl, row.result)]
    seen = set()
    while pending:
        kind = pending.pop()
        if kind in seen:
            continue
        seen.add(kind)
        pending += [part for part in typing.get_args(kind) if not isinstance(part, types.EllipsisType)]
        if dataclasses.is_dataclass(kind):
            assert kind in names.values(), f"{kind} is not public"
            hints = typing.get_type_hints(kind, localns=names)
            # A manifest and its fields are as docs/format.md says.
            pending += [hint for name, hint in hints.items() if name not in ("manifest", "old", "new")]
    assert Any not in seen


def test_public_names_come_from_the_table() -> None:
    listed = {name for names in commands.PUBLIC.values() for name in names}
    assert set(flexctl.__all__) == listed | {"__version__"}
    assert set(flexctl.__all__) <= set(dir(flexctl))
