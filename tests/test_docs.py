"""Links and references between documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flexctl
from flexctl.commands import COMMANDS
from flexctl.options import options

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
SOURCES = sorted(path for folder in ("flexctl", "tests", "examples", "tools") for path in (ROOT / folder).rglob("*.py"))
SHOWN = [path.relative_to(ROOT).as_posix() for path in PAGES]


def headings(page: Path) -> list[str]:
    """Return a page's headings, without those inside code."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.*)$", text, re.MULTILINE)


def anchor_of(heading: str) -> str:
    """Return the fragment under which GitHub shows a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", SHOWN)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not fragment or fragment in map(anchor_of, headings(file)), target


def sections(page: Path) -> set[str]:
    """Return the numbers of a page's sections, those included that its table says are elsewhere."""
    numbered = [re.match(r"(\d+)\.", heading) for heading in headings(page)]
    listed = re.findall(r"^\| (\d+) \|", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {found[1] for found in numbered if found} | set(listed)


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sections_that_are_named_exist(path: Path) -> None:
    for page, number in re.findall(r"\b([\w-]+\.md)\)?,\s+section\s+(\d+)", path.read_text(encoding="utf-8")):
        file = ROOT / "docs" / page
        assert not file.exists() or number in sections(file), f"{page}, section {number}"


@pytest.mark.parametrize("name", SHOWN)
def test_tests_that_are_named_exist(name: str) -> None:
    for path, function in re.findall(
        r"`(tests/[a-z0-9_/]+\.py)(?:::(\w+))?`", (ROOT / name).read_text(encoding="utf-8")
    ):
        assert (ROOT / path).is_file(), path
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8") or not function, f"{path}::{function}"


@pytest.mark.parametrize("name", SHOWN)
def test_commands_that_are_shown_have_the_flags_that_they_are_shown_with(name: str) -> None:
    everywhere = {"--json", "--quiet", "--verbose", "--help"}
    flags = {row.shown: {option.shown for option in options(getattr(flexctl, row.config))} for row in COMMANDS}
    text = re.sub(r"\\\n\s*", " ", (ROOT / name).read_text(encoding="utf-8"))
    for command, rest in re.findall(r"(?:\$ |`)flexctl ([a-z][a-z-]*)([^`\n|]*)", text):
        assert command in flags, command
        given = re.findall(r"(?<=\s)--[a-z][a-z-]*", rest)
        assert set(given) <= flags[command] | everywhere, (command, given)
