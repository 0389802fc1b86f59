"""Everything that can be proven of a bundle, check by check: the reading half of docs/format.md.

Opening stops at the first fault; this goes on, so that one run tells all.
"""

from __future__ import annotations

import datetime
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.card import merged_card
from flexctl.bundle.codec import indented_json, read_bytes
from flexctl.bundle.composition import Composition, compose_anchor, compose_merged
from flexctl.bundle.expert import Expert, check_fits
from flexctl.bundle.hashing import Advance, StoredTensor, by_file, check_tensors, hash_file, in_parallel, locked, pieces
from flexctl.bundle.index import is_index, open_index
from flexctl.bundle.layout import ROUTER_TENSOR, index_json
from flexctl.bundle.manifest import MANIFEST_FILE, TOLERATED, AnchorManifest, TensorInfo, has_expired
from flexctl.bundle.merged import CARD_FILE, CONFIG_FILE, INDEX_FILE, Merged, expert_file, weight_files
from flexctl.bundle.names import and_more
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.router import RouterFile
from flexctl.bundle.seals import known, remember, seal
from flexctl.bundle.signatures import read_signature, signature_path
from flexctl.bundle.tensors import Span
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import Reporter

__all__ = ["Check", "check_bundle", "prove"]

Bundle = Anchor | Expert | Merged | RouterFile


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that must hold: its name, whether it does, and what was found."""

    name: str
    ok: bool
    detail: str


def check_bundle(
    path: Path,
    *,
    anchor: Anchor | None,
    absent: Mapping[str, Expert | None],
    today: datetime.date | None,
    advance: Advance,
) -> tuple[str | None, list[Check]]:
    """Hash a bundle and check all that its format demands.

    Args:
        path: The bundle.
        anchor: The anchor that it must have been made of; None leaves that open.
        absent: Names that a merged model must not have, each with the expert's own file where it is at hand.
        today: The day that rights are compared with; None takes expired ones.
        advance: Told the bytes hashed, by one thread at a time.

    Returns:
        The digest, None if the bundle cannot be opened, and the checks in the order in which they were made.

    Raises:
        UsageError: There is nothing at the path, or it is no merged model and something shall be absent.
    """
    if is_index(path):
        return _check_index(path, absent, advance)
    try:
        bundle = open_bundle(path)
    except BundleError as error:
        return None, [Check(name="structure", ok=False, detail=error.message)]
    if absent and not isinstance(bundle, Merged):
        raise UsageError(f"{path} is no merged model but an {bundle.manifest.kind}")
    checks = [
        Check(name="structure", ok=True, detail=f"{bundle.manifest.kind}: manifest, digest and headers agree"),
        _check(
            "tensors",
            _tensor_problems(bundle, _tensor_files(bundle), locked(advance)),
            f"{len(bundle.manifest.tensors)} have their hash",
        ),
    ]
    place = signature_path(path)
    if place.exists():
        checks.append(_check("signature", _signature_problems(place, bundle), "signs this very bundle"))
    if isinstance(bundle, Merged):
        checks += _merged_checks(bundle, anchor, today)
        checks += [_check(f"absent {name}", *_absence(bundle, name, file)) for name, file in absent.items()]
    elif isinstance(bundle, Anchor):
        checks += _anchor_checks(bundle)
    else:
        checks += _owner_checks(bundle, anchor, today)
    return bundle.digest, checks


def _check_index(path: Path, absent: Mapping[str, Expert | None], advance: Advance) -> tuple[str | None, list[Check]]:
    if absent:
        raise UsageError(f"{path} is no merged model but an index")
    try:
        manifest = open_index(path).manifest
    except BundleError as error:
        return None, [Check(name="structure", ok=False, detail=error.message)]
    return manifest.digest, [
        Check(name="structure", ok=True, detail="index: manifest, digest and sizes agree"),
        _check("files", _index_problems(path, manifest.files, advance), f"{len(manifest.files)} have their hash"),
        _check("nothing else", _unknown_names(path, {MANIFEST_FILE, *manifest.files}, ()), "no unknown file"),
        _check("private", _open_to_others(path), "nobody but its owner may read it"),
    ]


def _index_problems(path: Path, files: Mapping[str, str], advance: Advance) -> Iterator[str]:
    for name, sha256 in files.items():
        if hash_file(path / name) != sha256:
            yield f"{path / name}: its bytes are not those of the manifest"
        advance((path / name).stat().st_size)


def _open_to_others(path: Path) -> Iterator[str]:
    for item in sorted(path.iterdir()):
        if item.stat().st_mode & 0o077:
            yield f"{item}: others may read it or write to it (chmod 600)"


def prove(bundle: Anchor | Expert | Merged, reporter: Reporter) -> None:
    """Hash what a model is built from; files that were hashed before and did not change since are taken as they are.

    Args:
        bundle: What was opened.
        reporter: Where progress goes.

    Raises:
        BundleError: A tensor or file is not what the manifest promises.
    """
    trusted = known()
    pending = {
        file: spans for file, spans in _tensor_files(bundle).items() if _seal(bundle, file, spans) not in trusted
    }
    total = sum(span.stop - span.start for spans in pending.values() for span in spans.values())
    with reporter.progress("hashing", total, "bytes") as progress:
        problems = [*_tensor_problems(bundle, pending, locked(progress.advance))]
    if not isinstance(bundle, Expert):
        problems += _file_problems(bundle)
    if problems:
        raise BundleError(problems[0], hint="fetch it again; flexctl verify tells all")


def _check(name: str, problems: Iterable[str], fine: str) -> Check:
    found = []
    try:
        found += list(problems)
    except BundleError as error:
        found.append(error.message)
    more = and_more(len(found))
    return Check(name=name, ok=not found, detail=found[0] + more if found else fine)


def _signature_problems(place: Path, bundle: Bundle) -> Iterator[str]:
    """Whose it is takes a trust file; that it is of this bundle does not."""
    read_signature(place, bundle.manifest)
    yield from ()


def _tensor_problems(bundle: Bundle, files: Mapping[Path, Mapping[str, Span]], advance: Advance) -> Iterator[str]:
    """Hash every tensor of some of a bundle's files, several at a time; files that are right are remembered."""
    before = {file: _seal(bundle, file, spans) for file, spans in files.items()}
    work = [(file, piece) for file, spans in files.items() for piece in pieces(spans)]
    found = in_parallel(lambda item: list(check_tensors(*item, bundle.manifest.tensors, advance)), work)
    wrong = {file for (file, _), problems in zip(work, found, strict=True) if problems}
    remember(line for file, line in before.items() if file not in wrong)
    for problems in found:
        yield from problems


