"""Runs commands as a user does, and holds every one to this: no token in what it says, an error is one line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hub.server import READ_TOKEN, TOKEN

from flexctl.cli.app import main


@dataclass
class Terminal:
    """Runs commands and keeps what they said."""

    capture: pytest.CaptureFixture[str]

    def json(self, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
        """Return the object that a command prints with --json."""
        found = main([*map(str, arguments), "--json"])
        said = self.capture.readouterr()
        assert found == code, said.err
        assert not any(token in said.out + said.err for token in (TOKEN, READ_TOKEN))
        return dict(json.loads(said.out))

    def text(self, *arguments: str | Path) -> tuple[str, str]:
        """Return stdout and stderr of a command."""
        found = main([*map(str, arguments)])
        said = self.capture.readouterr()
        assert found == 0, said.err
        assert not any(token in said.out + said.err for token in (TOKEN, READ_TOKEN))
        return said.out, said.err

    def error(self, *arguments: str | Path, code: int) -> str:
        """Return the error of a command that fails: one line, and perhaps one with a hint."""
        found = main([*map(str, arguments)])
        out, err = self.capture.readouterr()
        assert (found, out) == (code, ""), err
        assert not any(token in err for token in (TOKEN, READ_TOKEN))
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert lines[0].startswith("error: ")
        assert [line.split(":")[0] for line in lines[1:]] in ([], ["hint"]), err
        return "\n".join(lines)
