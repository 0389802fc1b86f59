"""Signatures as bytes: what is signed about a bundle, where it lies, and reading one that somebody else wrote.

A signature is a DSSE envelope around an in-toto Statement that is a function of the manifest alone. Whether a key made
it is flexctl/trust's business; nothing here needs cryptography.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import canonical_json, parse_json
from flexctl.bundle.manifest import (
    AnchorManifest,
    ExpertManifest,
    Manifest,
    MergedManifest,
    write_manifest,
)
from flexctl.bundle.names import shown
from flexctl.bundle.stock import CARD_FILE
from flexctl.errors import BundleError

__all__ = [
    "DIRECTORY_SIGNATURE",
    "PAYLOAD_TYPE",
    "STATEMENT_TYPE",
    "Envelope",
    "bundle_name",
    "kept_signature_file",
    "parse_envelope",
    "read_envelope",
    "read_signature",
    "signature_path",
    "signed_statement",
]

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
BUNDLE_PREDICATE = "urn:flexctl:bundle:1"

DIRECTORY_SIGNATURE = "flexctl.sig"
"""The signature of a directory bundle, inside it."""

_SUBJECTS = ("bundle", "manifest", "card", "license")
MAX_ENVELOPE_BYTES = 1_000_000
_MOST_SIGNATURES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Envelope:
    """A DSSE envelope whose form is right; nothing of it is proven.

    Attributes:
        data: The file's bytes.
        payload: What is signed.
        signatures: Key id -> signature.
    """

    data: bytes
    payload: bytes
    signatures: Mapping[str, bytes]

    def statement(self, where: str) -> Mapping[str, Any]:
        """Return the payload's object.

        Raises:
            BundleError: It is no JSON object.
        """
        found = parse_json(self.payload, f"{where}: payload")
        if not isinstance(found, dict):
            raise BundleError(f"{where}: payload is {shown(found)}; expected an object")
        return found


def signature_path(path: Path) -> Path:
    """Return where the signature of the bundle at ``path`` lies: inside a directory, beside a file."""
    return path / DIRECTORY_SIGNATURE if path.is_dir() else path.with_name(f"{path.name}.sig")


def kept_signature_file(name: str) -> str:
    """Return the file in which a merged model keeps the owner's signature of an expert."""
    return f"model-expert-{name}.sig"


def signed_statement(manifest: Manifest) -> bytes:
    """Return what a signature of a bundle signs: canonical JSON, a function of the manifest alone.

    Its subjects are the bundle's digest, the manifest, the license, and the card of a merged model, whose card is a
    part of it. The digests are those that the manifest has already: nothing is hashed again.

    Source: in-toto Statement v1, https://github.com/in-toto/attestation
    """
    license = _license(manifest)
    subjects = {"bundle": manifest.digest.removeprefix("sha256:"), "manifest": _sha256(write_manifest(manifest))}
    if license is not None:
        subjects["license"] = _sha256(license.encode("utf-8"))
    if isinstance(manifest, MergedManifest):
        subjects["card"] = manifest.files.get(CARD_FILE, "")
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in sorted(subjects.items())],
        "predicateType": BUNDLE_PREDICATE,
        "predicate": {
            "kind": manifest.kind,
            "name": bundle_name(manifest),
            "anchor": manifest.digest if isinstance(manifest, AnchorManifest) else manifest.anchor.digest,
            "license": license,
        },
    }
    return canonical_json(statement)


def bundle_name(manifest: Manifest) -> str:
    """Return the name under which a bundle is signed; that of a merged model is ``merged``."""
    return manifest.kind if isinstance(manifest, MergedManifest) else manifest.name


def read_envelope(path: Path) -> Envelope | None:
    """Return the envelope in a file; None where there is no such file.

    Raises:
        BundleError: It is no file, too large, or no envelope.
    """
    if not path.exists():
        return None
    if not path.is_file():
        raise BundleError(f"{path}: is no file")
    if path.stat().st_size > MAX_ENVELOPE_BYTES:
        raise BundleError(f"{path}: has more than {MAX_ENVELOPE_BYTES} bytes, too many for a signature")
    return parse_envelope(path.read_bytes(), str(path))


def read_signature(path: Path, manifest: Manifest) -> Envelope | None:
    """Return the signature in a file, which must be of this very bundle; None where there is none.

    Args:
        path: The signature's file.
        manifest: What it must sign.

    Raises:
        BundleError: It is no signature, or that of something else; the message names the subject that differs.
    """
    envelope = read_envelope(path)
    if envelope is None or envelope.payload == signed_statement(manifest):
        return envelope
    raise BundleError(
        f"{path}: signs another {_first_difference(envelope, manifest, str(path))} than {bundle_name(manifest)}'s",
        hint=f"sign it again, or delete {path.name}",
    )


def parse_envelope(data: bytes, where: str) -> Envelope:
    """Return the envelope that ``data`` holds.

    Raises:
        BundleError: It is no DSSE envelope around an in-toto statement; the message names the field.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict) or set(value) != {"payload", "payloadType", "signatures"}:
        raise BundleError(f"{where}: is no signature; expected a DSSE envelope: payload, payloadType, signatures")
    if value["payloadType"] != PAYLOAD_TYPE:
        raise BundleError(f"{where}: payloadType is {shown(value['payloadType'])}; expected {PAYLOAD_TYPE!r}")
    listed = value["signatures"]
    if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_SIGNATURES:
        raise BundleError(f"{where}: signatures is {shown(listed)}; expected 1 to {_MOST_SIGNATURES} of them")
    signatures: dict[str, bytes] = {}
    for index, item in enumerate(listed):
        field = f"{where}: signatures.{index}"
        if not isinstance(item, dict) or set(item) != {"keyid", "sig"} or not isinstance(item["keyid"], str):
            raise BundleError(f"{field} is {shown(item)}; expected keyid and sig")
        if item["keyid"] in signatures:
            raise BundleError(f"{field}.keyid {shown(item['keyid'])} stands twice")
        signatures[item["keyid"]] = _base64(item["sig"], f"{field}.sig")
    return Envelope(data=data, payload=_base64(value["payload"], f"{where}: payload"), signatures=signatures)


def _first_difference(envelope: Envelope, manifest: Manifest, where: str) -> str:
    mine = _subjects(parse_json(signed_statement(manifest), where))
    signed = _subjects(envelope.statement(where))
    return next((name for name in _SUBJECTS if mine.get(name) != signed.get(name)), "statement")


def _subjects(statement: Mapping[str, Any]) -> dict[str, str]:
    """Return {subject: sha256} of a statement as far as it has the form of one."""
    listed = statement.get("subject")
    items = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return {str(item.get("name")): str(item["digest"].get("sha256")) for item in items if _is_digest(item)}


def _is_digest(item: Mapping[str, Any]) -> bool:
    return isinstance(item.get("digest"), dict)


def _base64(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError) as error:
        raise BundleError(f"{where} is {shown(text)}; expected base64") from error


def _license(manifest: Manifest) -> str | None:
    if isinstance(manifest, ExpertManifest):
        return manifest.data.license
    return manifest.license if isinstance(manifest, (AnchorManifest, MergedManifest)) else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
