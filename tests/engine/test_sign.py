"""sign, verify --trust, merge --require-signed: who made what, and what no forger gets through."""

from __future__ import annotations

import base64
import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders import World, make_expert, make_world, read_directory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signers import cheap_keys, make_key, make_trust, refused_in_one_line

from flexctl.bundle import RouterInfo, open_bundle, open_merged, write_router_file
from flexctl.bundle.signatures import parse_envelope, signature_path, signed_statement
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.engine.sign import SignConfig, sign
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, UsageError


@pytest.fixture
def world(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    cheap_keys(monkeypatch)
    return make_world(in_empty_folder, ("code", "law", "low"))


@pytest.fixture
def trust(world: World) -> Path:
    """Keys of a coordinator and of two owners, each expert signed by one."""
    entries = []
    for name in ("hub", "acme", "bank"):
        entries.append(make_key(name)[1])
    for name, who in (("law", "acme"), ("low", "acme"), ("code", "bank")):
        sign(SignConfig(path=world.experts[name].path, key=Path(f"{who}.key")))
    return make_trust(*entries)


def checks(path: Path, trust: Path, **settings: Any) -> dict[str, tuple[bool, str]]:
    result = verify(VerifyConfig(path=path, trust=trust), **settings)
    assert result.ok == all(check.ok for check in result.checks)
    assert all("\n" not in check.detail for check in result.checks)
    return {check.name: (check.ok, check.detail) for check in result.checks}


def merged(world: World, *names: str, output: str = "merged", **settings: Any) -> Path:
    return merge(MergeConfig(experts=world.files(*names), output=Path(output), **settings)).path


def test_every_kind_of_bundle_is_signed_and_verified(world: World, trust: Path) -> None:
    info = RouterInfo(kind="hidden", samples=1, encoder=None, trained=False, bias=(0.0, -1.0))
    rows = write_router_file(
        Path("rows.st"), anchor=world.anchor, name="x", rows=world.experts["law"].router(), router=info, overwrite=False
    )
    for path in (world.anchor.path, world.experts["law"].path, rows.path, merged(world)):
        made = sign(SignConfig(path=path, key=Path("hub.key"), overwrite=True))
        assert made.signature == (path / "flexctl.sig" if path.is_dir() else Path(f"{path}.sig"))
        found = checks(path, trust)
        assert found["signature"] == (True, "signs this very bundle")
        assert found["signed"] == (True, "by hub (trusted without end)")
        assert all(ok for ok, _ in found.values()), found


def test_a_statement_names_digest_manifest_card_and_license(world: World) -> None:
    model = open_merged(merged(world))
    statement = json.loads(signed_statement(model.manifest))
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert set(subjects) == {"bundle", "manifest", "card", "license"}
    assert subjects["bundle"] == model.digest.removeprefix("sha256:")
    assert subjects["card"] == model.manifest.files["README.md"]
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicate"] == {
        "anchor": world.anchor.digest,
        "kind": "merged",
        "license": "Apache-2.0",
        "name": "merged",
    }


def test_signing_hashes_nothing_and_gives_the_same_bytes_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_key("hub")
    monkeypatch.setattr("flexctl.bundle.hashing.hash_spans", lambda *_: pytest.fail("hashed"))
    path = world.experts["law"].path
    once = sign(SignConfig(path=path, key=Path("hub.key"))).signature.read_bytes()
    assert sign(SignConfig(path=path, key=Path("hub.key"))).signature.read_bytes() == once


def test_a_second_key_is_added_and_another_version_is_in_the_way(world: World, trust: Path) -> None:
    path = world.experts["law"].path
    assert sign(SignConfig(path=path, key=Path("hub.key"))).signatures == 2
    assert checks(path, trust)["signed"] == (True, "by hub (trusted without end), acme (trusted without end)")
    make_expert(path, world.anchor, "law", seed=9, overwrite=True)
    with pytest.raises(UsageError, match=r"law\.st\.sig: signs another version"):
        sign(SignConfig(path=path, key=Path("hub.key")))
    assert sign(SignConfig(path=path, key=Path("hub.key"), overwrite=True)).signatures == 1


