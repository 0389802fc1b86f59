"""OpenSSF's form of a signature: its own tool believes it, and finds what was changed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from builders import World, make_world
from signers import SECRET, cheap_keys, make_key

from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.sign import SignConfig, sign
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import UsageError


@pytest.fixture
def world(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        PublicFormat,
    )

    cheap_keys(monkeypatch)
    key = generate_private_key(SECP256R1())
    sealed = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(SECRET.encode()))
    Path("ec.key").write_bytes(sealed)
    Path("ec.key").chmod(0o600)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    Path("ec.pub").write_bytes(public)
    return make_world(in_empty_folder, ("law",))


def openssf_says(path: Path, signature: Path) -> int:
    """Return the exit code of its tool; files beside the bundle's own are named to it, as it knows none of ours."""
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(path)]
    flags = ["--signature", str(signature), "--public_key", "ec.pub", "--ignore-paths", str(signature)]
    return subprocess.run([*command, *flags], capture_output=True, check=False).returncode


def test_its_own_tool_verifies_a_model(world: World) -> None:
    path = merge(MergeConfig(experts=world.files())).path
    made = sign(SignConfig(path=path, key=Path("ec.key"), oms=True))
    assert made.signature == path / "flexctl.sigstore.json"
    assert verify(VerifyConfig(path=path)).ok
    assert openssf_says(path, made.signature) == 0
    with pytest.raises(UsageError, match="exists already"):
        sign(SignConfig(path=path, key=Path("ec.key"), oms=True))


@pytest.mark.slow
def test_its_own_tool_finds_a_change(world: World) -> None:
    path = merge(MergeConfig(experts=world.files())).path
    made = sign(SignConfig(path=path, key=Path("ec.key"), oms=True))
    (path / "config.json").write_text("{}")
    assert openssf_says(path, made.signature) != 0


def test_an_expert_is_one_file(world: World) -> None:
    path = world.experts["law"].path
    made = sign(SignConfig(path=path, key=Path("ec.key"), oms=True))
    assert made.signature == Path(f"{path}.sigstore.json")
    assert made.signature.stat().st_size > 100


def test_keys_that_it_does_not_take(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    path = world.experts["law"].path
    key, _ = make_key("ours")
    with pytest.raises(UsageError, match=r"ours\.key: OpenSSF's signatures take no ed25519 key"):
        sign(SignConfig(path=path, key=key, oms=True))
    monkeypatch.setenv("FLEXCTL_PASSPHRASE", "wrong passphrase")
    with pytest.raises(UsageError, match=r"ec\.key: is no elliptic curve key that the passphrase opens"):
        sign(SignConfig(path=path, key=Path("ec.key"), oms=True))
    assert not Path(f"{path}.sigstore.json").exists()


def test_without_its_package_one_line_says_what_to_install(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "model_signing" else real(name))
    with pytest.raises(UsageError, match=r"^oms: needs model-signing$") as caught:
        sign(SignConfig(path=world.experts["law"].path, key=Path("ec.key"), oms=True))
    assert caught.value.hint == "pip install 'flexctl[oms]'"
