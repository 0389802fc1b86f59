"""What a release is made of: the wheel's check, and the versions of Python that three files name."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import pytest

from tools.release import check

ROOT = Path(__file__).parent.parent
SOURCE = ("flexctl/__init__.py", "flexctl/py.typed", "templates/merged-card.md", "tests/tiny.py", "README.md")


def source(folder: Path) -> Path:
    for name in SOURCE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def wheel(folder: Path, *names: str) -> Path:
    path = folder / "flexctl-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("flexctl-1.dist-info/METADATA", *names):
            archive.writestr(name, "")
    return path


WHOLE = ("flexctl/__init__.py", "flexctl/py.typed", "flexctl/templates/merged-card.md")


def test_a_whole_wheel_passes(tmp_path: Path) -> None:
    check(wheel(tmp_path, *WHOLE), source(tmp_path / "source"))


@pytest.mark.parametrize("missing", WHOLE)
def test_a_wheel_that_lacks_a_file_does_not(tmp_path: Path, missing: str) -> None:
    with pytest.raises(SystemExit, match=rf"missing \['{missing}'\], extra \[\]"):
        check(wheel(tmp_path, *(name for name in WHOLE if name != missing)), source(tmp_path / "source"))


def test_a_wheel_with_tests_in_it_does_not(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"missing \[\], extra \['tests/tiny.py'\]"):
        check(wheel(tmp_path, *WHOLE, "tests/tiny.py"), source(tmp_path / "source"))


def test_one_range_of_pythons() -> None:
    project, makefile, workflow = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "Makefile", ".github/workflows/ci.yml")
    )
    classified = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    assert re.findall(r'"([\d.]+)"', matrix) == classified
    assert re.findall(r"^M(?:IN|AX)_PYTHON := (.*)$", makefile, re.MULTILINE) == [classified[0], classified[-1]]
    assert f'requires-python = ">={classified[0]}"' in project