def _seal(bundle: Bundle, file: Path, spans: Mapping[str, Span]) -> str:
    return seal(file, {name: bundle.manifest.tensors[name] for name in spans})


def _tensor_files(bundle: Bundle) -> dict[Path, dict[str, Span]]:
    if isinstance(bundle, Merged):
        return {bundle.path / file: dict(bundle.headers[file].tensors) for file in weight_files(bundle.manifest)}
    spans = {ROUTER_TENSOR: bundle.span} if isinstance(bundle, RouterFile) else bundle.spans
    return by_file(spans)


def _file_problems(bundle: Anchor | Merged) -> Iterator[str]:
    """Hash the files that are listed as such; weight files of a merged model only as far as their tensors."""
    heads = {} if isinstance(bundle, Anchor) else {name: bundle.headers[name] for name in weight_files(bundle.manifest)}
    for name, sha256 in bundle.manifest.files.items():
        if hash_file(bundle.path / name, len(heads[name].head) if name in heads else None) != sha256:
            yield f"{bundle.path / name}: its bytes are not those of the manifest"


def _unknown_files(bundle: Anchor | Merged) -> Iterator[str]:
    known = {MANIFEST_FILE, *bundle.manifest.files, *(path.name for path in _tensor_files(bundle))}
    if isinstance(bundle, Anchor):
        # An anchor's card is made for the Hub; a download by other means than flexctl has it too.
        known |= {INDEX_FILE, CARD_FILE}
    yield from _unknown_names(bundle.path, known, TOLERATED)


def _unknown_names(path: Path, known: set[str], tolerated: Sequence[str]) -> Iterator[str]:
    for item in sorted(path.iterdir()):
        fits = item.is_file() and any(fnmatch.fnmatchcase(item.name, pattern) for pattern in tolerated)
        if item.name not in known and not fits:
            yield f"{item}: is no part of the bundle"


