"""Records of what was removed: signed, true, checked against a model, and not to be forged."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import World, make_expert, make_tensors, make_world, read_directory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signers import cheap_keys, make_key, make_trust, refused_in_one_line

from flexctl.bundle import open_merged, store
from flexctl.cli.app import main
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.trust.records import read_record, record_path

DAY = datetime.date(2026, 3, 1)
ASKED: dict[str, Any] = {"tombstone": True, "reason": "withdrawn by its owner", "key": Path("hub.key")}


@pytest.fixture
def world(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A merged model of four experts, and a coordinator with a key."""
    cheap_keys(monkeypatch)
    world = make_world(in_empty_folder, ("code", "law", "low", "math"), dtype="BF16")
    _, entry = make_key("hub")
    make_trust(entry)
    merge(MergeConfig(experts=world.files()))
    return world


def found(path: str = "merged", record: str = "law.removed.json", **asked: Any) -> tuple[bool, str]:
    """Return what verify says of a record."""
    config = VerifyConfig(path=Path(path), record=Path(record), trust=Path("trust.toml"), **asked)
    (check,) = [check for check in verify(config).checks if check.name.startswith("record ")]
    return check.ok, check.detail


def test_a_record_says_what_went_and_is_true_of_what_is_left(world: World) -> None:
    before = open_merged(Path("merged")).digest
    result = remove(RemoveConfig(names=("law",), **ASKED), today=DAY)
    assert result.records == (Path("law.removed.json").absolute(),)
    record, _ = read_record(Path("law.removed.json"))
    assert (record.act, record.reason, record.date) == ("remove", "withdrawn by its owner", "2026-03-01")
    assert (record.before, record.after) == (before, result.digest)
    assert record.expert.digest == world.experts["law"].digest
    assert (len(record.tensors), len(record.rows), record.shared, record.replaced_by) == (6, 2, 0, None)
    assert record.check == "flexctl verify MODEL --absent law --record law.removed.json --trust TRUST.toml"
    ok, said = found()
    assert ok, said
    assert said.startswith("removed on 2026-03-01, signed by hub (trusted without end), because: 'withdrawn by")
    assert "this is the model that was left; none of the 6 tensors and 2 rows is inside" in said
    assert main(record.check.replace("MODEL", "merged").replace("TRUST", "trust").split()[1:]) == 0


@pytest.mark.usefixtures("world")
def test_the_record_lies_beside_the_model_whatever_way_it_was_named(
    monkeypatch: pytest.MonkeyPatch, in_empty_folder: Path
) -> None:
    (in_empty_folder / "link").symlink_to("merged")
    before = read_directory(Path("merged"))
    with monkeypatch.context() as inside:
        inside.chdir("merged")
        with pytest.raises(UsageError, match="merged: is the folder that you are in, and would be replaced"):
            remove(RemoveConfig(names=("law",), source=Path(), **ASKED | {"key": Path("../hub.key")}))
    assert read_directory(Path("merged")) == before
    assert not list(in_empty_folder.rglob("*.removed.json"))
    remove(RemoveConfig(names=("law",), source=Path("link"), overwrite=True, **ASKED))
    remove(RemoveConfig(names=("low",), source=Path("merged/../merged/."), overwrite=True, **ASKED))
    assert sorted(path.name for path in in_empty_folder.glob("*.removed.json")) == [
        "law.removed.json",
        "low.removed.json",
    ]
    monkeypatch.chdir("merged")
    assert record_path(Path(), "law") == in_empty_folder / "law.removed.json"


@pytest.mark.usefixtures("world")
def test_each_owner_gets_a_record_of_their_own() -> None:
    remove(RemoveConfig(names=("low", "law"), **ASKED))
    for name in ("law", "low"):
        text = base64.b64decode(json.loads(Path(f"{name}.removed.json").read_text())["payload"]).decode()
        assert ("law" in text, "low" in text) == (name == "law", name == "low")
        assert found(record=f"{name}.removed.json")[0]


