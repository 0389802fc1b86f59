"""How measurements are shown."""

from __future__ import annotations


def show(name: str, value: str, against: str) -> None:
    """Print one row."""
    print(f"{name:<44} {value:>12}   {against}", flush=True)
