from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from flexctl.commands import Command
from flexctl.config import resolve
from flexctl.errors import UsageError
from flexctl.options import OUTPUT, argument, flag, options


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """Stands in for a command's Config; the command's name decides the table."""

    experts: Annotated[tuple[Path, ...], argument("EXPERT", "Experts.")] = ()
    output: Path | None = None
    source: Annotated[Path | None, flag("DIR", "The model.", OUTPUT, name="from")] = None
    top_k: int | None = None
    lr: float = 0.5
    epochs: int | float | None = None
    overwrite: bool = False
    without: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    preset: Literal["nano", "micro"] = "micro"
    expires: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedyConfig:
    data: tuple[Path, ...]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: a workspace below which nothing is set."""
    for name in [name for name in os.environ if name.startswith("FLEXCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def toml(folder: Path, text: str) -> None:
    (folder / "flexctl.toml").write_text(text, encoding="utf-8")


def merged(**given: Any) -> MergeConfig:
    return resolve(MergeConfig, "merge", given)


def test_nothing_given_is_the_defaults() -> None:
    assert merged(top_k=None, without=[]) == MergeConfig()


def test_precedence_is_flag_environment_file_default(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert merged().lr == 0.5
    toml(folder, "[merge]\nlr = 1\n")
    assert merged().lr == 1.0
    monkeypatch.setenv("FLEXCTL_LR", "2")
    assert merged().lr == 2.0
    assert merged(lr="3").lr == 3.0


def test_given_is_not_truthiness(folder: Path) -> None:
    toml(folder, "[merge]\nlr = 1.0\ntop_k = 2\n")
    config = merged(lr="0", top_k="0")
    assert (config.lr, config.top_k) == (0.0, 0)


def test_text_becomes_the_type_of_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "TOP_K": "1_000",
        "LR": "1e-3",
        "OVERWRITE": "yes",
        "WITHOUT": "law,news",
        "DATA": f"a{os.pathsep}b,c",
        "PRESET": "nano",
        "OUTPUT": "x/y",
        "EPOCHS": "0.5",
    }.items():
        monkeypatch.setenv(f"FLEXCTL_{name}", text)
    assert merged() == MergeConfig(
        top_k=1000,
        lr=1e-3,
        overwrite=True,
        without=("law", "news"),
        data=(Path("a"), Path("b,c")),
        preset="nano",
        output=Path("x/y"),
        epochs=0.5,
    )


def test_values_of_the_file_and_its_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toml(folder, '[merge]\ndata = ["a", "/b"]\nwithout = "law"\noutput = "out"\nexpires = 2030-12-31\n')
    below = folder / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    config = merged()
    assert config.data == (folder / "a", Path("/b"))
    assert config.output == folder / "out"
    assert config.without == ("law",)
    assert config.expires == "2030-12-31"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TOP_K", "two", "a whole number"),
        ("LR", "nan", "a number"),
        ("OVERWRITE", "maybe", "true or false"),
        ("PRESET", "big", "one of nano, micro"),
    ],
)
def test_a_bad_value_is_named_with_its_source(
    variable: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as flag:
        merged(**{variable.lower(): value})
    assert flag.value.message == f"--{variable.lower().replace('_', '-')} is {value!r}; expected {expected}"
    monkeypatch.setenv(f"FLEXCTL_{variable}", value)
    with pytest.raises(UsageError) as environment:
        merged()
    assert environment.value.message == f"FLEXCTL_{variable} is {value!r}; expected {expected}"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('top_k = "2"', "[merge] top_k is '2'; expected a whole number"),
        ("top_k = true", "[merge] top_k is 'True'; expected a whole number"),
        ("overwrite = 1", "[merge] overwrite is '1'; expected true or false"),
        ("output = 3", "[merge] output is '3'; expected a path in quotes"),
        ("topk = 3", "[merge]: unknown key 'topk'; known are data, epochs,"),
        ('experts = ["a.st"]', "unknown key 'experts'"),
    ],
)
def test_a_bad_line_of_the_file_is_named(folder: Path, line: str, said: str) -> None:
    toml(folder, f"[merge]\n{line}\n")
    with pytest.raises(UsageError) as caught:
        merged()
    assert caught.value.message.startswith(str(folder / "flexctl.toml"))
    assert said in caught.value.message


def test_arguments_are_given_on_the_command_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXCTL_EXPERTS", "experts")  # a place of the workspace, not an expert to merge
    assert merged().experts == ()
    assert merged(experts=[Path("a.st")]).experts == (Path("a.st"),)


def test_a_flag_may_have_another_name_than_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXCTL_FROM", "elsewhere")
    (source,) = (option for option in options(MergeConfig) if option.field == "source")
    assert (source.key, source.shown) == ("from", "--from")
    assert resolve(MergeConfig, "remove", {}).source == Path("elsewhere")


def test_what_is_needed_and_given_nowhere() -> None:
    with pytest.raises(UsageError) as caught:
        resolve(NeedyConfig, "train_expert", {})
    assert caught.value.message == "train-expert needs --data"
    assert caught.value.hint == "give --data, or data in flexctl.toml under [train_expert]"


def test_names_of_configs() -> None:
    assert Command("train_expert", "Train.").config == "TrainExpertConfig"


@pytest.mark.parametrize("given", [{"without": ["a\udce9"]}, {"expires": "a\udce9"}])
def test_text_that_is_not_utf_8_is_refused_and_a_path_is_not(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"^--\w+ is 'a\\udce9'; expected text in UTF-8"):
        resolve(MergeConfig, "merge", given)
    assert resolve(MergeConfig, "merge", {"output": Path("a\udce9")}).output == Path("a\udce9")


def test_a_home_that_is_nobody_s() -> None:
    with pytest.raises(UsageError, match=r"--output is '~no such user/x'; there is no such user"):
        resolve(MergeConfig, "merge", {"output": Path("~no such user/x")})
