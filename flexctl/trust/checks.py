"""What verify says of who signed a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flexctl.bundle.checks import Check
from flexctl.bundle.manifest import Manifest
from flexctl.bundle.merged import Merged
from flexctl.bundle.names import and_more
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.signatures import bundle_name, kept_signature_file, read_signature, signature_path
from flexctl.errors import BundleError
from flexctl.trust.records import Record
from flexctl.trust.signing import Trust, named, signers_of

__all__ = ["signature_checks"]


def signature_checks(path: Path, trust: Trust, *, left_by: Record | None = None) -> Iterator[Check]:
    """Yield whether trusted keys signed a bundle, and whose signatures the experts of a merged model carry.

    A bundle without a signature fails, as anybody can write a tombstone into a model of their own; but not the model
    that was left by what a record tells, as the record is a signature of it. Of the experts inside a merged model, only
    a signature with a key of the trust file that is forged, revoked or out of its time fails: who signed the model
    answers for the others.

    Args:
        path: A bundle that opens.
        trust: Whom to trust.
        left_by: A record that is checked beside it.
    """
    bundle = open_bundle(path)
    if left_by is not None and bundle.digest == left_by.after and not signature_path(path).exists():
        return
    yield _own(path, bundle.manifest, trust)
    if isinstance(bundle, Merged):
        yield _owners(bundle, trust)


def _own(path: Path, manifest: Manifest, trust: Trust) -> Check:
    place = signature_path(path)
    try:
        envelope = read_signature(place, manifest)
        if envelope is None:
            return Check(name="signed", ok=False, detail=f"{place}: is missing: nobody signed this")
        signers = signers_of(envelope, bundle_name(manifest), trust, str(place))
    except BundleError as error:
        return Check(name="signed", ok=False, detail=error.message)
    return Check(name="signed", ok=True, detail=f"by {named(signers)}")


def _owners(merged: Merged, trust: Trust) -> Check:
    """Return who of the trust file signed which expert of a merged model."""
    known = {owner.key.keyid for owner in trust.owners}
    signed, others, problems = [], [], []
    for entry in merged.manifest.experts[1:]:
        place = merged.path / kept_signature_file(entry.name)
        try:
            envelope = read_signature(place, merged.owner_manifest(entry.index)[0])
            if envelope is None or not known & envelope.signatures.keys():
                others.append(entry.name)
            else:
                signed.append(f"{entry.name} by {named(signers_of(envelope, entry.name, trust, str(place)))}")
        except BundleError as error:
            problems.append(error.message)
    if problems:
        more = and_more(len(problems))
        return Check(name="owners", ok=False, detail=problems[0] + more)
    unsigned = [f"not by a key of {trust.path}: {', '.join(others)}"] if others else []
    return Check(name="owners", ok=True, detail="; ".join([*signed, *unsigned]) or "no expert is inside")
