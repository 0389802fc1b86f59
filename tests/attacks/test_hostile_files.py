"""Named hostile files, one a claim. Each says what it tries; each is refused in one line, soon, in little memory."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zstandard
from builders import make_index, make_world

from flexctl import workspace
from flexctl.bundle.index import open_index
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.proxy import open_proxy
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import FlexctlError
from flexctl.evaluation.records import read_results
from flexctl.evaluation.tasks.files import read_task_file
from flexctl.runtime import peak_rss_bytes
from flexctl.text.documents import read_documents

SECONDS, MEMORY = 20, 300_000_000
BOMB = 1_000_000_000


@dataclass(frozen=True)
class Hostile:
    """A hostile file: what it tries, how it is made and read in a folder, and what it is refused with."""

    name: str
    tries: str
    read: Callable[[Path], object]
    said: str


def zeros(count: int) -> bytes:
    """Return ``count`` zeros packed by gzip, in a moment."""
    block = gzip.compress(bytes(50_000_000), 9)
    return block * (count // 50_000_000)


def text(folder: Path, name: str, data: bytes) -> object:
    (folder / name).write_bytes(data)
    return sum(map(len, read_documents([folder / name])))


def zstandard_bomb(folder: Path) -> object:
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    block = bytes(10_000_000)
    data = b"".join(packer.compress(block) for _ in range(BOMB // len(block))) + packer.flush()
    return text(folder, "bomb.jsonl.zst", data)


def expert(folder: Path, change: Callable[[bytearray], object]) -> object:
    file = make_world(folder, ("law",)).files("law")[0]
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)
    return open_bundle(file)


def set_length(data: bytearray) -> None:
    data[:8] = (2**63).to_bytes(8, "little")


def rename(data: bytearray) -> None:
    at = data.index(rb"\"name\":\"law\"")
    data[at : at + 16] = rb"\"name\":\"../\""


def index(folder: Path, change: Callable[[Path], object]) -> object:
    path = make_index(folder, ["the court held that", "so it is"]).path
    change(path)
    return open_index(path).count(b"court")


def link_text(path: Path) -> None:
    secret = path.parent / "secret"
    secret.write_bytes((path / "0000.text").read_bytes())
    (path / "0000.text").unlink()
    (path / "0000.text").symlink_to(secret)


def point_outside(path: Path) -> None:
    size = (path / "0000.text").stat().st_size
    np.full(size, -5, "<i4").tofile(path / "0000.suffixes")


def written(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


HOSTILE = (
    Hostile(
        "gzip-bomb",
        "fills the memory from one megabyte",
        lambda folder: text(folder, "bomb.txt.gz", zeros(BOMB)),
        "unpacks to more than 100 times its size",
    ),
    Hostile(
        "zstandard-bomb", "the same from a few kilobytes", zstandard_bomb, "unpacks to more than 100 times its size"
    ),
    Hostile(
        "nested-record",
        "overflows the stack of the JSON reader",
        lambda folder: text(folder, "deep.jsonl", b'{"text":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "line 1: not JSON",
    ),
    Hostile(
        "long-number",
        "takes quadratic time to read a number",
        lambda folder: text(folder, "long.jsonl", b'{"text":' + b"9" * 2_000_000 + b"}"),
        "line 1: not JSON",
    ),
    Hostile(
        "half-a-surrogate",
        "gives text that cannot be written out again",
        lambda folder: text(folder, "half.jsonl", b'{"text":"\\ud800"}'),
        "half a surrogate pair",
    ),
    Hostile(
        "endless-header",
        "has a header of 9 exabytes read",
        lambda folder: expert(folder, set_length),
        "header",
    ),
    Hostile(
        "name-that-is-a-path",
        "has a merge write outside of its folder",
        lambda folder: expert(folder, rename),
        "name is '../'",
    ),
    Hostile(
        "index-link",
        "has an index answer from a file outside of it",
        lambda folder: index(folder, link_text),
        "0000.text: is no regular file",
    ),
    Hostile(
        "index-place-outside",
        "has a suffix array name bytes before the text",
        lambda folder: index(folder, point_outside),
        "names byte -5 of a text of",
    ),
    Hostile(
        "proxy-twice",
        "says two things under one name",
        lambda folder: open_proxy(written(folder, "p.json", b'{"kind":"proxy","kind":"expert"}')),
        "stands twice in one JSON object",
    ),
    Hostile(
        "settings-nested",
        "overflows the stack of the TOML reader",
        lambda folder: workspace.find(written(folder, "flexctl.toml", b"a = " + b"[" * 100_000).parent),
        "not valid TOML",
    ),
    Hostile(
        "settings-long-number",
        "has a number of 5,000 digits, which the TOML reader's own error does not cover",
        lambda folder: workspace.find(written(folder, "flexctl.toml", b"a = " + b"9" * 5000).parent),
        "not valid TOML",
    ),
    Hostile(
        "settings-of-another-user",
        "names the home of a user that there is not",
        lambda folder: workspace.find(
            written(folder, "flexctl.toml", b"[workspace]\nanchor = '~no such user/a'").parent
        ),
        "there is no such user",
    ),
    Hostile(
        "results-not-a-number",
        "puts NaN into a page's figures",
        lambda folder: read_results(written(folder, "r.json", b'{"digest": NaN}')),
        "holds NaN, which is not JSON",
    ),
    Hostile(
        "task-of-lists",
        "has an answer that is no text",
        lambda folder: read_task_file(written(folder, "t.jsonl", b'{"question":"a","choices":[["b"],1],"answer":0}')),
        "choices",
    ),
)


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_it_is_refused(hostile: Hostile, tmp_path: Path) -> None:
    before, started = peak_rss_bytes(), time.monotonic()
    with pytest.raises(FlexctlError) as caught:
        hostile.read(tmp_path)
    assert hostile.said in caught.value.message
    assert "\n" not in caught.value.message
    assert time.monotonic() - started < SECONDS
    assert peak_rss_bytes() - before < MEMORY


def test_text_that_packs_well_is_read(tmp_path: Path) -> None:
    """A page of one sentence packs a hundredfold and is no bomb; nor is anything of some megabytes."""
    line = json.dumps({"text": "The same sentence again. " * 400}) + "\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode() * 2000))
    assert sum(1 for _ in read_documents([tmp_path / "a.jsonl.gz"])) == 2000


def test_verify_follows_no_link_out_of_an_index(tmp_path: Path) -> None:
    path = make_index(tmp_path, ["the court held that"]).path
    link_text(path)
    found = verify(VerifyConfig(path=path))
    assert not found.ok
    assert "is no regular file" in found.checks[0].detail
