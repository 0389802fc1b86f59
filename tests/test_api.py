from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import types

import pytest

import flexctl
from flexctl.commands import COMMANDS as ROWS
from flexctl.commands import Command
from flexctl.workspace import COMMANDS


def test_every_public_name_is_there_sorted_and_documented() -> None:
    assert flexctl.__all__ == sorted(flexctl.__all__)
    for name in flexctl.__all__:
        value = getattr(flexctl, name)
        assert value.__doc__, f"{name} has no docstring"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        flexctl.nothing  # noqa: B018


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_command_is_one_function_with_one_config_and_one_result(row: Command) -> None:
    function = getattr(flexctl, row.name)
    config = getattr(flexctl, row.config)
    result = getattr(flexctl, row.result)
    assert isinstance(function, types.FunctionType)
    config_parameter, reporter, *others = inspect.signature(function).parameters.values()
    assert (config_parameter.name, reporter.name) == ("config", "reporter")
    assert all(other.kind is other.KEYWORD_ONLY and other.default is not other.empty for other in others)
    for kind in (config, result):
        assert dataclasses.is_dataclass(kind)
        assert kind.__dataclass_params__.frozen
        assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind)


def test_importing_the_package_and_every_engine_module_loads_nothing_heavy() -> None:
    script = f"""
import json, sys
import flexctl
light = sorted(sys.modules)
for command in {COMMANDS!r}:
    getattr(flexctl, command)
print(json.dumps([light, sorted(sys.modules)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    package, engine = (set(modules) for modules in json.loads(done.stdout))
    assert not package & {"torch", "transformers", "numpy", "typer", "rich"}
    assert not engine & {"torch", "transformers", "sentence_transformers", "huggingface_hub", "typer", "rich"}