def test_a_dry_run_checks_the_key_and_writes_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    make_key("hub")
    path = world.experts["law"].path
    assert sign(SignConfig(path=path, key=Path("hub.key"), dry_run=True)).dry_run
    assert not signature_path(path).exists()
    monkeypatch.setenv("FLEXCTL_PASSPHRASE", "something else")
    with pytest.raises(UsageError, match="the passphrase is wrong"):
        sign(SignConfig(path=path, key=Path("hub.key"), dry_run=True))


def test_a_merged_model_keeps_its_owners_signatures(world: World, trust: Path) -> None:
    path = merged(world)
    for name in ("law", "low", "code"):
        kept = path / f"model-expert-{name}.sig"
        assert kept.read_bytes() == signature_path(world.experts[name].path).read_bytes()
    sign(SignConfig(path=path, key=Path("hub.key")))
    assert checks(path, trust)["owners"] == (
        True,
        "code by bank (trusted without end); law by acme (trusted without end); low by acme (trusted without end)",
    )
    remove(RemoveConfig(names=("law",), source=path, output=Path("without")))
    assert read_directory(Path("without")) == read_directory(merged(world, "code", "low", output="never"))
    assert not (Path("without") / "model-expert-law.sig").exists()
    assert not signature_path(Path("without")).exists()


def test_an_unsigned_model_fails_and_an_unknown_owner_does_not(world: World, trust: Path) -> None:
    path = merged(world)
    ok, said = checks(path, trust)["signed"]
    assert (ok, said) == (False, f"{path / 'flexctl.sig'}: is missing: nobody signed this")
    sign(SignConfig(path=path, key=Path("hub.key")))
    only = make_trust(trust.read_text().split("\n\n")[0], path="only.toml")
    assert checks(path, only)["owners"] == (True, "not by a key of only.toml: code, law, low")
    assert verify(VerifyConfig(path=path, trust=only)).ok


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("revoked = 2026-01-01", "the key of acme is revoked since 2026-01-01"),
        ("valid_until = 2026-01-01", "the key of acme was valid until 2026-01-01"),
        ("valid_from = 2026-12-01", "the key of acme is valid from 2026-12-01 on"),
        ('bundles = ["news"]', "acme may sign news, not law"),
    ],
)
def test_a_key_that_does_not_count(world: World, trust: Path, line: str, says: str) -> None:
    hub, acme, bank = trust.read_text().split("\n\n")
    strict, day = make_trust(hub, f"{acme}\n{line}\n", bank), datetime.date(2026, 6, 15)
    path = world.experts["law"].path
    assert checks(path, strict, today=day)["signed"] == (False, f"{path}.sig: {says}")
    with pytest.raises(BundleError, match=says):
        merge(MergeConfig(experts=(path,), require_signed=True, trust=strict, output=Path("m")), today=day)
    whole = merged(world, output="whole")
    sign(SignConfig(path=whole, key=Path("hub.key")))
    ok, said = checks(whole, strict, today=day)["owners"]
    assert (ok, said.removesuffix(" (and 1 more)")) == (False, f"{whole}/model-expert-law.sig: {says}")
    assert not Path("m").exists()


def test_merge_takes_only_what_trusted_keys_signed(world: World, trust: Path) -> None:
    strict = {"require_signed": True, "trust": trust}
    assert merged(world, **strict).is_dir()
    make_expert(Path("news.st"), world.anchor, "news")
    for dry_run in (True, False):
        config = MergeConfig(experts=(Path("merged"), Path("news.st")), output=Path("new"), dry_run=dry_run, **strict)
        with pytest.raises(BundleError, match=r"news\.st: expert news is not signed"):
            merge(config)
    stranger, _ = make_key("stranger")
    sign(SignConfig(path=Path("news.st"), key=stranger))
    with pytest.raises(BundleError, match=r"news\.st, its signature: no key of trust\.toml signed it"):
        merge(config)
    with pytest.raises(UsageError, match="require_signed: needs to know whose keys count"):
        merge(MergeConfig(experts=(Path("news.st"),), require_signed=True))
    asked = ReplaceConfig(name="law", expert=_another_law(world, stranger), source=Path("merged"), **strict)
    with pytest.raises(BundleError, match="no key of"):
        replace(asked)
    assert not Path("new").exists()


