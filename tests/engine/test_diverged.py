"""A last step that was too large: no step after it has a loss, so what comes after training must find it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexctl.cli.app import main

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

PRIVATE = ["--dp-epsilon=8", "--dp-delta=1e-3", "--dp-documents=40"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "the loss on held-out text, "),
        (PRIVATE, "the clip that public text gives is nan"),
        ([*PRIVATE, "--dp-max-grad-norm=1"], "the loss on held-out text, public, is nan"),
    ],
)
def test_an_expert_is_not_written(
    tmp_path: Path, texts: Any, anchor: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    asked = ["train-expert", "--data", str(texts.code), "--anchor", str(anchor), "--seq-len=32", "--batch-tokens=64"]
    assert main([*asked, "-o", str(tmp_path / "x.st"), "--max-steps=1", "--lr=1e30", *more]) == 1
    assert f"error: {said}" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "x" in path.name]


def test_an_anchor_is_not_written(
    tmp_path: Path, texts: Any, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["init-anchor", str(checkpoint), "--data", str(texts.public), "--seq-len=32", "--batch-tokens=64"]
    more = ["--anneal-tokens=60", "--lr=1e30", "--sample-tokens=2000"]
    assert main([*asked, "-o", str(tmp_path / "x"), *more]) == 1
    assert "error: what routers are given on public text is not finite" in capsys.readouterr().err
    assert not [path.name for path in tmp_path.iterdir() if "x" in path.name]
