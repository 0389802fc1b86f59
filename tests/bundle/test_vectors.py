"""flexctl's reader says of every vector what vectors.json says that a reader must."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from builders import read_directory
from make_vectors import FOLDER, write_vectors

from flexctl.bundle import expert, open_bundle
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError

VECTORS: list[dict[str, Any]] = json.loads((FOLDER / "vectors.json").read_text(encoding="utf-8"))["vectors"]

pytestmark = pytest.mark.usefixtures("in_empty_folder")  # no workspace around them


def those(says: str) -> Any:
    return pytest.mark.parametrize("vector", [v for v in VECTORS if v["says"] == says], ids=lambda v: v["path"])


@those("ok")
def test_what_is_right_is_taken(vector: dict[str, Any]) -> None:
    result = verify(VerifyConfig(path=FOLDER / vector["path"], anchor=FOLDER / "anchor"))
    assert result.ok, result.checks


@those("refused when opened")
def test_what_cannot_be_opened_says_why(vector: dict[str, Any]) -> None:
    with pytest.raises(BundleError) as caught:
        open_bundle(FOLDER / vector["path"])
    assert vector["names"] in caught.value.message.replace(str(FOLDER), "")
    assert vector["path"].split("/")[1] in caught.value.message
    assert not verify(VerifyConfig(path=FOLDER / vector["path"])).ok


@those("refused when verified")
def test_what_opens_and_does_not_hold_fails_verification(vector: dict[str, Any]) -> None:
    open_bundle(FOLDER / vector["path"])
    failed = [check.detail for check in verify(VerifyConfig(path=FOLDER / vector["path"])).checks if not check.ok]
    assert any(vector["names"] in detail.replace(str(FOLDER), "") for detail in failed), failed


@those("refused when merged")
def test_what_does_not_fit_is_not_merged(vector: dict[str, Any], in_empty_folder: Path) -> None:
    open_bundle(FOLDER / vector["path"])
    experts = tuple(FOLDER / path for path in (vector["path"], *vector.get("beside", ())))
    with pytest.raises(BundleError) as caught:
        merge(MergeConfig(experts=experts, anchor=FOLDER / "anchor", output=in_empty_folder / "merged"))
    assert vector["names"] in caught.value.message.replace(str(FOLDER), "")
    assert not any(in_empty_folder.iterdir())


@pytest.mark.parametrize("vector", [v for v in VECTORS if "merge_of" in v], ids=lambda v: v["path"])
def test_a_merge_gives_the_bytes_of_the_vector(vector: dict[str, Any], in_empty_folder: Path) -> None:
    for number, experts in enumerate(itertools.permutations(vector["merge_of"])):
        output = in_empty_folder / str(number)
        paths = tuple(FOLDER / path for path in experts)
        merge(MergeConfig(experts=paths, anchor=FOLDER / "anchor", output=output))
        (output / "run.json").unlink(missing_ok=True)
        assert read_directory(output) == read_directory(FOLDER / vector["path"])


def test_every_file_there_is_a_vector_or_part_of_one() -> None:
    known = {FOLDER / vector["path"] for vector in VECTORS} | {FOLDER / "vectors.json"}
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert [path for path in files if not known & {path, *path.parents}] == []


def test_the_vectors_are_what_the_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert, "software_versions", expert.software_versions)  # puts back what the script sets
    write_vectors(tmp_path)
    assert read_directory(tmp_path) == read_directory(FOLDER)