def _another_law(world: World, key: Path) -> Path:
    make_expert(Path("law.st"), world.anchor, "law", seed=5)
    sign(SignConfig(path=Path("law.st"), key=key))
    return Path("law.st")


def test_require_signed_may_stand_in_flexctl_toml(
    world: World, trust: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexctl.cli.app import main

    assert trust.is_file()
    Path("flexctl.toml").write_text('[merge]\nrequire_signed = true\ntrust = "trust.toml"\n')
    make_expert(Path("news.st"), world.anchor, "news")
    assert main(["merge", "news.st"]) == 3
    assert capsys.readouterr().err.startswith("error: news.st: expert news is not signed\n")
    assert main(["merge", str(world.experts["law"].path), "-q"]) == 0


def test_a_signature_of_something_else_is_refused_by_name(world: World, trust: Path) -> None:
    law, code = world.experts["law"].path, world.experts["code"].path
    shutil.copy(f"{code}.sig", f"{law}.sig")
    says = r"law\.st\.sig: signs another bundle than law's"
    with pytest.raises(BundleError, match=says) as caught:
        merge(MergeConfig(experts=(law,), output=Path("m")))
    assert caught.value.hint == "sign it again, or delete law.st.sig"
    found = checks(law, trust)
    assert not found["signature"][0]
    assert not found["signed"][0]


def test_what_a_forger_changes_is_found(world: World, trust: Path) -> None:
    """The signature of one statement under another; the owner's key id over a stranger's signature."""
    path = world.experts["law"].path
    place = signature_path(path)
    good = json.loads(place.read_bytes())
    stranger, _ = make_key("stranger")
    place.unlink()
    sign(SignConfig(path=path, key=stranger))
    theirs = json.loads(place.read_bytes())
    theirs["signatures"][0]["keyid"] = good["signatures"][0]["keyid"]
    place.write_text(json.dumps(theirs))
    assert checks(path, trust)["signed"] == (False, f"{place}: the signature with the key of acme is forged")
    make_expert(path, world.anchor, "law", seed=3, overwrite=True)
    payload = signed_statement(open_bundle(path).manifest)
    place.write_text(json.dumps(good | {"payload": base64.b64encode(payload).decode()}))
    assert checks(path, trust)["signed"] == (False, f"{place}: the signature with the key of acme is forged")


def test_what_the_hub_adds_is_tolerated_by_name_and_nothing_else(world: World, trust: Path) -> None:
    sign(SignConfig(path=world.anchor.path, key=Path("hub.key")))
    (world.anchor.path / ".gitattributes").write_text("* text")
    (world.anchor.path / "README.md").write_text("a card")
    assert verify(VerifyConfig(path=world.anchor.path, trust=trust)).ok
    (world.anchor.path / "notes.md").write_text("mine")
    assert checks(world.anchor.path, trust)["nothing else"][0] is False
    path = merged(world)
    sign(SignConfig(path=path, key=Path("hub.key")))
    (path / "README.md").write_text("another card")
    assert "README.md" in checks(path, trust)["files"][1]


def test_any_changed_byte_of_a_signature_is_found(world: World, trust: Path) -> None:
    path = world.experts["law"].path
    place = signature_path(path)
    good = place.read_bytes()
    envelope = parse_envelope(good, "x")
    parts = (envelope.payload, next(iter(envelope.signatures.values())))
    for part in parts:
        text = base64.b64encode(part)
        start = good.index(text)
        for at in range(start, start + len(text) - 2, 37):
            changed = bytearray(good)
            changed[at] = ord("A") if changed[at] != ord("A") else ord("B")
            place.write_bytes(bytes(changed))
            assert checks(path, trust)["signed"][0] is False, at


ENVELOPE = {"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": [{"keyid": "a", "sig": ""}]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"payload": 3}, "payload is 3; expected base64"),
        ({"payload": "e30"}, "payload is 'e30'; expected base64"),
        ({"payloadType": "text"}, "payloadType is 'text'"),
        ({"signatures": []}, "signatures is "),
        ({"signatures": [{"keyid": "a", "sig": ""}] * 101}, "signatures is "),
        ({"signatures": [{"keyid": "a", "sig": ""}] * 2}, "signatures.1.keyid 'a' stands twice"),
        ({"signatures": [{"keyid": 3, "sig": ""}]}, "signatures.0 is "),
        ({"signatures": [{"keyid": "a", "sig": "!"}]}, "signatures.0.sig is '!'; expected base64"),
        ({"more": 1}, "is no signature; expected a DSSE envelope"),
    ],
)
def test_envelopes_that_are_none(change: dict[str, Any], says: str) -> None:
    with pytest.raises(BundleError) as caught:
        parse_envelope(json.dumps(ENVELOPE | change).encode(), "f")
    assert caught.value.message.startswith(f"f: {says}")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from([*ENVELOPE, "other"]),
    value=JSON,
    cut=st.integers(0, 200),
    raw=st.none() | st.binary(max_size=60),
)
def test_any_envelope_is_read_or_refused_in_one_line(field: str, value: Any, cut: int, raw: bytes | None) -> None:
    data = json.dumps(ENVELOPE | {field: value}).encode() if raw is None else raw
    for text in (data, data[:cut]):
        try:
            parse_envelope(text, "f").statement("f")
        except BundleError as error:
            refused_in_one_line(error)


