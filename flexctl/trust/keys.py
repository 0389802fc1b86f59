"""Private keys, ed25519, encrypted at rest: made once, opened to sign.

The file is OpenSSH's, as its bcrypt makes every guess at a passphrase slow; ``ssh-keygen -p`` changes the passphrase.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from flexctl.bundle.names import shown
from flexctl.bundle.store import new_file, own_file
from flexctl.errors import UsageError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

__all__ = ["load_key", "make_key", "public_key", "public_line", "public_path", "read_key_file", "require_sign"]

KDF_ROUNDS = 64
"""About half a second a guess."""

_MOST_BYTES = 10_000


def require_sign() -> None:
    """Refuse where the extra is not installed.

    Raises:
        UsageError: It is not.
    """
    missing = [
        name for name in ("bcrypt", "cryptography", "securesystemslib") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UsageError(f"signatures need {', '.join(missing)}", hint="pip install 'flexctl[sign]'")


def public_path(path: Path) -> Path:
    """Return where the public half of a key lies: beside it."""
    return path.with_name(f"{path.name}.pub")


def make_key(path: Path, passphrase: str) -> SSlibKey:
    """Write a new key pair and return its public half.

    Args:
        path: File of the private key as OpenSSH has it, encrypted, mode 0600. The public half, PEM, goes beside it.
        passphrase: What it is encrypted with.

    Raises:
        UsageError: A file exists.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat, PublicFormat
    from securesystemslib.signer import SSlibKey

    private = Ed25519PrivateKey.generate()
    slowly = PrivateFormat.OpenSSH.encryption_builder().kdf_rounds(KDF_ROUNDS).build(passphrase.encode("utf-8"))
    sealed = private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, slowly)
    shown_half = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    # Both are on the disk before either takes its place, the public half first.
    with new_file(path, overwrite=False) as temporary, new_file(public_path(path), overwrite=False) as shown_file:
        with own_file(temporary) as file:
            file.write(sealed)
        shown_file.write_bytes(shown_half)
    return SSlibKey.from_crypto(private.public_key())


def load_key(path: Path, passphrase: str) -> CryptoSigner:
    """Return the key in a file, opened.

    Raises:
        UsageError: There is no such file, it is no ed25519 key, is not encrypted, or the passphrase is wrong.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from securesystemslib.signer import CryptoSigner

    data = read_key_file(path)
    if b"BEGIN OPENSSH PRIVATE KEY" not in data:
        what = "a public key" if b"PUBLIC KEY" in data else "no private key of keygen's"
        raise UsageError(f"{path}: is {what}", hint="flexctl keygen makes a key")
    try:
        private = load_ssh_private_key(data, passphrase.encode("utf-8"))
    except TypeError as error:
        raise UsageError(f"{path}: is not encrypted", hint="ssh-keygen gives it a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path}: cannot be opened: the passphrase is wrong, or the file is broken") from error
    if not isinstance(private, Ed25519PrivateKey):
        raise UsageError(f"{path}: is a key of another kind; expected ed25519")
    return CryptoSigner(private)


def read_key_file(path: Path) -> bytes:
    """Return the bytes of a private key's file.

    Raises:
        UsageError: There is no such file, it is too large for a key, or it is the user's own and others may read it.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="flexctl keygen makes a key")
    if path.stat().st_size > _MOST_BYTES:
        raise UsageError(f"{path}: has more than {_MOST_BYTES} bytes, too many for a key")
    data = path.read_bytes()
    if b"PRIVATE KEY" in data:
        _refuse_shared(path)
    return data


def _refuse_shared(path: Path) -> None:
    """Refuse as ssh does: one's own file that is open to others. Who may read another's file, its owner decides."""
    found = path.stat()
    if hasattr(os, "geteuid") and found.st_uid == os.geteuid() and found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        mode = stat.S_IMODE(found.st_mode)
        raise UsageError(f"{path}: has mode {mode:04o}, by which others may use the key", hint=f"chmod 600 {path}")


def public_line(key: SSlibKey) -> str:
    """Return a public key as a trust file has it: the one line between BEGIN and END of its ``.pub`` file."""
    # SubjectPublicKeyInfo of ed25519 is this head and the key. Source: RFC 8410, section 10.1.
    return base64.b64encode(_SPKI_HEAD + bytes.fromhex(key.keyval["public"])).decode("ascii")


def public_key(line: str, where: str) -> SSlibKey:
    """Return the public key that ``public_line`` made a line of.

    Raises:
        UsageError: It is none.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from securesystemslib.signer import SSlibKey

    try:
        data = base64.b64decode(line.strip(), validate=True)
    except ValueError:
        data = b""
    if len(data) != len(_SPKI_HEAD) + 32 or not data.startswith(_SPKI_HEAD):
        raise UsageError(f"{where} is {shown(line)}; expected the line between BEGIN and END of a key's .pub file")
    return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(data[len(_SPKI_HEAD) :]))


_SPKI_HEAD = bytes.fromhex("302a300506032b6570032100")
