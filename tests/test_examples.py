"""The examples run, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import Texts

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_two_owners(in_empty_folder: Path, texts: Texts) -> None:
    arguments = [str(texts.public), str(texts.code), str(texts.code_test), "--quick"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "two_owners.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "same bytes as a merge that never had it: True" in done.stdout
    assert (in_empty_folder / "two-owners" / "without" / "config.json").exists()
