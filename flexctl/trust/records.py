"""Records of what was removed or replaced: signed, for the owner, and what they prove of a model at hand.

A record is a DSSE envelope around an in-toto Statement. It has the hashes of the tensors and router rows that were
inside before and are not after, so that anyone who has it can look for them in a model that is said to be without.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.checks import Check
from flexctl.bundle.codec import canonical_json, decode, encode
from flexctl.bundle.merged import Merged, expert_file
from flexctl.bundle.names import PUBLIC, and_more, check_expert_name, shown
from flexctl.bundle.signatures import STATEMENT_TYPE, Envelope, read_envelope
from flexctl.errors import BundleError, UsageError
from flexctl.trust.signing import Trust, named, signers_of

__all__ = [
    "Absence",
    "Gone",
    "Record",
    "prove_record",
    "read_record",
    "record_check",
    "record_path",
    "record_statement",
    "traces_of",
]

RECORD_PREDICATE = "urn:flexctl:removal:1"
_ACTS = ("remove", "replace")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone:
    """The expert that went."""

    name: str
    digest: str
    manifest_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What a record says.

    Attributes:
        act: ``remove`` or ``replace``.
        expert: Who went.
        replaced_by: Digest of the one that came instead; None where none did.
        anchor: Digest of the model's anchor.
        before: Digest of the model with it.
        after: Digest of the model that was left.
        tensors: Bare hex SHA-256 of each of its tensors that was inside before and is not after.
        rows: The same of its router rows, a layer each.
        shared: How many of its tensors and rows are also others', and therefore are still inside.
        reason: Why, in the words of whoever did it.
        date: When, as YYYY-MM-DD, as the signer says.
        check: The command that shows the absence.
    """

    act: str
    expert: Gone
    replaced_by: str | None
    anchor: str
    before: str
    after: str
    tensors: tuple[str, ...]
    rows: tuple[str, ...]
    shared: int
    reason: str
    date: str
    check: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Absence:
    """What a record that holds proves of a model at hand: an expert is not inside.

    Attributes:
        act: ``remove`` or ``replace``.
        date: When, as YYYY-MM-DD, as the signer says.
        reason: Why, in the signer's words.
        signers: Who signed, and when trust in each ends.
        before: Digest of the model with the expert.
        after: Digest of the model that was left.
        tensors: How many of the expert's tensors were looked for.
        rows: How many of its router rows.
        shared: How many are also others', and therefore are still inside.
        is_left: Whether the model at hand is the one that was left; else it was made from that.
    """

    act: str
    date: str
    reason: str
    signers: str
    before: str
    after: str
    tensors: int
    rows: int
    shared: int
    is_left: bool


def record_path(target: Path, name: str) -> Path:
    """Return where the record of an expert that went goes: beside the model that is left."""
    return Path(os.path.realpath(target)).parent / f"{name}.removed.json"


