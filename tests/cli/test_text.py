from __future__ import annotations

from pathlib import Path

import pytest

from flexctl.cli.text import amount, cell, local, number, printable, progress_figures, progress_line, table


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234567, "1,234,567"), (0, "0"), (3.14159, "3.142"), (0.0, "0.000"), (12345.6, "12,346"), (2e-5, "2.00e-05")],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_numbers_that_are_none_are_a_dash() -> None:
    assert number(float("nan")) == number(float("inf")) == cell(None) == "-"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (2.5e12, "2.5 TB")],
)
def test_bytes(value: float, text: str) -> None:
    assert amount(value, "bytes") == text


def test_text_from_a_manifest_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\td\x7f\x9b") == "a\\x1b[31mb\nc\td\\x7f\\x9b"
    assert cell("two\nlines\x1b") == "two lines\\x1b"


def test_paths_are_as_one_would_type_them_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cell(tmp_path / "merged") == "merged"
    assert cell(Path("/elsewhere/merged")) == "/elsewhere/merged"
    assert local(f"{tmp_path}/a: not '{tmp_path}/b' ({tmp_path}/c)") == "a: not 'b' (c)"
    assert local(f"/mnt{tmp_path}/a") == f"/mnt{tmp_path}/a"


def test_a_table_is_aligned_with_numbers_to_the_right() -> None:
    rows = [["law", 5.25, 1000, None], ["news", 12.5, 20, "x"]]
    assert table(["domain", "bits_per_byte", "tokens", "note"], rows) == [
        "domain  bits per byte  tokens  note",
        "law             5.250   1,000  -",
        "news           12.500      20  x",
    ]


def test_a_line_of_progress() -> None:
    figures = progress_figures(9000, "tokens", {"loss": 3.2, "tokens_per_s": 5120.3, "note": "warm"})
    assert progress_line("training", figures, 0.45, 83) == (
        "training:  45 %  9,000 tokens  loss 3.200  5,120 tokens/s  note warm  1:23 left"
    )
    assert progress_line("copying", progress_figures(10, "bytes", {}), None, None) == "copying:  10 bytes"
