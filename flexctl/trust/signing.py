"""Signing statements, and finding out who signed one."""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexctl.bundle.codec import indented_json
from flexctl.bundle.composition import Composition, Part
from flexctl.bundle.merged import open_merged
from flexctl.bundle.names import shown
from flexctl.bundle.signatures import (
    PAYLOAD_TYPE,
    Envelope,
    bundle_name,
    read_signature,
    signature_path,
)
from flexctl.errors import BundleError
from flexctl.trust.owners import Owner

if TYPE_CHECKING:
    from securesystemslib.dsse import Envelope as Dsse
    from securesystemslib.signer import CryptoSigner

__all__ = ["Trust", "is_signed", "named", "refuse_unsigned", "seal", "signers_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """Whom to trust, and when.

    Attributes:
        path: The trust file.
        owners: Its keys.
        today: The day that it is asked on.
    """

    path: Path
    owners: tuple[Owner, ...]
    today: datetime.date


def seal(payload: bytes, signer: CryptoSigner, before: Envelope | None = None) -> bytes:
    """Return a DSSE envelope of ``payload`` as its file has it, signed; ed25519 makes the same key the same bytes.

    Args:
        payload: A statement.
        signer: The key.
        before: An envelope of the same payload, whose signatures are kept.
    """
    envelope = _dsse(payload, before.signatures if before is not None else {})
    envelope.sign(signer)
    return indented_json(envelope.to_dict())


def _dsse(payload: bytes, signatures: Mapping[str, bytes]) -> Dsse:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import Signature

    return Envelope(payload, PAYLOAD_TYPE, {key: Signature(key, sig.hex()) for key, sig in signatures.items()})


def signers_of(
    envelope: Envelope, name: str, trust: Trust, where: str, *, day: datetime.date | None = None
) -> tuple[Owner, ...]:
    """Return whose keys of a trust file signed an envelope and may.

    Args:
        envelope: The envelope.
        name: Name of what was signed.
        trust: Whom to trust.
        where: File, for messages.
        day: The day that must lie within a key's validity; today if None.

    Raises:
        BundleError: No key that may has signed it; the message says what is wrong with those that did.
    """
    from securesystemslib.exceptions import VerificationError

    dsse = _dsse(envelope.payload, envelope.signatures)
    found, objections = [], []
    for owner in trust.owners:
        if owner.key.keyid not in envelope.signatures:
            continue
        try:
            dsse.verify([owner.key], 1)
        except VerificationError:
            objections.append(f"the signature with the key of {owner.name} is forged")
            continue
        objection = owner.objection(name, day or trust.today, trust.today)
        if objection is None:
            found.append(owner)
        else:
            objections.append(objection)
    if not found:
        ids = ", ".join(key[:12] for key in envelope.signatures)
        said = "; ".join(objections) or f"no key of {trust.path} signed it, but {shown(ids)}"
        raise BundleError(f"{where}: {said}")
    return tuple(found)


def is_signed(part: Part, trust: Trust) -> bool:
    """Return whether an expert carries a signature of a trusted key that may sign it."""
    if part.signature is None:
        return False
    try:
        signers_of(part.signature, part.entry.name, trust, str(part.source))
    except BundleError:
        return False
    return True


def refuse_unsigned(composition: Composition, trust: Trust) -> None:
    """Refuse closed experts without a signature of a trusted key.

    A low-rank expert inside a merged model has matrices that were computed from its owner's file and that its owner's
    signature does not name. So such a model must be signed as a whole.

    Raises:
        BundleError: One has none; the message names the first.
    """
    for part in composition.parts[1:]:
        if part.signature is None:
            raise BundleError(
                f"{part.source}: expert {part.entry.name} is not signed",
                hint="its owner signs it: flexctl sign",
            )
        signers_of(part.signature, part.entry.name, trust, f"{part.source}, its signature")
    for path in sorted({part.source for part in composition.parts[1:] if part.source.is_dir()}):
        _refuse_unsigned_model(path, {part.entry.name for part in composition.parts if part.source == path}, trust)


def _refuse_unsigned_model(path: Path, names: Collection[str], trust: Trust) -> None:
    merged = open_merged(path)
    entries = [entry for entry in merged.manifest.experts[1:] if entry.name in names]
    computed = [entry.name for entry in entries if merged.owner_manifest(entry.index)[0].rank is not None]
    if not computed:
        return
    place = signature_path(path)
    envelope = read_signature(place, merged.manifest)
    if envelope is None:
        raise BundleError(
            f"{path}: is not signed, and the matrices of {computed[0]} in it are not its owner's bytes but computed",
            hint=f"flexctl sign {path}, or merge the owners' files anew",
        )
    signers_of(envelope, bundle_name(merged.manifest), trust, str(place))


def named(owners: Sequence[Owner]) -> str:
    """Return who signed and when trust in each ends, in words."""
    return ", ".join(f"{owner.name} (trusted {owner.ends})" for owner in owners)
