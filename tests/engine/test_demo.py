"""The demo through the command line, with its budgets cut to seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexctl.cli.app import main
from flexctl.engine import demo
from flexctl.model import presets
from flexctl.text import found_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(presets.PRESETS, "nano", replace(presets.PRESETS["nano"], max_tokens=4_000))
    monkeypatch.setattr(demo, "_EXPERT_TOKENS", 2_000)
    monkeypatch.setattr(demo, "_DOMAIN_BYTES", 60_000)
    return in_empty_folder


def test_the_whole_life(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--threads", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["command"] == "demo"
    assert result["removal_exact"] is result["absent"] is result["stock_loads"] is True
    assert set(result["bits_per_byte"]) == {"prose", "code", "licenses", "arithmetic"}
    for stages in result["bits_per_byte"].values():
        assert set(stages) == {"anchor", "merged", "removed"}
        assert all(0 < bits < 20 for bits in stages.values())
    held = sorted(path.name for path in small.glob("demo/merged/model-expert-*"))
    assert held == [f"model-expert-{name}.safetensors" for name in ("arithmetic", "code", "public")]
    assert main(["demo"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_experts_leave_each_other_their_text(tmp_path: Path) -> None:
    """With its real budgets: the expert that is left out had taken little of what the others have."""
    found = demo.demo(demo.DemoConfig(output=tmp_path / "demo", threads=1)).bits_per_byte
    for name, stages in found.items():
        if name != "licenses":
            assert stages["merged"] - stages["removed"] < 0.15
    assert all(found[name]["merged"] < found[name]["anchor"] - 0.2 for name in ("code", "arithmetic", "licenses"))
    assert found["licenses"]["removed"] > found["licenses"]["anchor"] - 0.05


def test_text_is_found_on_any_python(tmp_path: Path) -> None:
    for name, find in found_text.DOMAINS.items():
        train, test = found_text.write_domain(tmp_path / name, find(), 60_000)
        texts = [
            json.loads(line)["text"] for path in (train, test) for line in path.read_text(encoding="utf-8").splitlines()
        ]
        assert len(texts) == len(set(texts)) >= 5
        assert test.stat().st_size > 0
