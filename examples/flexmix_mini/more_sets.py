"""Text sets from Debian's packages: manual pages in several languages, and manuals of programming languages.

    python examples/flexmix_mini/more_sets.py --flexmix DIR --output SETS

Fetches the packages (apt-get download, no root needed), unpacks them below SETS/packages and writes
SETS/<set>/train.jsonl and test.jsonl, one {"text"} a line, a document in ten for testing. With --flexmix, whose folder
holds a folder a set, those sets are linked beside them. Nothing of this text is part of flexctl.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_CHARACTERS = 6_000
SHORTEST_DOCUMENT = 400
TRAIN_BYTES, TEST_BYTES = 400_000, 60_000

ROFF_ESCAPES = (
    (re.compile(r"\\f(\[[^]]*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\*?(\[[^]]*\]|\(..)"), ""),
    (re.compile(r"\\[&/,|^c~]"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
)


def man_page(source: str) -> str:
    """Return a manual page's text from its first heading on, without macros."""
    lines = []
    _head, _, body = source.partition("\n.SH")
    for line in f".SH{body}".splitlines():
        if line.startswith(("'", ".\\")):
            continue
        if line.startswith("."):
            _macro, _, line = line.partition(" ")
            line = line.replace('"', "")
        for pattern, plain in ROFF_ESCAPES:
            line = pattern.sub(plain, line)
        lines.append(line.strip())
    return re.sub(r"\n{2,}", "\n\n", "\n".join(lines)).strip()


def html_page(source: str) -> str:
    """Return a page's text without its marks."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skipping = 0

        def handle_starttag(self, tag: str, _attributes: object) -> None:
            self.skipping += tag in ("script", "style", "head")

        def handle_endtag(self, tag: str) -> None:
            self.skipping -= tag in ("script", "style", "head")

        def handle_data(self, data: str) -> None:
            if not self.skipping:
                parts.append(data)

    Reader().feed(source)
    return re.sub(r"\n{2,}", "\n\n", "".join(parts)).strip()


def plain(source: str) -> str:
    return source.strip()


Kind = tuple[tuple[str, ...], str, Callable[[str], str], str]
"""Packages, files in them, how a file is read, and what stands between two documents of one file."""

SETS: dict[str, Kind] = {
    "spanish": (("manpages-es", "manpages-es-dev"), "usr/share/man/es/**/*.gz", man_page, ""),
    "polish": (("manpages-pl", "manpages-pl-dev"), "usr/share/man/pl/**/*.gz", man_page, ""),
    "japanese": (("manpages-ja",), "usr/share/man/ja/**/*.gz", man_page, ""),
    "german": (("manpages-de",), "usr/share/man/de/**/*.gz", man_page, ""),
    "french": (("manpages-fr",), "usr/share/man/fr/**/*.gz", man_page, ""),
    "russian": (("manpages-ru",), "usr/share/man/ru/**/*.gz", man_page, ""),
    "perl": (("perl-doc",), "usr/share/perl/**/*.pod", plain, ""),
    "tcl": (("tcl8.6-doc",), "usr/share/man/man3/*.gz", man_page, ""),
    "erlang": (("erlang-manpages",), "usr/share/man/man3/*.gz", man_page, ""),
    "node": (("nodejs-doc",), "usr/share/doc/nodejs/api/*.md.gz", plain, ""),
    "postgres": (("postgresql-doc-15",), "usr/share/doc/postgresql-doc-15/html/*.html", html_page, ""),
    "guile": (("guile-3.0-doc",), "usr/share/info/guile-3.0/guile.info-*.gz", plain, "\x1f\n"),
}


def documents(packages: Path, kind: Kind) -> Iterator[str]:
    """Yield a set's documents, shuffled by a hash of their text."""
    names, pattern, read, separator = kind
    found = set()
    for name in names:
        for path in sorted((packages / name).glob(pattern)):
            if path.is_file() and not path.is_symlink():
                raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                source = raw.decode("utf-8", errors="ignore")
                found.update(read(part) for part in (source.split(separator) if separator else [source]))
    for text in sorted(found, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(text) >= SHORTEST_DOCUMENT:
            yield text


def fetch(packages: Path, name: str) -> None:
    target = packages / name
    if not target.exists():
        packages.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "-qq", "download", name], cwd=packages, check=True)
        archive = next(packages.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", archive.name, target.name], cwd=packages, check=True)


def write(folder: Path, texts: Iterator[str]) -> None:
    """Write every tenth document for testing; long ones become several, all on one side."""
    folder.mkdir(parents=True, exist_ok=True)
    room = {"train": TRAIN_BYTES, "test": TEST_BYTES}
    with (folder / "train.jsonl").open("w") as train, (folder / "test.jsonl").open("w") as test:
        for number, text in enumerate(texts):
            part, out = ("test", test) if number % 10 == 0 else ("train", train)
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                piece = text[start : start + DOCUMENT_CHARACTERS]
                if room[part] > 0:
                    room[part] -= len(piece.encode())
                    out.write(json.dumps({"text": piece}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flexmix", type=Path)
    parser.add_argument("--output", type=Path, default=Path("sets"))
    asked = parser.parse_args()
    for name, kind in SETS.items():
        for package in kind[0]:
            fetch(asked.output / "packages", package)
        if not (asked.output / name).exists():
            write(asked.output / name, documents(asked.output / "packages", kind))
        sizes = [(asked.output / name / f"{part}.jsonl").stat().st_size for part in ("train", "test")]
        print(f"{name}: {sizes[0]:,} bytes to train on, {sizes[1]:,} to test", flush=True)
    for source in sorted(asked.flexmix.iterdir()) if asked.flexmix else ():
        if not (asked.output / source.name).exists():
            (asked.output / source.name).symlink_to(source.resolve())


if __name__ == "__main__":
    main()