def test_a_signature_that_is_no_file_or_too_large(world: World) -> None:
    path = world.experts["law"].path
    signature_path(path).mkdir()
    with pytest.raises(BundleError, match=r"law\.st\.sig: is no file"):
        merge(MergeConfig(experts=(path,), output=Path("m")))
    signature_path(path).rmdir()
    signature_path(path).write_bytes(b" " * 1_000_001)
    with pytest.raises(BundleError, match="too many for a signature"):
        merge(MergeConfig(experts=(path,), output=Path("m")))


def test_nothing_else_is_copied_into_a_merged_model_as_a_signature(world: World) -> None:
    """A link in the place of a signature must not carry another file's content out of the house."""
    path = world.experts["law"].path
    Path("secret").write_text("TOP SECRET")
    signature_path(path).symlink_to(Path("secret").absolute())
    with pytest.raises(BundleError, match=r"law\.st\.sig: is not valid JSON"):
        merge(MergeConfig(experts=(path,), output=Path("m")))
    assert not Path("m").exists()


@pytest.mark.parametrize("what", ["bytes", "file"])
def test_what_is_exchanged_after_its_signature_was_checked_is_not_merged(
    world: World, trust: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Between the look at the signature and the copy somebody writes over the owner's file, or puts another there."""
    from flexctl.trust import signing

    path = world.experts["law"].path
    other = make_expert(Path("other.st"), world.anchor, "law", seed=9).path.read_bytes()
    checked = signing.refuse_unsigned

    def exchanging(*arguments: Any) -> None:
        checked(*arguments)
        if what == "bytes":
            whole = path.read_bytes()
            path.write_bytes(whole[:-64] + other[-64:])
        else:
            path.unlink()
            path.write_bytes(other)

    monkeypatch.setattr("flexctl.steps.trusting.refuse_unsigned", exchanging)
    with pytest.raises(BundleError, match=r"law\.st: "):
        merged(world, "law", output="m", require_signed=True, trust=trust)
    assert not Path("m").exists()


def test_computed_matrices_count_as_signed_only_in_a_model_that_is(world: World, trust: Path) -> None:
    """An owner's signature of a low-rank expert does not name the matrices that a merged model has of it."""
    strict = {"require_signed": True, "trust": trust}
    base = merged(world, "low", output="base")
    config = MergeConfig(experts=(base, *world.files("law")), output=Path("m"), **strict)
    with pytest.raises(BundleError, match="base: is not signed, and the matrices of low in it"):
        merge(config)
    stranger, _ = make_key("stranger")
    sign(SignConfig(path=base, key=stranger))
    with pytest.raises(BundleError, match=r"flexctl\.sig: no key of trust\.toml signed it"):
        merge(config)
    sign(SignConfig(path=base, key=Path("hub.key")))
    assert merge(config).path.is_dir()
    full = merged(world, "code", output="full")
    assert merge(MergeConfig(experts=(full, *world.files("law")), output=Path("n"), **strict)).path.is_dir()
