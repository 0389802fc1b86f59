"""What a terminal shows: bars and colours, and none where they are not wanted."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexctl.cli.views import render
from flexctl.engine.generate import GenerateResult, Piece

COLOUR = re.compile(r"\x1b\[[0-9;]*m")

SCRIPT = """
import time
from flexctl.cli.output import Output
from flexctl.errors import FlexctlError
output = Output()
with output.reporter.progress("training", 4, "tokens") as outer:
    outer.advance(1, loss=2.5)
    with output.reporter.progress("checking", 0, "bytes") as inner:
        inner.advance(5)
        output.reporter.note("a [note]")
        output.reporter.warn("a warning")
        time.sleep(0.3)
output.error("FlexctlError", FlexctlError("it broke"))
"""


def seen(script: str = SCRIPT, stream: str = "stderr", **environment: str) -> str:
    """Return what a terminal of 120 columns gets on one of a script's streams; the other one stays empty."""
    ours, theirs = os.openpty()
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    plain |= {"TERM": "xterm-256color", "COLUMNS": "120", **environment}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: theirs}
    process = subprocess.Popen([sys.executable, "-c", script], **streams, env=plain)
    os.close(theirs)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    out, err = process.communicate()
    os.close(ours)
    assert (process.returncode, out or b"", err or b"") == (0, b"", b"")
    return b"".join(chunks).decode()


def test_bars_and_lines_share_a_terminal() -> None:
    text = seen()
    plain = COLOUR.sub("", text)
    assert re.search(r"training ━+.* 25% .*1 tokens  loss 2.500", plain)
    assert "checking" in plain
    assert "a [note]" in plain
    assert "warning: a warning" in plain
    assert "\x1b[1;31merror:\x1b[0m it broke" in text


def test_no_color() -> None:
    text = seen(NO_COLOR="1")
    assert "error: it broke" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)


@pytest.fixture
def answer() -> GenerateResult:
    pieces = [Piece(text=" a", shares={"public": 0.25, "law": 0.75}), Piece(text="\x1b\n", shares={"public": 1.0})]
    return GenerateResult(
        path=Path("merged"),
        digest="sha256:0",
        prompt="so",
        text=" a\x1b\n",
        tokens=2,
        without=[],
        experts={"public": 0.625, "law": 0.375},
        pieces=pieces,
    )


def test_pieces_have_the_colour_of_the_leading_expert_and_a_legend(answer: GenerateResult) -> None:
    script = """
from flexctl.cli.output import Output
output = Output()
output.reporter.write("so")
output.reporter.write(" a", 1)
output.reporter.write("\\x1b\\n", 0)
"""
    assert seen(script, stream="stdout") == "so\x1b[36m a\x1b[0m\\x1b\r\n"
    assert seen(script, stream="stdout", NO_COLOR="1") == "so a\\x1b\r\n"
    assert render("generate", answer, verbose=False, colour=True).splitlines() == [
        "",
        "expert  share",
        "public  0.625",
        "\x1b[36mlaw     0.375\x1b[0m",
    ]


def test_without_colours_pieces_are_a_table(answer: GenerateResult) -> None:
    assert render("generate", answer, verbose=False, colour=False).splitlines() == [
        "",
        "piece     leading  public    law",
        "' a'      law       0.250  0.750",
        "'\\x1b\\n'  public    1.000      -",
        "",
        "expert  share",
        "public  0.625",
        "law     0.375",
    ]


def test_without_pieces_there_is_nothing_left_to_say(answer: GenerateResult) -> None:
    assert render("generate", dataclasses.replace(answer, pieces=[]), verbose=False, colour=True) == ""
