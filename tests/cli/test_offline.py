"""Nothing leaves the machine: commands open no connection and look up no name, but for addresses on the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Texts, write_jsonl

from flexctl.commands import COMMANDS

# Runs commands in one process whose every connection, look-up and packet is written down and refused.
WATCHED = """
import json, sys

tried = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname"):
        tried.append(f"{event} {arguments[1] if event.startswith('socket.connect') else arguments[0]!r}")
        raise OSError("no network in here")

sys.addaudithook(watch)
from flexctl.cli.app import main
from flexctl.trust import keys

keys.KDF_ROUNDS = 1
codes = []
for command in json.loads(sys.argv[1]):
    codes.append((command[0], main([*command, "-q"]), list(tried)))
    tried.clear()
print("watched", json.dumps(codes))
"""

ELSEWHERE = {
    "push": "is about the Hub",
    "pull": "likewise",
    "doctor": "asks whether the Hub can be reached, which its table says; nothing is sent",
    "serve": "listens where it is told to; tests/serving",
    "chat": "reads a terminal; what it asks of a model is generate's",
    "demo": "runs the others",
    "adopt": "reads a mixture from disk as init-anchor reads a checkpoint",
}


def watched(commands: list[tuple[str | Path, ...]]) -> list[tuple[str, int, list[str], str]]:
    """Return of each command its name, its exit code, what of the network it tried, and what all said on stderr."""
    free = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    said = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps([[str(word) for word in command] for command in commands])],
        env={**free, "FLEXCTL_PASSPHRASE": "correct horse battery"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = [line for line in said.stdout.splitlines() if line.startswith("watched ")]
    assert lines, said.stderr
    found = json.loads(lines[-1].removeprefix("watched "))
    return [(name, code, tried, said.stderr) for name, code, tried in found]


@pytest.mark.usefixtures("in_empty_folder")
def test_what_watches_sees_the_hub_being_asked() -> None:
    ((name, code, tried, _),) = watched([("pull", "hf://acme/merged", "-o", "here")])
    assert (name, code) == ("pull", 1)
    assert any("socket." in attempt for attempt in tried)


@pytest.mark.usefixtures("in_empty_folder")
def test_no_command_but_those_of_the_hub_uses_the_network(
    checkpoint: Path, anchor: Path, experts: dict[str, Path], texts: Texts
) -> None:
    write_jsonl(Path("own.jsonl"), ["a few words of its own", "and some more of them"] * 20)
    tiny_run = ("--threads", "1", "--seq-len", "32", "--batch-tokens", "256")
    private = ("--dp-epsilon", "30", "--dp-delta", "1e-3", "--dp-documents", "40", "--dp-noise-multiplier", "0.7")
    here = ("--anchor", anchor)
    small = ("--draws", "1", "--prefix-tokens", "4", "--max-new-tokens", "4", "--threads", "1")
    commands: list[tuple[str | Path, ...]] = [
        ("init-anchor", checkpoint, "--data", texts.public, "--sample-tokens", "2000", "-o", "a", *tiny_run[:4]),
        ("train-expert", "--data", texts.code, *here, "--max-steps", "1", "-o", "other/code.st", *tiny_run),
        ("train-expert", "--data", "own.jsonl", *here, "--max-steps", "1", "-o", "dp.st", *tiny_run, *private),
        ("embed-router", "--data", texts.code, *here, "-o", "rows.st", "--threads", "1"),
        ("compress", experts["code"], "--data", texts.code_test, *here, "--rank", "2", "-o", "low.st"),
        ("merge", *experts.values(), *here, "-o", "merged", "--screen", "--threads", "1"),
        ("keygen", "-o", "k.key"),
        ("sign", "merged", "--key", "k.key"),
        ("verify", "merged", *here),
        ("inspect", "merged"),
        ("list",),
        ("check-rights", "merged", "--purpose", "research"),
        ("evaluate", "merged", "--data", f"code={texts.code_test}", "--threads", "1"),
        ("generate", "merged", "--prompt", "one", "--max-new-tokens", "2", "--threads", "1"),
        ("select-proxy", "--data", texts.code, *here, "-o", "code.proxy.json", "--threads", "1"),
        ("merge", experts["code"], *here, "-o", "one"),
        ("tune-router", "one", "--proxy", "code.proxy.json", *here, "-o", "t", "--max-steps", "1", *tiny_run),
        ("import-expert", checkpoint, "--ffn-only", "--name", "dense", "--data", texts.code, *here, "--threads", "1"),
        ("audit", "merged", "--name", "code", "--data", texts.code, "--held-out", texts.code_test, *here, *small),
        ("trace-index", "--data", texts.code, "-o", "code.index"),
        ("trace-find", "--index", "code.index", "--text", "def one(): return 1"),
        ("replace", "code", "other/code.st", "--from", "merged", "-o", "replaced"),
        ("remove", "code", "--from", "merged", "-o", "removed"),
    ]
    assert {command[0] for command in commands} == {command.shown for command in COMMANDS} - ELSEWHERE.keys()
    found = watched(commands)
    assert [(name, code, tried) for name, code, tried, _ in found if code or tried] == [], found[0][3]
