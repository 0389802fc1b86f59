"""Bills of materials: valid by the schema of the library, and true of the bundle."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from builders import World, forge_expert, make_expert, make_world

from flexctl.bundle import open_bundle, open_expert
from flexctl.bundle.codec import encode
from flexctl.bundle.manifest import PrivacyInfo
from flexctl.bundle.sbom import bill_of_materials
from flexctl.cli.app import main
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove

PRIVACY = PrivacyInfo(
    mechanism="dp-sgd",
    epsilon=8.0,
    delta=1e-5,
    unit="document",
    accountant="pld",
    noise_multiplier=1.1,
    sampling_rate=0.01,
    steps=10,
    max_grad_norm=1.0,
    adjacency="add or remove one",
    row_noise_multiplier=13.3,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Experts with every kind of license, one private, one made of another."""
    world = make_world(tmp_path_factory.mktemp("world"), ("code", "low"))
    root = world.root
    plain = make_expert(
        root / "plain/law.st", world.anchor, "law", license="cc-by-4.0", contact="law@x.org", label="Judgements"
    )
    forge_expert(root / "law.st", plain, privacy=encode(PRIVACY), parents=["sha256:" + "a" * 64])
    for name, license in (
        ("own", "our own terms"),
        ("two", "MIT or Apache-2.0"),
        ("none", None),
        ("ref", "LicenseRef-x"),
    ):
        make_expert(root / f"{name}.st", world.anchor, name, license=license, purposes=("research", "press"))
    files = (*world.files(), *(root / f"{name}.st" for name in ("law", "own", "two", "none", "ref")))
    merge(MergeConfig(experts=files, anchor=world.anchor.path, output=root / "merged"))
    remove(RemoveConfig(names=("own",), source=root / "merged", output=root / "less", tombstone=True))
    return world


@cache
def validator() -> Any:
    """Return the library's own check; its import takes seconds, which whoever only collects tests need not wait for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    return JsonStrictValidator(SchemaVersion.V1_6)


def bill(path: Path) -> dict[str, Any]:
    """Return a bundle's bill after the library's own check."""
    bundle = open_bundle(path)
    made = bill_of_materials(bundle)  # type: ignore[arg-type]
    error = validator().validate_str(json.dumps(made))
    assert error is None, error
    return made


def test_every_bundle_has_a_valid_bill(world: World) -> None:
    for path in (
        world.anchor.path,
        *world.files(),
        *world.root.glob("*.st"),
        world.root / "merged",
        world.root / "less",
    ):
        made = bill(path)
        assert made["metadata"]["component"]["version"] == open_bundle(path).digest
        assert made == bill(path)


def test_the_check_would_find_a_fault(world: World) -> None:
    made = bill_of_materials(open_expert(world.root / "law.st"))
    made["components"][0]["type"] = "expert"
    assert validator().validate_str(json.dumps(made)) is not None


def test_each_expert_has_digest_license_data_privacy_and_parents(world: World) -> None:
    made = bill(world.root / "merged")
    parts = {part["name"]: part for part in made["components"]}
    assert set(parts) == {"tiny-anchor", "code", "law", "low", "none", "own", "ref", "two"}
    law, expert = parts["law"], open_expert(world.root / "law.st")
    assert law["hashes"] == [{"alg": "SHA-256", "content": expert.digest.removeprefix("sha256:")}]
    assert [part["version"] for part in law["pedigree"]["ancestors"]] == [world.anchor.digest, "sha256:" + "a" * 64]
    (dataset,) = law["modelCard"]["modelParameters"]["datasets"]
    assert (dataset["name"], dataset["description"]) == ("Judgements", "3 documents, 100 tokens, 400 bytes")
    assert dataset["governance"]["owners"] == [{"contact": {"name": "law@x.org"}}]
    (guarantee,) = law["modelCard"]["considerations"]["ethicalConsiderations"]
    assert guarantee["mitigationStrategy"] == "epsilon 8.0, delta 1e-05, unit document"
    assert {"name": "flexctl:privacy.noise_multiplier", "value": "1.1"} in law["properties"]
    assert parts["own"]["modelCard"]["considerations"]["useCases"] == ["research", "press"]
    assert {name: part.get("licenses") for name, part in parts.items()} == {
        "tiny-anchor": [{"license": {"id": "Apache-2.0"}}],
        "code": [{"license": {"id": "Apache-2.0"}}],
        "law": [{"license": {"id": "CC-BY-4.0"}}],
        "low": [{"license": {"id": "Apache-2.0"}}],
        "none": None,
        "own": [{"license": {"name": "our own terms"}}],
        "ref": [{"license": {"name": "LicenseRef-x"}}],
        "two": [{"expression": "MIT OR Apache-2.0"}],
    }
    assert {"name": "flexctl:rank", "value": "2"} in parts["low"]["properties"]


def test_who_depends_on_whom(world: World) -> None:
    made = bill(world.root / "merged")
    depends = {item["ref"]: item.get("dependsOn", []) for item in made["dependencies"]}
    subject, anchor = made["metadata"]["component"]["bom-ref"], f"flexctl:{world.anchor.digest}"
    assert depends[subject] == [part["bom-ref"] for part in made["components"]]
    assert all(found == [anchor] for ref, found in depends.items() if ref not in (subject, anchor))


def test_what_was_removed_stands_in_the_bill_where_a_tombstone_does(world: World) -> None:
    properties = bill(world.root / "less")["metadata"]["component"]["properties"]
    digest = open_expert(world.root / "own.st").digest
    assert {"name": "flexctl:removed.own", "value": digest} in properties


def test_the_command_prints_it_and_nothing_else(
    world: World, capsys: pytest.CaptureFixture[str], in_empty_folder: Path
) -> None:
    assert in_empty_folder.is_dir()
    path = world.root / "merged"
    assert main(["inspect", str(path), "--sbom", "cyclonedx"]) == 0
    assert json.loads(capsys.readouterr().out) == bill(path)
    assert main(["inspect", str(path), "--sbom", "cyclonedx", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sbom"] == bill(path)
    assert main(["inspect", "hf://acme/merged", "--sbom", "cyclonedx"]) == 2
    assert "flexctl pull brings it" in capsys.readouterr().err
    assert main(["inspect", str(path), "--sbom", "spdx"]) == 2
    assert "one of cyclonedx" in capsys.readouterr().err


def test_a_guarantee_with_more_fields_is_told_in_full(world: World) -> None:
    expert = open_expert(world.root / "law.st")
    other = replace(expert, manifest=replace(expert.manifest, privacy=replace(PRIVACY, epsilon=1.5)))
    facts = bill_of_materials(other)["metadata"]["component"]["properties"]
    told = {
        fact["name"].removeprefix("flexctl:privacy."): fact["value"] for fact in facts if "privacy." in fact["name"]
    }
    assert told == {name: str(value) for name, value in encode(replace(PRIVACY, epsilon=1.5)).items()}
