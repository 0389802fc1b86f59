"""Keys: encrypted at rest, readable by their owner alone, never replaced; no passphrase on a command line."""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signers import SECRET, cheap_keys, make_key, refused_in_one_line

import flexctl
from flexctl.cli.app import main
from flexctl.commands import COMMANDS
from flexctl.engine.keygen import KeygenConfig, keygen
from flexctl.errors import UsageError
from flexctl.options import options
from flexctl.runtime import SilentReporter
from flexctl.trust import keys
from flexctl.trust.keys import load_key, public_key, public_line


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del in_empty_folder
    cheap_keys(monkeypatch)


class Typist(SilentReporter):
    """Types one answer after the other."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.warnings = list(answers), list[str]()

    def ask_secret(self, _question: str, /) -> str | None:
        return self.answers.pop(0)

    def warn(self, text: str, /) -> None:
        self.warnings.append(text)


def test_a_key_is_encrypted_and_its_owners_alone() -> None:
    before = os.umask(0)
    try:
        path, _ = make_key("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert SECRET.encode() not in path.read_bytes()
    assert load_key(path, SECRET).public_key.keyid == public_key(_line(path), "x").keyid
    for wrong in ("correct horse", SECRET + " "):
        with pytest.raises(UsageError, match=r"a\.key: cannot be opened: the passphrase is wrong"):
            load_key(path, wrong)


def _line(path: Path) -> str:
    return Path(f"{path}.pub").read_text().splitlines()[1]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="modes")
@pytest.mark.parametrize("mode", [0o640, 0o644, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_read_is_not_used(mode: int) -> None:
    """As ssh refuses it; the owner of somebody else's file decides who may read that."""
    path, _ = make_key("a")
    path.chmod(mode)
    with pytest.raises(UsageError, match=rf"^a\.key: has mode 0{mode:o}, by which others may use the key$") as caught:
        load_key(path, SECRET)
    assert caught.value.hint == "chmod 600 a.key"
    path.chmod(0o400)
    load_key(path, SECRET)


def test_the_public_line_is_that_of_the_pub_file_and_of_openssl() -> None:
    path, entry = make_key("a")
    assert f'key = "{_line(path)}"' in entry
    assert public_line(public_key(_line(path), "x")) == _line(path)


def test_a_key_that_exists_is_never_replaced() -> None:
    path, _ = make_key("a")
    before = path.read_bytes()
    for config in (KeygenConfig(output=path), KeygenConfig(output=path, dry_run=True)):
        with pytest.raises(UsageError, match=r"a\.key exists already, and a key is never replaced"):
            keygen(config)
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.key\.pub exists already"):
        keygen(KeygenConfig(output=path))
    assert not path.exists()
    path.write_bytes(before)


def test_a_dry_run_makes_nothing() -> None:
    assert keygen(KeygenConfig(output=Path("a.key"), dry_run=True)).public_key is None
    assert os.listdir() == []


def test_where_a_passphrase_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLEXCTL_PASSPHRASE")
    with pytest.raises(UsageError, match="no passphrase is given"):
        keygen(KeygenConfig(output=Path("a.key")))
    keygen(KeygenConfig(output=Path("typed.key")), Typist("typed twice", "typed twice"))
    load_key(Path("typed.key"), "typed twice")
    with pytest.raises(UsageError, match="the two passphrases differ"):
        keygen(KeygenConfig(output=Path("b.key")), Typist("typed once", "typed twice"))
    file = Path("secret")
    file.write_text("from a file\r\nnot this\n")
    file.chmod(0o644)
    listener = Typist()
    keygen(KeygenConfig(output=Path("file.key"), passphrase_file=file), listener)
    load_key(Path("file.key"), "from a file")
    assert listener.warnings == ["secret: others may read it; chmod 600 secret"]
    for content, says in (("", "its first line is empty"), ("short\n", "has 5 characters; expected at least 8")):
        file.write_text(content)
        with pytest.raises(UsageError, match=says):
            keygen(KeygenConfig(output=Path("c.key"), passphrase_file=file))
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="passphrase_file: secret: is no text in UTF-8"):
        keygen(KeygenConfig(output=Path("c.key"), passphrase_file=file))


def test_no_option_takes_a_passphrase() -> None:
    keys = {option.key for row in COMMANDS for option in options(getattr(flexctl, row.config))}
    assert {key for key in keys if "passphrase" in key} == {"passphrase_file"}


def test_a_passphrase_stands_in_no_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keygen", "-o", "a.key", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["key_id"] == load_key(Path("a.key"), SECRET).public_key.keyid
    assert SECRET not in said.out + said.err
    assert main(["keygen", "-o", "b.key"]) == 0
    assert f'[[owners]]\nname = "WHOSE"\nkey = "{_line(Path("b.key"))}"\n' in capsys.readouterr().out


def test_what_is_no_key_of_keygens() -> None:
    path, _ = make_key("a")
    for data, says in (
        (Path("a.key.pub").read_bytes(), "is a public key"),
        (b"hello", "is no private key of keygen's"),
        (b"x" * 20_000, "too many for a key"),
        (_ssh_key(encrypted=False), "is not encrypted"),
        (_ssh_key(encrypted=True), "is a key of another kind; expected ed25519"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=says):
            load_key(path, SECRET)
    with pytest.raises(UsageError, match=r"none\.key: no such file"):
        load_key(Path("none.key"), SECRET)


def _ssh_key(*, encrypted: bool) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    sealed = PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(1).build(SECRET.encode())
    key = generate_private_key(SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, sealed if encrypted else NoEncryption())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_key_file_that_was_changed_opens_or_is_refused(data: st.DataObject) -> None:
    path = Path("fuzz.key")
    if not path.exists():
        make_key("fuzz")
        Path("good").write_bytes(path.read_bytes())
    content = bytearray(Path("good").read_bytes())
    # The rounds are the file's own to choose; those bytes stay.
    place = data.draw(st.integers(150, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        load_key(path, SECRET)
    except UsageError as error:
        refused_in_one_line(error)
    finally:
        path.write_bytes(Path("good").read_bytes())


@pytest.mark.parametrize("line", ["", "!", "AAAA", "MCowBQYDK2VwAyEA", "x" * 5000, "caf\u00e9"])
def test_lines_that_are_no_public_key(line: str) -> None:
    with pytest.raises(UsageError, match=r"^f is .*; expected the line between BEGIN and END"):
        public_key(line, "f")


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        keys.importlib.util, "find_spec", lambda name: None if name in ("bcrypt", "securesystemslib") else real(name)
    )
    Path("trust.toml").write_text("")
    for command in (["keygen", "-o", "a.key"], ["verify", ".", "--trust", "trust.toml"]):
        assert main(command) == 2
        assert capsys.readouterr().err.splitlines() == [
            "error: signatures need bcrypt, securesystemslib",
            "hint: pip install 'flexctl[sign]'",
        ]


def test_commands_that_sign_nothing_load_no_cryptography() -> None:
    script = "import sys, flexctl; flexctl.merge, flexctl.verify, flexctl.sign; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
