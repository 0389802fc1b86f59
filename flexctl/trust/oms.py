"""Signatures as OpenSSF's model signing v1 has them, by its own package, for those who verify with its tool.

It takes elliptic curve keys and no ed25519, and hashes every file; flexctl's own signature does neither.

Source: https://github.com/ossf/model-signing-spec
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError
from flexctl.trust.keys import read_key_file

__all__ = ["oms_path", "require_oms", "write_oms"]

_UNBOUND = ("run.json", "results.json", "flexctl.sig")


def require_oms() -> None:
    """Refuse where OpenSSF's package is not installed.

    Raises:
        UsageError: It is not.
    """
    # model-signing imports OpenSSL and does not say so.
    missing = [
        name
        for name, module in (("model-signing", "model_signing"), ("pyOpenSSL", "OpenSSL"))
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise UsageError(f"needs {' and '.join(missing)}", hint="pip install 'flexctl[oms]'", field="oms")


def oms_path(path: Path) -> Path:
    """Return where the signature of the bundle at ``path`` lies: inside a directory, beside a file."""
    return path / "flexctl.sigstore.json" if path.is_dir() else path.with_name(f"{path.name}.sigstore.json")


def write_oms(path: Path, key: Path, passphrase: str, *, overwrite: bool) -> Path:
    """Sign a bundle and return the signature's file.

    Args:
        path: The bundle. Files that nothing binds are left out.
        key: An elliptic curve key in PEM, encrypted.
        passphrase: What opens it.
        overwrite: Whether a signature that exists may be replaced.

    Raises:
        UsageError: The key is of another kind, or the passphrase is wrong.
    """
    from model_signing import hashing, signing

    if b"OPENSSH" in read_key_file(key):
        hint = "openssl ecparam -name prime256v1 -genkey | openssl ec -aes256 makes one that it takes"
        raise UsageError(f"{key}: OpenSSF's signatures take no ed25519 key", hint=hint)
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key, password=passphrase.encode("utf-8"))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{key}: is no elliptic curve key that the passphrase opens") from error
    target = oms_path(path)
    kept = [item.name for item in path.iterdir() if _is_unbound(item.name)] if path.is_dir() else []
    signer.set_hashing_config(hashing.Config().set_ignored_paths(paths=[*kept, target.name], ignore_git_paths=True))
    with new_file(target, overwrite=overwrite, beside=path if path.is_dir() else None) as temporary:
        signer.sign(path, temporary)
    return target


def _is_unbound(name: str) -> bool:
    return name in _UNBOUND or name.endswith((".sig", ".sigstore.json"))