def traces_of(merged: Merged, name: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the hashes of the tensors of an expert inside a merged model, and of its router rows.

    What the public expert has too is no trace, nor is a row of zeros.
    """
    index = merged.names.index(name) + 1
    tensors = {merged.manifest.tensors[key].sha256 for key in merged.headers[expert_file(name)].tensors}
    public = {merged.manifest.tensors[key].sha256 for key in merged.headers[expert_file(PUBLIC)].tensors}
    return frozenset(tensors - public), frozenset(_rows(merged, index))


def record_statement(
    before: Merged,
    traces: tuple[frozenset[str], frozenset[str]],
    name: str,
    after: Merged,
    *,
    act: str,
    reason: str,
    today: datetime.date,
) -> bytes:
    """Return what a record of a removal signs.

    Args:
        before: The model with the expert; its files may be gone by now.
        traces: The expert's ``traces_of`` it, taken while they were there.
        name: The expert.
        after: The model that was left.
        act: ``remove`` or ``replace``.
        reason: Why.
        today: When.
    """
    entry = before.manifest.experts[before.names.index(name) + 1]
    tensors, rows = (old - still for old, still in zip(traces, _inside(after), strict=True))
    replacement = next((other.digest for other in after.manifest.experts[1:] if other.name == name), None)
    record = Record(
        act=act,
        expert=Gone(name=name, digest=entry.digest, manifest_sha256=entry.manifest_sha256),
        replaced_by=replacement,
        anchor=before.manifest.anchor.digest,
        before=before.digest,
        after=after.digest,
        tensors=tuple(sorted(tensors)),
        rows=tuple(sorted(rows)),
        shared=sum(map(len, traces)) - len(tensors) - len(rows),
        reason=reason,
        date=today.isoformat(),
        check=f"flexctl verify MODEL --absent {name} --record {name}.removed.json --trust TRUST.toml",
    )
    return canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [
                {"name": field, "digest": {"sha256": digest.removeprefix("sha256:")}}
                for field, digest in (("after", record.after), ("before", record.before), ("expert", entry.digest))
            ],
            "predicateType": RECORD_PREDICATE,
            "predicate": encode(record),
        }
    )


def read_record(path: Path) -> tuple[Record, Envelope]:
    """Return what a record says, every field checked, and its envelope, whose signatures are not proven yet.

    Raises:
        UsageError: There is no such file.
        BundleError: It is no record; the message names the field.
    """
    envelope = read_envelope(path)
    if envelope is None:
        raise UsageError(f"{path}: no such file", field="record")
    statement = envelope.statement(str(path))
    if statement.get("predicateType") != RECORD_PREDICATE:
        raise BundleError(
            f"{path}: predicateType is {shown(statement.get('predicateType'))}; expected a removal record"
        )
    record: Record = decode(Record, statement.get("predicate"), str(path), "predicate")
    if record.act not in _ACTS:
        raise BundleError(f"{path}: predicate.act is {shown(record.act)}; expected {' or '.join(_ACTS)}")
    check_expert_name(record.expert.name, f"{path}: predicate.expert.name")
    _day(record, path)
    return record, envelope


def record_check(merged: Merged, path: Path, record: Record, envelope: Envelope, trust: Trust) -> Check:
    """Return whether a record is signed by somebody trusted and true of a merged model, as ``prove_record`` finds."""
    name = f"record {path.name}"
    try:
        found = prove_record(merged, path, record, envelope, trust)
    except BundleError as error:
        return Check(name=name, ok=False, detail=error.message)
    shared = f"; {found.shared} others have too" if found.shared else ""
    facts = (
        f"{found.act}d on {found.date}, signed by {found.signers}, because: {shown(found.reason)}",
        "this is the model that was left" if found.is_left else "this model descends from the one that was left",
        f"none of the {found.tensors} tensors and {found.rows} rows is inside{shared}",
    )
    return Check(name=name, ok=True, detail="; ".join(facts))


def prove_record(merged: Merged, path: Path, record: Record, envelope: Envelope, trust: Trust) -> Absence:
    """Return what a record proves of a merged model.

    Args:
        merged: The model at hand; that its bytes are those of its manifest is another check's business.
        path: The record's file.
        record: What it says.
        envelope: Its signatures. The day on which a key must have been valid is the record's own.
        trust: Whom to trust.

    Raises:
        BundleError: Nobody trusted has signed it, or it is not true of the model.
    """
    signers = signers_of(envelope, "merged", trust, str(path), day=_day(record, path))
    problems = list(_problems(merged, record))
    if problems:
        raise BundleError(f"{merged.path}: {problems[0]}{and_more(len(problems))}")
    return Absence(
        act=record.act,
        date=record.date,
        reason=record.reason,
        signers=named(signers),
        before=record.before,
        after=record.after,
        tensors=len(record.tensors),
        rows=len(record.rows),
        shared=record.shared,
        is_left=merged.digest == record.after,
    )


def _problems(merged: Merged, record: Record) -> Iterator[str]:
    gone, manifest = record.expert, merged.manifest
    if manifest.anchor.digest != record.anchor:
        yield f"anchor.digest is {manifest.anchor.digest}; the record's is {record.anchor}"
    if merged.digest == record.before:
        yield f"is the very model that {gone.name} was taken out of"
    elif merged.digest != record.after and (gone.name, gone.digest) not in [
        (stone.name, stone.digest) for stone in manifest.removed
    ]:
        yield (
            f"is neither the model that was left ({record.after}) nor made from it: it has no tombstone of "
            f"{gone.name} ({gone.digest})"
        )
    for entry in manifest.experts[1:]:
        if entry.digest == gone.digest:
            yield f"{entry.name} is the expert that went: {gone.digest}"
    tensors, rows = _inside(merged)
    for kind, traces, found in (("tensor", record.tensors, tensors), ("router row", record.rows, rows)):
        left = found.intersection(traces)
        if left:
            yield f"{len(left)} {kind}s of {gone.name} are inside, sha256 {min(left)}"


def _inside(merged: Merged) -> tuple[frozenset[str], frozenset[str]]:
    """Return the hashes of all tensors of a merged model, and of its router rows as their owners made them."""
    rows = {row for index in range(1, len(merged.manifest.experts)) for row in _rows(merged, index)}
    return frozenset(info.sha256 for info in merged.manifest.tensors.values()), frozenset(rows)


def _rows(merged: Merged, index: int) -> Iterator[str]:
    for span in merged.rows(index):
        row = span.load()
        if any(row):
            yield hashlib.sha256(row).hexdigest()


def _day(record: Record, path: Path) -> datetime.date:
    try:
        return datetime.date.fromisoformat(record.date)
    except ValueError:
        raise BundleError(f"{path}: predicate.date is {shown(record.date)}; expected YYYY-MM-DD") from None
