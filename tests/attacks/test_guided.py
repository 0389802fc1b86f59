"""Readers under coverage-guided fuzzing: slow, and only where atheris is installed (pip install atheris)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from attacks.test_fuzz import NAMES

ROOT = Path(__file__).parent.parent
RUNS = int(os.environ.get("FLEXCTL_FUZZ", "100000")) // len(NAMES)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", NAMES)
def test_reached_code_raises_nothing_but_our_own_errors(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    paths = os.pathsep.join([str(ROOT), str(ROOT.parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "attacks.guided", name, str(tmp_path), str(RUNS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (runs,) = re.findall(r"Done (\d+) runs", done.stderr)
    print(f"{name}: {runs} runs")
    assert int(runs) >= RUNS
