"""What no run can bring to its end is refused in one line before it begins, under --dry-run too."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Texts

from flexctl import TrainExpertConfig, flags
from flexctl.bundle import hashing
from flexctl.cli.app import main
from flexctl.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

Commands = dict[str, list[str]]


@pytest.fixture
def commands(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoint: Path,
    anchor: Path,
    experts: dict[str, Path],
    merged: Path,
    texts: Texts,
) -> Commands:
    """A call of every command that writes, complete but for where to, that would do its work."""
    code, public, base = str(texts.code), str(texts.public), ["--anchor", str(anchor)]
    old, sums = str(experts["code"]), str(experts["sums"])
    mixture = tmp_path_factory.mktemp("mixture") / "moe"
    tiny.make_mixture(mixture, "flex_olmo", experts=2)
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, mixture)
    return {
        "adopt": ["adopt", str(mixture), "--names", "law", "--data", public],
        "init-anchor": ["init-anchor", str(checkpoint), "--data", public],
        "train-expert": ["train-expert", "--data", code, *base],
        "import-expert": ["import-expert", str(checkpoint), "--data", code, *base],
        "embed-router": ["embed-router", "--data", code, *base],
        "compress": ["compress", old, "--data", code, *base],
        "select-proxy": ["select-proxy", "--data", code, *base],
        "merge": ["merge", old, sums, *base],
        "remove": ["remove", "code", "--from", str(merged)],
        "replace": ["replace", "code", old, "--from", str(merged), "--data", f"code={code}"],
        "evaluate": ["evaluate", str(anchor), "--data", f"code={code}"],
        "generate": ["generate", str(anchor), "--prompt", "x"],
        "chat": ["chat", str(anchor)],
        "demo": ["demo"],
    }


WITHOUT_DRY_RUN = ("evaluate", "generate", "chat", "doctor", "demo")
WITH_THREADS = (
    "adopt",
    "init-anchor",
    "train-expert",
    "import-expert",
    "embed-router",
    "compress",
    "select-proxy",
    "replace",
    "evaluate",
    "generate",
    "chat",
    "demo",
)
FILES = ("train-expert", "import-expert", "embed-router", "compress", "select-proxy")
FOLDERS = ("init-anchor", "merge", "remove")


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int = 2) -> str:
    """Run a command as it is and under --dry-run, and return the one line that it ends with, the same for both."""
    runs = [arguments] if arguments[0] in WITHOUT_DRY_RUN else [arguments, [*arguments, "--dry-run"]]
    said = set()
    for run in runs:
        assert main([*run, "-q"]) == code, capsys.readouterr()
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert [line.split(": ")[0] for line in lines] in (["error"], ["error", "hint"]), err
        said.add(lines[0])
    assert len(said) == 1
    return str(said.pop())


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads weights or text has begun."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr(hashing, "hash_spans", refuse)
    monkeypatch.setattr("flexctl.text.documents.read_documents", refuse)
    monkeypatch.setattr("flexctl.model.building.build_model", refuse)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", ["init-anchor", "adopt", "train-expert", "import-expert"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("caf\udce9", "'caf\\udce9'; expected text in UTF-8"),
        ("a\0b", "'\\x00', which is no character of a text"),
        ("x" * 10_001, "has 10001 characters; expected at most 10000"),
    ],
)
def test_words_that_no_manifest_can_hold(
    commands: Commands, command: str, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--license"] if command in ("init-anchor", "adopt") else ["--license", "--label", "--contact", "--purpose"]
    for flag in given:
        line = refused(capsys, [*commands[command], flag, text])
        assert line.startswith((f"error: {flag}: ", f"error: {flag} is "))
        assert says in line
    assert os.listdir() == []


def test_words_of_any_language_and_a_license_of_many_lines_are_taken() -> None:
    words: dict[str, Any] = {
        "label": "Ver\u00f6ffentlicht, \u6cd5\u5f8b \U0001f600",
        "license": "MIT\r\n\n\tas is",
        "purpose": ("a", "b"),
    }
    TrainExpertConfig(data=(Path("law"),), **words)


@pytest.mark.parametrize("field", ["license", "label", "contact", "purpose"])
def test_words_that_no_manifest_can_hold_are_refused_for_python_users(field: str) -> None:
    bad: dict[str, Any] = {field: ("fine", "caf\udce9") if field == "purpose" else "caf\udce9"}
    with pytest.raises(UsageError, match=rf"^{field}: holds '\\udce9', which is no character of a text"):
        TrainExpertConfig(data=(Path("law"),), **bad)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_a_place_that_nothing_can_be_written_to(
    commands: Commands, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("x")
    ending = ".st" if command in FILES else ""
    long = "x" * 230
    for place in (f"{long}{ending}", f"new/{'y' * 300}/z{ending}", f"new/{long}/{long}{ending}"):
        line = refused(capsys, [*commands[command], "-o", place])
        assert "cannot be written (File name too long)" in line
        assert len(line) < 200
    line = refused(capsys, [*commands[command], "-o", f"file/new/x{ending}"])
    assert f"file/new/x{ending}: cannot be written, as " in line
    assert line.endswith("file is no folder")
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != Path.cwd())
    line = refused(capsys, [*commands[command], "-o", f"x{ending}"])
    assert line.endswith(f"cannot be written, as nothing may be made in {Path.cwd()}")
    assert os.listdir() == ["file"]


@pytest.mark.usefixtures("no_work")
def test_files_of_evaluate_that_cannot_be_written(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, [*commands["evaluate"], "--samples", f"{'x' * 300}.jsonl"])
    assert "File name too long" in line


@pytest.mark.usefixtures("no_work")
def test_a_router_file_whose_name_gives_none(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'public' gives no name for an expert" in refused(capsys, [*commands["embed-router"], "-o", "public.st"])


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", ["init-anchor", "train-expert", "import-expert", "select-proxy"])
def test_names_that_nothing_can_bear(commands: Commands, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, [*commands[command], "--name", "../x"])
    assert line.startswith("error: --name: is '../x'; expected 1 to ")


@pytest.mark.parametrize("command", WITH_THREADS)
def test_threads_that_no_machine_has(
    commands: Commands, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "_MOST_THREADS", 300)
    has_output = command not in ("evaluate", "generate", "chat")
    asked = [*commands[command], "-o", "new.st"] if has_output else commands[command]
    assert refused(capsys, [*asked, "--threads", "100000"]) == "error: --threads: 100000 is above 300"
    assert refused(capsys, [*asked, "--threads", "301"]) == "error: --threads: 301 is above 300"
    for few in ("0", "-1"):
        assert refused(capsys, [*asked, "--threads", few]) == f"error: --threads: {few} is not above 0"
    assert os.listdir() == []


def test_threads_of_a_large_machine_are_taken() -> None:
    assert max(256, 4 * (os.cpu_count() or 1)) == flags._MOST_THREADS
    assert TrainExpertConfig(data=(Path("law"),), threads=256).threads == 256


@pytest.mark.parametrize("command", [name for name in WITH_THREADS if name != "demo"])
def test_devices_that_nothing_runs_on(commands: Commands, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*commands[command], *(["-o", "new.st"] if command not in WITHOUT_DRY_RUN else [])]
    assert refused(capsys, [*asked, "--device", "mps"]) == "error: --device: 'mps' is not supported"
    assert os.listdir() == []


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("command", "limit", "more", "file"),
    [
        ("train-expert", 1000, ["--max-steps", "1"], ".new.work/own.tokens"),
        ("evaluate", 1000, ["--samples", "new.jsonl"], "new.jsonl"),
        ("merge", 1000, [], "new"),
        ("init-anchor", 1000, ["--sample-tokens", "2000"], "new"),
    ],
)
def test_a_disk_without_room_is_one_line_with_the_file(
    commands: Commands, command: str, limit: int, more: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if command == "evaluate" else ["-o", "new.st" if command in FILES else "new"]
    threads = [] if command == "merge" else ["--threads", "1"]
    with files_up_to(limit):
        assert main([*commands[command], *more, *output, *threads, "-q"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"error: File too large: {file}",
        "hint: the file system or ulimit -f allows no larger file; write to another place with -o",
    ]
    assert os.listdir() == []
