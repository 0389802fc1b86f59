"""Text that any Python installation carries, and arithmetic made up on the spot: what the demo trains on."""

from __future__ import annotations

import inspect
import json
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

__all__ = ["DOMAINS", "write_domain"]

_MOST_CHARACTERS = 8_000
_LICENSE_NAMES = ("license", "licence", "copying", "notice")


def prose() -> Iterator[str]:
    """Yield the language reference that pydoc keeps, and what installed packages say about themselves."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for package in _packages():
        description = package.metadata.get_payload()  # type: ignore[attr-defined]
        if isinstance(description, str):
            yield description


def code() -> Iterator[str]:
    """Yield the modules of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")


def licenses() -> Iterator[str]:
    """Yield the licence files of Python and of installed packages, each text once."""
    yield inspect.cleandoc(_python_license())
    for package in _packages():
        for file in package.files or ():
            if any(name in file.name.lower() for name in _LICENSE_NAMES) and file.suffix != ".py":
                path = Path(str(file.locate()))
                if path.is_file():
                    yield path.read_text(encoding="utf-8", errors="ignore")


def arithmetic() -> Iterator[str]:
    """Yield sums, products and small word problems with their answers, from a fixed seed."""
    chance = random.Random(0)
    for _ in range(600):
        yield "\n".join(_exercise(chance) for _ in range(12))


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "prose": prose,
    "code": code,
    "licenses": licenses,
    "arithmetic": arithmetic,
}
"""Domain -> its documents. The first is the public one."""


def write_domain(folder: Path, documents: Iterable[str], max_bytes: int) -> tuple[Path, Path]:
    """Write documents as train.jsonl and test.jsonl in ``folder``; every tenth goes to test.

    Long documents are cut into parts first, and a text that comes twice is written once.

    Args:
        folder: Made when missing.
        documents: Texts.
        max_bytes: Stop after this many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    written = 0
    with train.open("w", encoding="utf-8") as for_training, test.open("w", encoding="utf-8") as for_test:
        for number, text in enumerate(_parts(documents)):
            line = json.dumps({"text": text}) + "\n"
            (for_test if number % 10 == 9 else for_training).write(line)
            written += len(line)
            if written >= max_bytes:
                break
    return train, test


def _parts(documents: Iterable[str]) -> Iterator[str]:
    seen = set()
    for document in documents:
        for start in range(0, len(document), _MOST_CHARACTERS):
            part = document[start : start + _MOST_CHARACTERS].strip()
            if len(part) > 200 and part not in seen:
                seen.add(part)
                yield part


def _packages() -> list[metadata.Distribution]:
    return sorted(metadata.distributions(), key=lambda package: package.metadata["Name"] or "")


def _python_license() -> str:
    library = Path(sysconfig.get_path("stdlib"))
    for path in (library / "LICENSE.txt", library.parent.parent / "LICENSE.txt"):
        if path.is_file():
            return path.read_text(encoding="utf-8", errors="ignore")
    return ""


def _exercise(chance: random.Random) -> str:
    a, b = chance.randint(2, 99), chance.randint(2, 99)
    name = chance.choice(("Ada", "Emmy", "Grace", "Sofia", "Carl", "Alan"))
    thing = chance.choice(("apples", "books", "coins", "maps", "pens", "stones"))
    made = (
        f"Question: what is {a} + {b}? Answer: {a + b}",
        f"Question: what is {a} * {b}? Answer: {a * b}",
        f"Question: what is {a + b} - {a}? Answer: {b}",
        f"Question: {name} has {a} {thing} and gets {b} more. How many {thing} are there? Answer: {a + b}",
        f"Question: {name} has {a + b} {thing} and gives {a} away. How many {thing} are left? Answer: {b}",
    )
    return chance.choice(made)