def _anchor_checks(anchor: Anchor) -> Iterator[Check]:
    manifest = anchor.manifest
    yield _check("files", _file_problems(anchor), f"{len(manifest.files)} have their hash")
    yield _check("nothing else", _unknown_files(anchor), "no unknown file")
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    problems = [
        f"{anchor.path / CONFIG_FILE}: {name} is {anchor.config.get(name)}; the manifest has {expected}"
        for name, expected in ((name, getattr(manifest.architecture, name)) for name in sizes)
        if anchor.config.get(name) != expected or manifest.moe_config.get(name) != expected
    ]
    yield _check("config", problems, "sizes are those of config.json and of moe_config")


def _owner_checks(bundle: Expert | RouterFile, anchor: Anchor | None, today: datetime.date | None) -> Iterator[Check]:
    if isinstance(bundle, Expert):
        expires = bundle.manifest.data.expires
        problems = [f"{bundle.path}: data.expires is {expires}, which is past"]
        yield _check("rights", problems if today and has_expired(expires, today) else [], _until(expires))
    if anchor is not None:
        yield _check("anchor", _fit_problems(bundle, anchor), f"made for {anchor.manifest.name}")


def _fit_problems(bundle: Expert | RouterFile, anchor: Anchor) -> Iterator[str]:
    if isinstance(bundle, Expert):
        check_fits(bundle, anchor.manifest.ref, anchor.manifest.architecture)
    elif bundle.manifest.anchor.digest != anchor.digest:
        yield f"{bundle.path}: anchor.digest is {bundle.manifest.anchor.digest}; expected {anchor.digest}"


def _merged_checks(merged: Merged, anchor: Anchor | None, today: datetime.date | None) -> Iterator[Check]:
    manifest = merged.manifest
    yield _check("files", _file_problems(merged), f"{len(manifest.files)} have their hash")
    yield _check("nothing else", _unknown_files(merged), "no unknown file")
    yield _check("index", _text_problems(merged, INDEX_FILE, _index(merged)), "lists every tensor in its file")
    card = merged_card(manifest).encode("utf-8")
    yield _check("card", _text_problems(merged, CARD_FILE, card), "says what the manifest says")
    config = merged.family.merged_config(merged.config, len(manifest.experts), manifest.num_experts_per_tok_requested)
    yield _check("config", _text_problems(merged, CONFIG_FILE, indented_json(config)), "counts the experts")
    try:
        composition = compose_merged(merged)
    except BundleError as error:
        yield Check(name="experts", ok=False, detail=error.message)
        return
    count = len(manifest.experts) - 1
    yield _check("experts", _license_problems(merged, composition), f"{count} carry their owner's manifest")
    yield _check("router rows", _row_problems(merged, composition), "each expert's are its owner's")
    yield _check("rights", _right_problems(merged, today), "none has expired")
    if anchor is not None:
        fine = f"shared weights, public expert, tokenizer and config are those of {anchor.manifest.name}"
        yield _check("anchor", _anchor_problems(merged, composition, anchor), fine)


def _index(merged: Merged) -> bytes:
    files = weight_files(merged.manifest)
    weight_map = {key: file for file in files for key in merged.headers[file].tensors}
    return index_json(weight_map, merged.manifest.tensors)


def _text_problems(merged: Merged, file: str, expected: bytes) -> Iterator[str]:
    if read_bytes(merged.path / file) != expected:
        yield f"{merged.path / file}: is not what the manifest makes of it"


def _license_problems(merged: Merged, composition: Composition) -> Iterator[str]:
    if merged.manifest.license != composition.license:
        yield (
            f"{merged.path / MANIFEST_FILE}: license is {merged.manifest.license!r}; "
            f"the experts' make it {composition.license!r}"
        )


def _row_problems(merged: Merged, composition: Composition) -> Iterator[str]:
    for index, part in enumerate(composition.parts):
        rows = b"".join(span.load() for span in merged.rows(index))
        if part.rows_sha256 is None and any(rows):
            yield f"{merged.path}: public: its router rows are not zero"
        if part.rows_sha256 not in (None, hashlib.sha256(rows).hexdigest()):
            yield f"{merged.path}: {part.entry.name}: its router rows are not its owner's"


