"""The run that README's first screen shows, with its text and budgets cut to what a test may take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import record
from tools.readme import removed, table, transcript


@pytest.mark.slow
def test_the_life_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PUBLIC_BYTES", 60_000)
    monkeypatch.setattr(record, "OWNERS_BYTES", 60_000)
    for name, value in (("MAX_TOKENS", 3000), ("SAMPLE_TOKENS", 6000), ("THREADS", 1)):
        monkeypatch.setenv(f"FLEXCTL_{name}", str(value))
    found = record.record(tmp_path)
    bits = found["bits_per_byte"]
    assert list(bits) == ["anchor", "own expert", "merged", *(f"without {name}" for name in record.OWNERS)]
    assert set(bits["own expert"]) == set(record.OWNERS)
    assert all(set(bits[model]) == {"public", *record.OWNERS} for model in bits if model != "own expert")
    assert removed(found) == record.REMOVED
    assert f"$ flexctl train-expert --data {record.REMOVED}\nTrained expert" in transcript(found)
    assert f"absent {record.REMOVED}" in found["commands"][-1]["output"]
    assert len(table(found).splitlines()) == 2 + 1 + len(record.OWNERS)