def test_later_models_descend_from_the_one_that_was_left(world: World) -> None:
    remove(RemoveConfig(names=("law",), **ASKED))
    make_expert(Path("news.st"), world.anchor, "news")
    merge(MergeConfig(experts=(Path("merged"), Path("news.st")), output=Path("more")))
    remove(RemoveConfig(names=("code",), source=Path("more"), output=Path("less")))
    for path in ("more", "less"):
        ok, said = found(path)
        assert ok, said
        assert "descends from the one that was left" in said
    merge(MergeConfig(experts=world.files("code", "math"), output=Path("elsewhere")))
    ok, said = found("elsewhere")
    assert not ok
    assert "is neither the model that was left" in said


@pytest.mark.usefixtures("world")
def test_a_later_model_must_be_signed_and_the_one_that_was_left_need_not() -> None:
    """A tombstone is a line that anybody can write; the digest of the model that was left stands in the record."""
    ask = ["verify", "--record", "law.removed.json", "--trust", "trust.toml", "-q"]
    remove(RemoveConfig(names=("law",), **ASKED))
    assert main([*ask, "merged"]) == 0
    remove(RemoveConfig(names=("code",), source=Path("merged"), output=Path("less")))
    result = verify(VerifyConfig(path=Path("less"), record=Path("law.removed.json"), trust=Path("trust.toml")))
    assert [(check.name, check.detail) for check in result.checks if not check.ok] == [
        ("signed", "less/flexctl.sig: is missing: nobody signed this")
    ]
    assert main(["sign", "less", "--key", "hub.key", "-q"]) == 0
    assert main([*ask, "less"]) == 0
    stranger, _ = make_key("stranger")
    assert main(["sign", "less", "--key", str(stranger), "--overwrite", "-q"]) == 0
    assert main([*ask, "less"]) == 3


def fail_to_move(*_: object) -> None:
    raise FlexctlError("no")


