"""Imports go down only. Read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import flexctl
from flexctl.cli.reference import ROOMS

ROOT = Path(flexctl.__file__).parent

# A layer may import from the layers after it, and from itself; engine/ not even from itself.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"engine"},
    {"steps"},
    {"serving"},
    {"evaluation", "training"},
    {"routing", "tracing"},
    {"privacy"},
    {"text"},
    {"hub", "cache", "trust"},
    {"model", "bundle"},
    {
        "families",
        "workspace",
        "config",
        "flags",
        "heap",
        "options",
        "commands",
        "runtime",
        "errors",
        "pointers",
        "processes",
        "faces",
        "shipped",
    },
)
DEPTH = {part: depth for depth, parts in enumerate(LAYERS) for part in parts}
# Parts of one layer that may see each other: the lowest one.
SHARED_DEPTH = len(LAYERS) - 1

ONLY_IMPORTER = {
    "sentence_transformers": ("routing/start_rows.py",),
    "huggingface_hub": ("hub/", "model/configs.py"),  # the latter for what configs of Transformers raise
    "datasets": ("hub/data.py", "evaluation/tasks/"),
    "lm_eval": ("evaluation/tasks/",),
    "pyarrow": ("text/tables.py",),
    "typer": ("cli/",),
    "rich": ("cli/",),
    "torch": (
        "processes.py",
        "model/",
        "text/",
        "routing/",
        "privacy/",
        "training/",
        "evaluation/",
        "serving/",
        "steps/",
        "engine/",
    ),
    "transformers": ("model/", "text/", "training/", "evaluation/", "engine/"),
    "matplotlib": ("evaluation/report/charts.py",),
    "jinja2": ("evaluation/report/template.py", "evaluation/tasks/", "steps/answering.py"),
    "cryptography": ("trust/", "privacy/noise.py"),
    "securesystemslib": ("trust/", "steps/"),
    "model_signing": ("trust/oms.py",),
    "pydivsufsort": ("tracing/building.py",),
    "starlette": ("serving/",),
    "uvicorn": ("serving/",),
    "vllm": ("serving/vllm/",),
    "uvloop": ("serving/vllm/",),
    "dp_accounting": ("privacy/accounting.py",),
    "datasketch": ("text/near_duplicates.py",),
    "xxhash": ("text/",),
    "trackio": ("training/track.py",),
    "liger_kernel": ("model/kernels.py",),
    "click": (),
}
WITHOUT_TORCH_AT_TOP = (
    "cli/",
    "engine/",
    "steps/",
    "bundle/",
    "routing/overlap.py",
    "serving/vllm/asking.py",
    "serving/vllm/check.py",
    "serving/vllm/launch.py",
    "serving/vllm/masks.py",
    "serving/vllm/plugin.py",
    "serving/vllm/refusals.py",
    "serving/vllm/web.py",
    "privacy/accounting.py",
    "config.py",
    "processes.py",
    "workspace.py",
    "__init__.py",
)

DISTRIBUTED = "torch.distributed"
OF_MANY = ("processes.py", "model/sharding.py", "training/shards.py")

# It also runs where packages are missing that hub/ needs.
LOCAL_IMPORTS = {"engine/doctor.py"}

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


@cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported(node: ast.AST) -> list[str]:
    """Full names of the modules (or names in them) that one statement imports."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide the layer"
        return [f"{node.module}.{name.name}" for name in node.names]
    return []


@cache
def all_imports(source: str) -> list[str]:
    return [name for node in ast.walk(tree(source)) for name in imported(node)]


def imports_at_top(source: str) -> list[str]:
    """What importing the module imports: not inside functions, not for type checkers."""
    found = []
    pending: list[ast.AST] = [tree(source)]
    while pending:
        node = pending.pop()
        if is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        found += imported(node)
        pending += ast.iter_child_nodes(node)
    return found


