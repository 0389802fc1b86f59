"""Manifests: they come back as they were, hostile ones are refused, and those of version 1 are read for good."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.bundle.codec import canonical_json
from flexctl.bundle.manifest import (
    AnchorRef,
    Architecture,
    DataInfo,
    ExpertManifest,
    PrivacyInfo,
    RouterInfo,
    TensorInfo,
    digest_of,
    has_expired,
    write_manifest,
)
from flexctl.bundle.validation import read_manifest
from flexctl.errors import BundleError

FIXTURES = Path(__file__).parent.parent / "fixtures/schema-1"

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
COUNT = st.none() | st.integers(0)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SHA = st.binary(min_size=32, max_size=32).map(bytes.hex)
TENSORS = st.dictionaries(
    TEXT,
    st.builds(TensorInfo, st.sampled_from(["F32", "BF16"]), st.lists(st.integers(0, 9)).map(tuple), SHA),
    max_size=3,
)


@st.composite
def experts(draw: st.DrawFn) -> ExpertManifest:
    tensors = draw(TENSORS)
    privacy = st.builds(
        PrivacyInfo,
        mechanism=TEXT,
        epsilon=FLOATS,
        delta=FLOATS,
        unit=TEXT,
        accountant=TEXT,
        noise_multiplier=FLOATS,
        sampling_rate=FLOATS,
        steps=st.integers(),
        max_grad_norm=FLOATS,
    )
    return ExpertManifest(
        name=draw(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,62}", fullmatch=True).filter(lambda name: name != "public")),
        digest=digest_of(tensors),
        anchor=AnchorRef(digest="sha256:" + draw(SHA), model_type=draw(TEXT), name="tiny"),
        architecture=Architecture(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, vocab_size=32, dtype="BF16"
        ),
        data=DataInfo(
            documents=draw(COUNT),
            tokens=draw(COUNT),
            bytes=draw(COUNT),
            label=draw(st.none() | TEXT),
            license=draw(st.none() | TEXT),
            purposes=tuple(draw(st.lists(TEXT, max_size=2))),
            expires=draw(st.none() | st.dates().map(str)),
            contact=draw(st.none() | TEXT),
        ),
        training=draw(st.dictionaries(TEXT, st.integers() | FLOATS | TEXT | st.lists(FLOATS, max_size=2), max_size=3)),
        router=RouterInfo(
            kind=draw(TEXT),
            samples=3,
            encoder=draw(st.none() | TEXT),
            trained=True,
            bias=(-1.5, 0),
            own_covariance=draw(st.none() | st.floats(0, 0.99)),
        ),
        privacy=draw(st.none() | privacy),
        rank=draw(st.none() | st.integers(1)),
        parents=tuple("sha256:" + sha for sha in draw(st.lists(SHA, max_size=2))),
        software=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
        tensors=tensors,
    )


@given(experts())
def test_reading_gives_back_what_was_written(manifest: ExpertManifest) -> None:
    data = write_manifest(manifest)
    assert read_manifest(data, "x") == manifest
    assert write_manifest(read_manifest(data, "x")) == data


KINDS = ("anchor", "expert", "expert-low-rank", "merged", "merged-with-tombstone", "router")


@pytest.mark.parametrize("name", KINDS)
def test_manifests_of_schema_version_1_are_read_for_good(name: str) -> None:
    data = (FIXTURES / f"{name}.json").read_bytes()
    manifest = read_manifest(data, name)
    assert write_manifest(manifest) == data
    assert manifest.digest == json.loads((FIXTURES / "digests.json").read_text())[name]


def changed(fixture: str, changes: dict[str, Any]) -> bytes:
    """A fixture with other fields (dotted by two underscores) and the digest that its tensors and files then have."""
    manifest = json.loads((FIXTURES / f"{fixture}.json").read_bytes())
    for field, value in changes.items():
        *parents, last = field.split("__")
        place = manifest
        for parent in parents:
            place = place[int(parent) if isinstance(place, list) else parent]
        place[last] = value
    if "digest" not in changes:
        content = {key: manifest[key] for key in ("files", "tensors") if isinstance(manifest.get(key), dict)}
        manifest["digest"] = "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json(manifest)


FIRST = "layers.0.mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("name", "changes", "field"),
    [
        ("expert", {"schema_version": 2}, "schema_version is 2; this flexctl reads 1"),
        ("expert", {"schema_version": True}, "schema_version is True"),
        ("expert", {"schema_version": 1.0}, "schema_version is 1.0"),
        ("expert", {"kind": "tower"}, "kind is 'tower'; expected one of"),
        ("expert", {"kind": ["expert"]}, "kind is"),
        ("expert", {"kind": "anchor"}, "is missing"),
        ("expert", {"name": "public"}, "name is 'public', which is reserved"),
        ("expert", {"name": "../x"}, "name is '../x'"),
        ("expert", {"name": "Code"}, "name is 'Code'"),
        ("expert", {"name": 3}, "name is 3; expected text"),
        ("expert", {"extra": 1}, "'extra' is no field"),
        ("expert", {"digest": "sha256:" + "0" * 64}, "digest is 'sha256:0000"),
        ("expert", {"anchor__digest": "md5:0"}, "anchor.digest is 'md5:0'"),
        ("expert", {"anchor__name": "a/b"}, "anchor.name is 'a/b'"),
        ("expert", {"architecture__hidden_size": 0}, "architecture.hidden_size is 0"),
        ("expert", {"architecture__num_hidden_layers": 10_000}, "architecture.num_hidden_layers is 10000"),
        ("expert", {"data__expires": "2024-02-30"}, "data.expires is '2024-02-30'; expected a date"),
        ("expert", {"data__expires": "20240230"}, "data.expires is '20240230'"),
        ("expert", {"data__license": 7}, "data.license is 7; expected text"),
        ("expert", {"data__tokens": 1.5}, "data.tokens is 1.5; expected a whole number"),
        ("expert", {"rank": 0}, "rank is 0"),
        ("expert", {"router__bias": [0.0]}, "router.bias has 1 entries"),
        ("expert", {"router__own_covariance": 1.0}, r"router\.own_covariance is 1\.0; expected from 0 to below 1"),
        ("router", {"router__own_covariance": -0.1}, r"router\.own_covariance is -0\.1"),
        ("expert", {"parents": ["x"]}, "parents.0 is 'x'"),
        ("expert", {"privacy": {}}, "privacy.mechanism is missing"),
        ("expert", {f"tensors__{FIRST}__sha256": "0" * 63}, "sha256 is '000"),
        ("expert", {f"tensors__{FIRST}__dtype": "F31"}, "dtype is 'F31'"),
        ("expert", {f"tensors__{FIRST}__shape": [-1]}, r"shape is \(-1,\)"),
        ("anchor", {"name": "a b"}, "name is 'a b'"),
        ("anchor", {"files": {"../config.json": "0" * 64}}, "files names the file '../config.json'"),
        ("anchor", {"files": {"/etc/passwd": "0" * 64}}, "files names the file '/etc/passwd'"),
        ("anchor", {"files": {"a": "0"}}, "files.a is '0'"),
        ("merged", {"num_experts_per_tok_requested": 0}, "num_experts_per_tok_requested is 0"),
        ("merged", {"experts__0__name": "law"}, "expected public first"),
        ("merged", {"experts__1__name": "zebra"}, "expected public first, then each once, by name"),
        ("merged", {"experts__1__name": "../a"}, "name is '../a'"),
        ("merged", {"experts__1__index": 2}, "experts.1.index is 2; expected 1"),
        ("merged", {"experts__1__digest": "x"}, "experts.1.digest is 'x'"),
        ("merged", {"experts__1__manifest_sha256": "x"}, "experts.1.manifest_sha256 is 'x'"),
        ("merged", {"experts__1__expires": "soon"}, "experts.1.expires is 'soon'"),
        ("merged", {"experts": []}, "expected public first"),
        ("merged-with-tombstone", {"removed__0__name": ".."}, "removed.0.name is '..'"),
        ("router", {"name": "public"}, "reserved"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_line_with_its_field(name: str, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleError, match=field) as caught:
        read_manifest(changed(name, changes), "some/file")
    assert caught.value.message.startswith("some/file: ")
    assert "\n" not in caught.value.message


def test_a_manifest_must_be_canonical() -> None:
    value = json.loads((FIXTURES / "expert.json").read_bytes())
    with pytest.raises(BundleError, match="not canonical JSON"):
        read_manifest(json.dumps(value).encode(), "f")
    with pytest.raises(BundleError, match="the manifest is"):
        read_manifest(b"[]", "f")


def test_rights_last_through_their_last_day() -> None:
    day = datetime.date(2026, 3, 1)
    assert not has_expired("2026-03-01", day)
    assert has_expired("2026-02-28", day)
    assert not has_expired(None, day)