@pytest.mark.usefixtures("world")
def test_no_record_of_a_removal_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "_exchange", fail_to_move)
        with pytest.raises(FlexctlError, match=r"^no$"):
            remove(RemoveConfig(names=("law",), **ASKED))
    assert not Path("law.removed.json").exists()
    remove(RemoveConfig(names=("law",), output=Path("rest"), **ASKED))
    first = Path("law.removed.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(store, "_exchange", fail_to_move)
        with pytest.raises(FlexctlError, match=r"^no$"):
            remove(RemoveConfig(names=("law", "code"), overwrite=True, **ASKED))
    assert Path("law.removed.json").read_bytes() == first
    assert not Path("code.removed.json").exists()


def test_what_came_back_is_found_under_whatever_name(world: World) -> None:
    shutil.copytree("merged", "with")
    remove(RemoveConfig(names=("law",), **ASKED))
    assert "is the very model that law was taken out of" in found("with")[1]
    merge(MergeConfig(experts=(Path("merged"), world.experts["law"].path), output=Path("again")))
    assert "is the very model that law was taken out of" in found("again")[1]
    merge(MergeConfig(experts=world.files("law", "code"), output=Path("again"), overwrite=True))
    assert "it has no tombstone of law" in found("again")[1]
    tensors = make_tensors(world.anchor, 99)
    stolen = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[stolen] = world.experts["law"].tensor(stolen)
    make_expert(Path("thief.st"), world.anchor, "thief", tensors=tensors)
    merge(MergeConfig(experts=(Path("merged"), Path("thief.st")), output=Path("thief")))
    ok, said = found("thief")
    assert (ok, "1 tensors of law are inside, sha256 " in said) == (False, True)
    tensors = make_tensors(world.anchor, 98) | {"router.weight": world.experts["law"].router()}
    make_expert(Path("rows.st"), world.anchor, "rows", tensors=tensors)
    merge(MergeConfig(experts=(Path("merged"), Path("rows.st")), output=Path("rows")))
    assert "2 router rows of law are inside, sha256 " in found("rows")[1]


def test_a_low_rank_experts_expanded_matrices_are_looked_for(world: World) -> None:
    remove(RemoveConfig(names=("low",), **ASKED))
    inside = {info.sha256 for info in open_merged(Path("merged")).manifest.tensors.values()}
    record, _ = read_record(Path("low.removed.json"))
    assert len(record.tensors) == 6
    assert not inside.intersection(record.tensors)
    merge(MergeConfig(experts=world.files("low"), output=Path("alone")))
    again = {info.sha256 for info in open_merged(Path("alone")).manifest.tensors.values()}
    assert set(record.tensors) <= again


def test_tensors_that_another_expert_has_too_are_said_and_not_promised(world: World) -> None:
    tensors = make_tensors(world.anchor, 5)
    shared = next(iter(tensors))
    tensors[shared] = world.experts["law"].tensor(shared)
    make_expert(Path("twin.st"), world.anchor, "twin", tensors=tensors)
    merge(MergeConfig(experts=(Path("merged"), Path("twin.st"))))
    remove(RemoveConfig(names=("law",), **ASKED))
    record, _ = read_record(Path("law.removed.json"))
    assert (len(record.tensors), record.shared) == (5, 1)
    assert found()[1].endswith("none of the 5 tensors and 2 rows is inside; 1 others have too")


def test_replace_leaves_the_same_kind_of_record(world: World) -> None:
    make_expert(Path("law.st"), world.anchor, "law", seed=7)
    old = world.experts["law"].digest
    result = replace(ReplaceConfig(name="law", expert=Path("law.st"), **ASKED), today=DAY)
    record, _ = read_record(result.records[0])
    assert (record.act, record.expert.digest, record.replaced_by) == ("replace", old, result.new_digest)
    assert [stone.digest for stone in open_merged(Path("merged")).manifest.removed] == [old]
    assert "law" in open_merged(Path("merged")).names
    for asked in ({}, {"absent": ("law",)}):
        ok, said = found(**asked)
        assert ok, said
        assert said.startswith("replaced on 2026-03-01")
    replace(ReplaceConfig(name="law", expert=world.experts["law"].path))
    assert found()[0] is False


def test_the_same_expert_takes_its_tombstone_away_and_a_newer_one_does_not(world: World) -> None:
    remove(RemoveConfig(names=("law",), tombstone=True))
    make_expert(Path("law.st"), world.anchor, "law", seed=7)
    merge(MergeConfig(experts=(Path("merged"), Path("law.st")), output=Path("newer")))
    assert len(open_merged(Path("newer")).manifest.removed) == 1
    merge(MergeConfig(experts=(Path("merged"), world.experts["law"].path), output=Path("same")))
    assert open_merged(Path("same")).manifest.removed == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"reason": "x"}, "reason: stands in a record, which a key signs"),
        ({"key": Path("hub.key"), "reason": "x"}, "key: signs a record, which needs a tombstone"),
        ({"key": Path("hub.key"), "tombstone": True}, "key: signs a record, which says why"),
        ({"key": Path("hub.key"), "tombstone": True, "reason": " "}, "key: signs a record, which says why"),
        (ASKED | {"key": Path("no.key")}, "no.key: no such file"),
        (ASKED | {"key": Path("hub.key.pub")}, "hub.key.pub: is a public key"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_record_that_cannot_be_written_stops_the_removal(
    world: World, asked: dict[str, Any], says: str, dry_run: bool
) -> None:
    before = read_directory(Path("merged"))
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        remove(RemoveConfig(names=("law",), dry_run=dry_run, **asked))
    with pytest.raises(UsageError, match=says.replace(".", r"\.")):
        replace(ReplaceConfig(name="law", expert=_newer(world), dry_run=dry_run, **asked))
    assert read_directory(Path("merged")) == before


def _newer(world: World) -> Path:
    make_expert(Path("law.st"), world.anchor, "law", seed=7, overwrite=True)
    return Path("law.st")


@pytest.mark.usefixtures("world")
def test_a_record_that_exists_is_not_replaced_unasked() -> None:
    Path("law.removed.json").write_text("mine")
    before = read_directory(Path("merged"))
    with pytest.raises(UsageError, match=r"law\.removed\.json exists already"):
        remove(RemoveConfig(names=("law",), **ASKED))
    assert (Path("law.removed.json").read_text(), read_directory(Path("merged"))) == ("mine", before)
    assert remove(RemoveConfig(names=("law",), dry_run=True, overwrite=True, **ASKED)).records == ()
    assert Path("law.removed.json").read_text() == "mine"


@pytest.mark.usefixtures("world")
def test_whose_record_it_is() -> None:
    remove(RemoveConfig(names=("law",), **ASKED), today=DAY)
    good = Path("law.removed.json").read_bytes()
    entry = Path("trust.toml").read_text()
    # The day that counts is the record's: a key that has run out since still vouches for what it signed in time.
    make_trust(f"{entry}valid_until = 2026-03-01\n")
    assert found()[0]
    make_trust(f"{entry}valid_until = 2026-02-28\n")
    assert found() == (False, f"{Path('law.removed.json')}: the key of hub was valid until 2026-02-28")
    make_trust(f"{entry}revoked = 2026-02-28\n")
    assert "is revoked since" in found()[1]
    _, other = make_key("other")
    make_trust(other)
    assert "no key of trust.toml signed it" in found()[1]
    make_trust(entry)
    record = json.loads(good)
    told = json.loads(base64.b64decode(record["payload"]))
    told["predicate"]["reason"] = "never was inside"
    record["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
    Path("law.removed.json").write_text(json.dumps(record))
    assert found() == (False, f"{Path('law.removed.json')}: the signature with the key of hub is forged")


def test_questions_that_do_not_fit(world: World) -> None:
    remove(RemoveConfig(names=("law",), **ASKED))
    record, trust = Path("law.removed.json"), Path("trust.toml")
    with pytest.raises(UsageError, match="record: is signed: say whose keys count"):
        verify(VerifyConfig(path=Path("merged"), record=record))
    with pytest.raises(UsageError, match=r"record: law\.removed\.json is about law"):
        verify(VerifyConfig(path=Path("merged"), absent=("code",), record=record, trust=trust))
    with pytest.raises(UsageError, match=r"record: none: no such file"):
        verify(VerifyConfig(path=Path("merged"), record=Path("none"), trust=trust))
    with pytest.raises(UsageError, match=r"^/\S*code\.st is no merged model but an expert"):
        verify(VerifyConfig(path=world.experts["code"].path, record=record, trust=trust))
    assert main(["sign", "merged", "--key", "hub.key", "-q"]) == 0
    with pytest.raises(BundleError, match="expected a removal record"):
        verify(VerifyConfig(path=Path("merged"), record=Path("merged/flexctl.sig"), trust=trust))


@pytest.mark.usefixtures("world")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_record_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    if not Path("law.removed.json").exists():
        remove(RemoveConfig(names=("law",), **ASKED))
    record = json.loads(Path("law.removed.json").read_text())
    told = json.loads(base64.b64decode(record["payload"]))
    field = data.draw(st.sampled_from([*told["predicate"], "more"]))
    value = data.draw(
        st.none()
        | st.integers()
        | st.text(max_size=8)
        | st.lists(st.text(max_size=3), max_size=2)
        | st.just({"name": 1})
    )
    told["predicate"][field] = value
    record["payload"] = base64.b64encode(json.dumps(told).encode()).decode()
    Path("fuzz.json").write_text(json.dumps(record))
    try:
        read_record(Path("fuzz.json"))
    except BundleError as error:
        refused_in_one_line(error)