def _right_problems(merged: Merged, today: datetime.date | None) -> Iterator[str]:
    for entry in merged.manifest.experts:
        if today and has_expired(entry.expires, today):
            yield f"{merged.path}: experts.{entry.index}.expires ({entry.name}) is {entry.expires}, which is past"


def _anchor_problems(merged: Merged, composition: Composition, anchor: Anchor) -> Iterator[str]:
    """Compare what both bundles' manifests promise; that the bytes keep it is another check's business."""
    origin = compose_anchor(anchor)
    manifest: AnchorManifest = anchor.manifest
    if merged.manifest.anchor.digest != manifest.digest:
        yield f"{merged.path}: anchor.digest is {merged.manifest.anchor.digest}; expected {manifest.digest}"
        return
    if composition.parts[0].entry != origin.parts[0].entry or composition.architecture != origin.architecture:
        yield f"{merged.path}: experts.0 is not what {anchor.path / MANIFEST_FILE} says"
    mine = {name: piece.info for name, piece in composition.shared.items()}
    if mine != {name: piece.info for name, piece in origin.shared.items()}:
        yield f"{merged.path}: shared tensors are not the anchor's"
    if _infos(composition) != _infos(origin):
        yield f"{merged.path}: the public expert's tensors are not the anchor's"
    for name in composition.stock.keys() | origin.stock.keys():
        if composition.stock.get(name, ("", ""))[1] != origin.stock.get(name, ("", ""))[1]:
            yield f"{merged.path / name}: is not the anchor's"
    requested = merged.manifest.num_experts_per_tok_requested
    expected = merged.family.merged_config(manifest.moe_config, len(merged.manifest.experts), requested)
    if merged.config != expected:
        yield f"{merged.path / CONFIG_FILE}: is not the anchor's moe_config with counts"


def _infos(composition: Composition) -> list[TensorInfo]:
    public = composition.parts[0].feed_forward.values()
    return [source.info for source in public if isinstance(source, StoredTensor)]


def _absence(merged: Merged, name: str, expert: Expert | None) -> tuple[Iterator[str], str]:
    """Return what of an expert is in a merged model after all, and what to say if nothing is.

    As every byte is accounted for by the experts that are listed, a name that is not listed is not inside. Where
    the expert's own file is at hand, its tensors and rows are looked for under any name.
    """
    buried = [stone for stone in merged.manifest.removed if stone.name == name]
    facts = ["no expert, file or manifest entry has this name"]
    if buried:
        facts = ["a tombstone has this name, no expert or file"]
    if expert is not None and expert.manifest.rank is None:
        facts.append(f"nor are any of the {len(expert.manifest.tensors)} tensors of {expert.path} inside")
    elif expert is not None:
        facts.append(f"nor are the router rows of {expert.path}; its low-rank matrices were not expanded to compare")
    return _presence(merged, name, expert), "; ".join(facts)


def _presence(merged: Merged, name: str, expert: Expert | None) -> Iterator[str]:
    manifest = merged.manifest
    if name in merged.names or name in (manifest.router.tuned_with or ()):
        yield f"{merged.path / MANIFEST_FILE}: {name} is listed"
    if (merged.path / expert_file(name)).exists():
        yield f"{merged.path / expert_file(name)}: is there"
    if expert is None:
        return
    public = {merged.manifest.tensors[key].sha256 for key in merged.headers[expert_file("public")].tensors}
    inside = {info.sha256: key for key, info in manifest.tensors.items()}
    for tensor, info in expert.manifest.tensors.items():
        if info.sha256 in inside and info.sha256 not in public:
            yield f"{merged.path}: tensor {inside[info.sha256]} is {tensor} of {expert.path}"
    rows = expert.spans[ROUTER_TENSOR]
    for layer in range(rows.shape[0]):
        row = rows.rows(layer, layer + 1).load()
        for index, entry in enumerate(manifest.experts):
            if any(row) and merged.rows(index)[layer].load() == row:
                yield f"{merged.path}: layer {layer}: the router row of {entry.name} is that of {expert.path}"


def _until(expires: str | None) -> str:
    return f"last through {expires}" if expires else "never end"
