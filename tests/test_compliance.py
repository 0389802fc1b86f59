"""docs/compliance.md and docs/security.md: every command is run in its order, every threat names its test."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from builders import make_expert
from conftest import Texts
from signers import cheap_keys

from flexctl.bundle import open_anchor, open_expert
from flexctl.cli.app import main

ROOT = Path(__file__).parent.parent
COMPLIANCE, SECURITY = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("compliance", "security"))
BLOCKS = re.compile(r"```console\n(.*?)```", re.DOTALL)


def steps(text: str) -> list[tuple[list[str], int]]:
    """Return the arguments and the exit code of each command of a page."""
    found = []
    for line in "".join(BLOCKS.findall(text)).splitlines():
        command, _, code = line.removeprefix("$ flexctl ").partition("  # exit code ")
        found.append((shlex.split(command), int(code or 0)))
    return found


@pytest.fixture
def workspace(
    in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, anchor: Path, experts: dict[str, Path], texts: Texts
) -> Path:
    """What the page says that there is: a small trained anchor, and experts with rights of both kinds."""
    cheap_keys(monkeypatch)
    monkeypatch.setenv("FLEXCTL_THREADS", "1")
    monkeypatch.setenv("FLEXCTL_SEQ_LEN", "64")
    Path("flexctl.toml").write_text(f"[workspace]\nanchor = '{anchor}'\n")
    base = open_anchor(anchor)
    for path, name, source, purposes in (
        ("experts/law.st", "law", "code", ("research", "commercial")),
        ("experts/news.st", "news", "sums", ("research",)),
        ("law-2.st", "law", "code", ()),
        ("stranger.st", "stranger", "sums", ()),
    ):
        expert = open_expert(experts[source])
        tensors = {key: expert.tensor(key) for key in expert.spans}
        if path in ("law-2.st", "stranger.st"):
            first = next(iter(tensors))
            tensors[first] = base.feed_forward()[first].read()
        make_expert(Path(path), base, name, tensors=tensors, purposes=purposes, contact=f"rights@{name}.example")
    Path("tests").mkdir()
    for name, source in (("law", texts.code_test), ("public", texts.public_test)):
        shutil.copytree(source, f"tests/{name}.jsonl")
    return in_empty_folder


def write_trust(path: str, *keys: str, revoked: str = "") -> None:
    """Write a trust file of keys that are there; the first is revoked where a day is given."""
    entries = []
    for key in keys:
        line = Path(f"{key}.pub").read_text().splitlines()[1]
        entries.append(f'[[owners]]\nname = "{key}"\nkey = "{line}"\n')
    entries[0] += revoked
    Path(path).write_text("\n".join(entries))


def test_every_command_of_the_page_does_what_it_says(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workspace == Path.cwd()
    for arguments, code in steps(COMPLIANCE):
        if arguments[:4] == ["verify", "merged", "--trust", "trust-after.toml"]:
            known = [key for key in ("coordinator.key", "coordinator-2.key") if Path(key).exists()]
            write_trust("trust-after.toml", *known, revoked="revoked = 2026-01-01\n")
        if arguments[0] == "list":
            _start_again_with_both(arguments)
        if arguments[:2] == ["replace", "law"]:
            _start_again_with_both(arguments)
            Path("law.removed.json").unlink()
        assert main([*arguments, "-q"]) == code, (arguments, capsys.readouterr().err)
        capsys.readouterr()
        if arguments[0] == "keygen" and not Path("trust.toml").exists():
            write_trust("trust.toml", "coordinator.key")


def _start_again_with_both(arguments: list[str]) -> None:
    """Sections 2 and 3 begin with the model that section 1 took an expert out of."""
    files = ["experts/law.st", "experts/news.st"]
    assert main(["merge", *files, "--overwrite", "-q"]) == 0, arguments


def test_every_threat_names_its_test() -> None:
    rows = re.findall(r"^\| (?!somebody|---)(.*) \|$", SECURITY.split("## 2.")[0], re.MULTILINE)
    assert len(rows) > 15
    assert all("`tests/" in row or "**not seen**" in row for row in rows)


def test_commands_of_the_security_page_can_be_read() -> None:
    from flexctl.cli.app import COMMANDS
    from flexctl.cli.parsing import make_app

    for arguments, _ in steps(SECURITY):
        call = make_app(COMMANDS, arguments)(args=arguments, prog_name="flexctl", standalone_mode=False)
        assert call.row.shown == arguments[0]
