"""Indexes that somebody changed: refused by name, and verify says what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexctl.bundle.codec import canonical_json, digest_of_rest
from flexctl.bundle.index import _read_manifest, open_index
from flexctl.engine.inspect import InspectConfig, inspect
from flexctl.engine.push import PushConfig, push
from flexctl.engine.trace_index import TraceIndexConfig, trace_index
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, UsageError


@pytest.fixture
def index(tmp_path: Path) -> Path:
    (tmp_path / "law.jsonl").write_text('{"text": "the court held that"}\n{"text": "so it is"}\n')
    trace_index(TraceIndexConfig(data=(tmp_path / "law.jsonl",), output=tmp_path / "law.index"))
    return tmp_path / "law.index"


def forge(index: Path, **changes: Any) -> None:
    """Change fields of the manifest; the digest fits unless it is among them."""
    file = index / "flexctl.json"
    manifest = {**json.loads(file.read_bytes()), **changes}
    file.write_bytes(canonical_json(manifest))
    if "digest" not in changes:
        try:
            manifest["digest"] = digest_of_rest(_read_manifest(file))
        except BundleError as error:
            if "digest" not in error.message:
                return
            manifest["digest"] = _digest_of(manifest)
        file.write_bytes(canonical_json(manifest))


def _digest_of(manifest: dict[str, Any]) -> str:
    import hashlib

    content = {name: value for name, value in manifest.items() if name != "digest"}
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def failed(index: Path) -> dict[str, str]:
    found = verify(VerifyConfig(path=index))
    assert found.ok == all(check.ok for check in found.checks)
    return {check.name: check.detail for check in found.checks if not check.ok}


def test_an_index_verifies(index: Path) -> None:
    assert failed(index) == {}
    names = [check.name for check in verify(VerifyConfig(path=index)).checks]
    assert names == ["structure", "files", "nothing else", "private"]


@pytest.mark.parametrize("name", ["0000.text", "0000.suffixes", "0000.documents", "sources.json"])
def test_verify_names_a_file_that_was_changed(index: Path, name: str) -> None:
    data = bytearray((index / name).read_bytes())
    data[-3] ^= 1
    (index / name).write_bytes(data)
    found = failed(index)
    assert name in next(iter(found.values()))


def test_verify_names_what_is_not_private_and_what_does_not_belong(index: Path) -> None:
    (index / "0000.text").chmod(0o644)
    (index / "notes.txt").touch(0o600)
    found = failed(index)
    assert set(found) == {"nothing else", "private"}
    assert "0000.text: others may read it" in found["private"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "anchor"}, "is no index"),
        ({"schema_version": 2}, "schema_version is 2"),
        ({"name": "../law"}, "name is"),
        ({"shards": 2}, "files do not fit 2 shards"),
        ({"shards": 0}, "shards is 0"),
        ({"shards": 10**12}, "shards is 1000000000000"),
        ({"documents": 3}, "documents is 3"),
        ({"files": {"../x": "0"}}, "names the file"),
        ({"digest": "sha256:0"}, "its content has another"),
        ({"more": 1}, "no field"),
    ],
)
def test_manifests_that_are_refused(index: Path, changes: dict[str, Any], said: str) -> None:
    forge(index, **changes)
    with pytest.raises(BundleError, match=said):
        open_index(index)


def test_files_whose_sizes_do_not_fit(index: Path) -> None:
    (index / "0000.suffixes").write_bytes(b"1234")
    with pytest.raises(BundleError, match=r"0000.suffixes: has 4 bytes; expected 4 for each of 0000.text"):
        open_index(index)


def test_places_outside_of_the_text(index: Path) -> None:
    count = len((index / "0000.text").read_bytes())
    np.full(count, 10**6, dtype="<i4").tofile(index / "0000.suffixes")
    with pytest.raises(BundleError, match="names byte 1000000 of a text of"):
        open_index(index).count(b"court")


@pytest.mark.parametrize(
    "rows", [[[5, 0, 1], [20, 0, 2]], [[0, 0, 1], [0, 0, 2]], [[0, 0, 1], [20, 7, 2]], [[0, -1, 1]]]
)
def test_documents_that_cannot_be(index: Path, rows: list[list[int]]) -> None:
    np.array(rows, dtype="<i8").tofile(index / "0000.documents")
    with pytest.raises(BundleError, match=r"documents"):
        open_index(index)


def test_no_other_command_takes_an_index(index: Path) -> None:
    with pytest.raises(UsageError, match="which stays with its owner"):
        push(PushConfig(path=index, repository="acme/law"))
    with pytest.raises(UsageError, match="which stays with its owner"):
        inspect(InspectConfig(path=index))
    with pytest.raises(UsageError, match="is no merged model but an index"):
        verify(VerifyConfig(path=index, absent=("law",)))