def part_of(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


def own_parts(source: str) -> list[tuple[str, str]]:
    """(part, module below it) of every import from flexctl itself."""
    names = [name.split(".") for name in all_imports(source)]
    return [(name[1], name[2] if len(name) > 2 else "") for name in names if name[0] == "flexctl" and len(name) > 1]


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "__init__.py"])
def test_imports_go_down_only(source: str) -> None:
    here = part_of(source)
    for part, _ in own_parts(source):
        if part not in DEPTH:
            continue  # a public name of the package itself, below
        allowed = part == here or DEPTH[part] > DEPTH[here] or DEPTH[part] == DEPTH[here] == SHARED_DEPTH
        assert allowed, f"{source} imports flexctl.{part}, which is not below it"


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("engine/")])
def test_engine_modules_do_not_import_each_other(source: str) -> None:
    siblings = [module for part, module in own_parts(source) if part == "engine"]
    assert not siblings


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("bundle/")])
def test_the_format_knows_no_workspace_and_no_settings(source: str) -> None:
    assert {part for part, _ in own_parts(source)} <= {"bundle", "errors", "families", "pointers", "runtime", "shipped"}


@pytest.mark.parametrize("source", SOURCES)
def test_special_packages_have_one_importer(source: str) -> None:
    for name in all_imports(source):
        allowed = ONLY_IMPORTER.get(name.split(".")[0])
        assert allowed is None or source.startswith(allowed), f"{source} imports {name}"


@pytest.mark.parametrize("source", SOURCES)
def test_one_process_needs_nothing_distributed(source: str) -> None:
    assert not [name for name in imports_at_top(source) if name.startswith(DISTRIBUTED)]
    assert source in OF_MANY or not [name for name in all_imports(source) if name.startswith(DISTRIBUTED)]


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith(WITHOUT_TORCH_AT_TOP)])
def test_heavy_packages_are_imported_inside_functions(source: str) -> None:
    heavy = {"torch", "transformers", "sentence_transformers"}
    assert not heavy & {name.split(".")[0] for name in imports_at_top(source)}


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith(("engine/", "steps/"))])
def test_what_is_flexctl_s_own_is_imported_at_the_top(source: str) -> None:
    functions = [node for node in ast.walk(tree(source)) if isinstance(node, ast.FunctionDef)]
    names = [name for function in functions for node in ast.walk(function) for name in imported(node)]
    assert source in LOCAL_IMPORTS or not [name for name in names if name.startswith("flexctl")]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_costs_nothing_until_a_name_of_it_is_used(room: str) -> None:
    assert set(imports_at_top(f"{room}/__init__.py")) == {"__future__.annotations", "flexctl.faces.face"}
    package = importlib.import_module(f"flexctl.{room}")
    for module, names in package.NAMES.items():
        assert set(names) <= set(importlib.import_module(f"flexctl.{room}.{module}").__all__)
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("source", [source for source in SOURCES if not source.startswith("cli/")])
def test_only_the_command_line_prints_and_exits(source: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree(source)) if isinstance(node, ast.Call)]
    assert not {"print", "sys.exit", "exit", "quit", "os._exit"} & set(calls)


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("cli/")])
def test_inside_the_command_line_only_output_prints(source: str) -> None:
    calls = [ast.unparse(node.func) for node in ast.walk(tree(source)) if isinstance(node, ast.Call)]
    assert source == "cli/output.py" or not {"print", "typer.echo", "sys.stdout.write"} & set(calls)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != "cli/app.py"])
def test_only_main_catches_everything(source: str) -> None:
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            assert caught not in ("everything", "Exception", "BaseException"), f"{source}:{node.lineno}"


@pytest.mark.parametrize("source", SOURCES)
def test_typer_is_used_by_its_public_interface(source: str) -> None:
    assert not [name for name in all_imports(source) if re.match(r"typer\.[a-z_]", name)]


def test_every_part_has_a_layer() -> None:
    parts = {part_of(source) for source in SOURCES} - {"__init__"}
    assert parts <= set(DEPTH)
