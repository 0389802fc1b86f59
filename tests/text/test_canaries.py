"""Canaries: a coin each, secret, and nobody else's to read."""

from __future__ import annotations

from pathlib import Path

from flexctl.text.canaries import CanaryFolder, plant_canaries
from flexctl.text.documents import read_documents


def texts(folder: CanaryFolder, field: str = "text") -> tuple[list[str], list[str]]:
    planted, left_out = (list(read_documents([file], field)) for file in (folder.planted, folder.left_out))
    return planted, left_out


def test_each_is_planted_or_left_out(tmp_path: Path) -> None:
    folder = CanaryFolder.beside(tmp_path / "law.st")
    plant_canaries(folder, 200, "body", keep=False)
    planted, left_out = texts(folder, "body")
    assert len({*planted, *left_out}) == len(planted) + len(left_out) == 200
    assert 60 < len(planted) < 140
    assert folder.path == tmp_path / "law.canaries"
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.path.iterdir())


def test_they_are_new_every_time_but_for_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = CanaryFolder.beside(tmp_path / "law.st")
    plant_canaries(folder, 8, "text", keep=True)
    first = texts(folder)
    plant_canaries(folder, 8, "text", keep=True)
    assert texts(folder) == first
    plant_canaries(folder, 8, "text", keep=False)
    assert not {*texts(folder)[0], *texts(folder)[1]} & {*first[0], *first[1]}
