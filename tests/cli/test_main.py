"""The way in: exit codes, errors, --json, --quiet, precedence. The engine is a stand-in here."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from safetensors import SafetensorError

import flexctl
from flexctl import flags
from flexctl.cli.app import main
from flexctl.errors import BundleError, FlexctlError, Interrupted, UsageError
from flexctl.options import argument
from flexctl.runtime import Reporter


@dataclass(frozen=True, kw_only=True, slots=True)
class StandInConfig:
    experts: Annotated[tuple[Path, ...], argument("EXPERT", "Experts.")] = ()
    output: Annotated[Path | None, flags.output("DIR", "Where to write.")] = None
    top_k: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class StandInResult:
    path: Path
    digest: str = "sha256:" + "0" * 64
    dry_run: bool = False
    num_experts: int = 1
    num_experts_per_tok: int = 1
    bytes_written: int = 2_500_000
    experts: list[Any] = field(default_factory=lambda: [flexctl.MergedExpert(name="public", index=0, digest="")])
    extra: float | None = None
    ok: bool = True

    @property
    def exit_code(self) -> int:
        return 0 if self.ok else 3


Engine = Callable[[StandInConfig, Reporter], StandInResult]
Install = Callable[[Engine], None]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Put a function in the place of merge, in an empty directory without settings."""
    for name in [name for name in os.environ if name.startswith("FLEXCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(flexctl), "MergeConfig", StandInConfig)

    def install(function: Engine) -> None:
        monkeypatch.setitem(vars(flexctl), "merge", function)

    return install


def echo(config: StandInConfig, reporter: Reporter) -> StandInResult:
    del reporter
    return StandInResult(path=config.output or Path("merged"), num_experts_per_tok=config.top_k or 4)


def talk(config: StandInConfig, reporter: Reporter) -> StandInResult:
    reporter.note("a note")
    reporter.warn("a warning")
    with reporter.progress("copying", 10, "bytes") as bar:
        bar.advance(10, loss=1.0)
    return echo(config, reporter)


def raising(error: BaseException) -> Engine:
    def fail(*_: object) -> StandInResult:
        raise error

    return fail


def test_one_clean_line_on_stdout(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(echo)
    assert main(["merge", "a.st", "-o", "out"]) == 0
    out, err = capsys.readouterr()
    assert out == "Merged public into out: 4 active for a token, 2.5 MB, sha256:000000000000\n"
    assert err == ""


def test_verbose_shows_every_field(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(echo)
    assert main(["merge", "-v"]) == 0
    out = capsys.readouterr().out
    for shown in dataclasses.fields(StandInResult):
        assert shown.name.replace("_", " ") in out
    assert "sha256:" + "0" * 64 in out


def test_json_is_one_object_with_version_and_command_first(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(echo)
    assert main(["merge", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert list(result)[:3] == ["schema_version", "command", "path"]
    assert (result["schema_version"], result["command"], result["path"]) == (1, "merge", "merged")
    assert err == ""


def test_json_has_no_nan(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(lambda *_: StandInResult(path=Path("x"), extra=float("nan"), experts=[{"share": float("inf")}]))
    assert main(["merge", "--json"]) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert result["extra"] is None
    assert result["experts"] == [{"share": None}]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], ["a note", "warning: a warning"]),
        (["--quiet"], []),
        (["-q"], []),
        (["--json"], []),
        (["--json", "-q"], []),
    ],
)
def test_what_stderr_says(
    engine: Install, capsys: pytest.CaptureFixture[str], flags: list[str], said: list[str]
) -> None:
    engine(talk)
    assert main(["merge", *flags]) == 0
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("flags", [["--json"], ["--json", "-q"]])
def test_warnings_stand_in_the_one_object(
    engine: Install, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    def warn(config: StandInConfig, reporter: Reporter) -> StandInResult:
        reporter.warn("`top_k`: 9 is more than there are")
        return talk(config, reporter)

    engine(warn)
    assert main(["merge", *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["warnings"] == ["--top-k: 9 is more than there are", "a warning"]
    assert err == ""
    engine(echo)
    assert main(["merge", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_warnings_before_an_error_stand_in_its_object(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(config: StandInConfig, reporter: Reporter) -> StandInResult:
        talk(config, reporter)
        raise BundleError("it broke")

    engine(fail)
    assert main(["merge", "--json"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["warnings"] == ["a warning"]


def test_an_answer_comes_before_the_result_and_ends_its_line(
    engine: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[str] = []

    def write(config: StandInConfig, reporter: Reporter) -> StandInResult:
        for text in ("so", " a\x1b", ""):
            reporter.write(text, 1)
            heard.append(capsys.readouterr().out)
        return echo(config, reporter)

    engine(write)
    assert main(["merge"]) == 0
    assert heard == ["so", " a\\x1b", ""]
    assert capsys.readouterr().out.startswith("\nMerged ")
    assert main(["merge", "--json"]) == 0
    assert heard[3:] == ["", "", ""]


def test_an_error_in_the_middle_of_an_answer_begins_its_own_line(
    engine: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_config: StandInConfig, reporter: Reporter) -> StandInResult:
        reporter.write("so")
        raise KeyboardInterrupt

    engine(stop)
    assert main(["merge"]) == 130
    assert capsys.readouterr() == ("so\n", "error: interrupted\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FlexctlError("it broke", hint="mend it"), 1),
        (UsageError("it broke", hint="mend it"), 2),
        (BundleError("it broke", hint="mend it"), 3),
        (Interrupted("it broke", hint="mend it"), 130),
    ],
)
def test_own_errors_are_two_lines_and_their_exit_code(
    engine: Install, capsys: pytest.CaptureFixture[str], error: FlexctlError, code: int
) -> None:
    engine(raising(error))
    assert main(["merge"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["error: it broke", "hint: mend it"]
    assert main(["merge", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {
        "error": {
            "type": type(error).__name__,
            "message": "it broke",
            "hint": "mend it",
            "exit_code": code,
            "warnings": [],
        }
    }


def test_unexpected_errors_say_so(
    engine: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(raising(ValueError("what")))
    assert main(["merge"]) == 1
    err = capsys.readouterr().err
    assert err.splitlines() == [
        "error: unexpected ValueError: what",
        "hint: set FLEXCTL_DEBUG=1 to see where it comes from",
    ]
    monkeypatch.setenv("FLEXCTL_DEBUG", "1")
    assert main(["merge"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_errors_of_the_machine_name_the_file(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(raising(OSError(28, "No space left on device", "merged/x")))
    assert main(["merge"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: No space left on device: merged/x",
        "hint: free some space, or write to another disk with -o",
    ]
    engine(raising(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")))
    assert main(["merge", "--json"]) == 1
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["message"], error["hint"]) == (
        "No space left on device",
        "free some space, or write to another disk with -o",
    )


def test_interrupted(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    engine(raising(KeyboardInterrupt()))
    assert main(["merge"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_result_that_is_not_ok_is_exit_code_3(engine: Install) -> None:
    engine(lambda *_: StandInResult(path=Path("x"), ok=False))
    assert main(["merge"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["merge", "--top-q", "3"], "No such option: --top-q (Possible options: --top-k)", "flexctl merge --help"),
        (["merge", "--top-k", "two"], "--top-k is 'two'; expected a whole number", None),
        (["remove"], "Missing argument 'NAME'.", "flexctl remove --help"),
        (["marge"], "No such command 'marge'. Did you mean 'merge'?", "flexctl --help"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(
    engine: Install, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str, hint: str | None
) -> None:
    engine(echo)
    assert main(arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [f"error: {message}", *([f"hint: {hint}"] if hint else [])]
    assert main([*arguments, "--json"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert (error["type"], error["message"], error["exit_code"]) == ("UsageError", message, 2)


def test_flag_beats_environment_beats_file(
    engine: Install, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine(echo)
    Path("flexctl.toml").write_text("[merge]\ntop_k = 1\n")

    def top_k(*flags: str) -> int:
        assert main(["merge", "--json", *flags]) == 0
        return int(json.loads(capsys.readouterr().out)["num_experts_per_tok"])

    assert top_k() == 1
    monkeypatch.setenv("FLEXCTL_TOP_K", "2")
    assert top_k() == 2
    assert top_k("--top-k", "3") == 3


def test_without_arguments_the_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: flexctl")
    assert err == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flexctl {flexctl.__version__}\n"


def test_python_m_flexctl_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "flexctl", "marge"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: No such command 'marge'")


SCRIPT = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
import flexctl

@dataclass
class Config:
    experts: tuple[Path, ...] = ()

@dataclass
class Result:
    text: str

def merge(config, reporter):
    {body}

flexctl.MergeConfig, flexctl.merge = Config, merge
from flexctl.cli.app import run
sys.argv = ["flexctl", "merge", "-v"]
run()
"""


def start(body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = start("time.sleep(1); return Result(text='x' * 1_000_000)")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


CLOSED = {"<&-": (0,), ">&-": (1,), "2>&-": (2,), "<&- >&- 2>&-": (0, 1, 2)}


@pytest.mark.skipif(os.name == "nt", reason="closes streams as a shell does")
@pytest.mark.parametrize(
    ("arguments", "closings"),
    [
        ("list --json", ("<&-", ">&-")),
        ("inspect nowhere", ("2>&-", "<&- >&- 2>&-")),
        *(
            pytest.param(arguments, tuple(CLOSED), marks=pytest.mark.slow)
            for arguments in ("list --json", "inspect nowhere")
        ),
    ],
)
def test_closed_streams_go_nowhere_and_change_nothing_else(
    tmp_path: Path, arguments: str, closings: tuple[str, ...]
) -> None:
    def run(closing: str) -> subprocess.CompletedProcess[str]:
        line = ["sh", "-c", f'"$0" -m flexctl {arguments} {closing}', sys.executable]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)

    whole = run("")
    for closing in closings:
        closed, partly = CLOSED[closing], run(closing)
        assert partly.returncode == whole.returncode
        assert partly.stdout == ("" if 1 in closed else whole.stdout)
        assert partly.stderr == ("" if 2 in closed else whole.stderr)


def test_control_c_while_the_interpreter_ends_says_nothing() -> None:
    presses = "import atexit, signal; atexit.register(signal.raise_signal, signal.SIGINT)"
    process = start(f"{presses}; return Result(text='done')")
    assert process.communicate() == ("text  done\n", "")
    assert process.returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="deletes the folder that it is in")
@pytest.mark.parametrize("arguments", ["list", "inspect nowhere", "verify /nowhere --json"])
def test_in_a_folder_that_was_deleted_it_says_so(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "gone").mkdir()
    line = ["sh", "-c", f'rmdir "$PWD"; "$0" -m flexctl {arguments}', sys.executable]
    done = subprocess.run(line, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the folder that you are in is gone" in done.stderr
    assert "Traceback" not in done.stderr


def test_control_c_is_exit_code_130() -> None:
    # A parent that ignores the signal, as a shell's background does, hands that down.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(f"{listening}; print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (out, err, process.returncode) == ("", "error: interrupted\n", 130)


def test_sigterm_is_exit_code_143() -> None:
    process = start("print('ready', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (out, err, process.returncode) == ("", "error: stopped by SIGTERM\n", 143)


def test_sigterm_is_heard_while_a_command_runs_and_where_nobody_else_hears_it(engine: Install) -> None:
    heard: list[int] = []

    def ends(_config: StandInConfig, _reporter: Reporter) -> StandInResult:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it went on")

    def goes_on(config: StandInConfig, reporter: Reporter) -> StandInResult:
        signal.raise_signal(signal.SIGTERM)
        return echo(config, reporter)

    engine(ends)
    assert main(["merge"]) == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    engine(goes_on)
    signal.signal(signal.SIGTERM, lambda number, _frame: heard.append(number))
    try:
        assert main(["merge"]) == 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert heard == [signal.SIGTERM]


def test_a_second_sigterm_lets_a_command_clear_up(engine: Install, capsys: pytest.CaptureFixture[str]) -> None:
    cleared: list[str] = []

    def stopped(_config: StandInConfig, _reporter: Reporter) -> StandInResult:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleared.append("all")
        raise AssertionError("it went on")

    engine(stopped)
    assert main(["merge"]) == 143
    assert cleared == ["all"]
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
