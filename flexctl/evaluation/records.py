"""What an evaluation leaves behind: a record of each document and task item, and results.json beside the bundle.

results.json holds figures, digests and settings: no path, no date and no text. It can be read again.

No text of documents and tasks stands in them; of tasks the model's own answers do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.names import shown
from flexctl.bundle.store import new_file
from flexctl.errors import BundleError, UsageError
from flexctl.evaluation.figures import Figures
from flexctl.runtime import Reporter

if TYPE_CHECKING:
    from flexctl.evaluation.domains import Content
    from flexctl.evaluation.scoring import Score

__all__ = ["SCHEMA_VERSION", "read_results", "write_results", "write_samples"]

SCHEMA_VERSION = 1
"""Of results.json."""

_FROM = "results_from"
_AGAIN = "evaluate again: results of this version hold all that a page shows"


def write_samples(
    path: Path,
    contents: Sequence[Content],
    scores: Mapping[str, Score],
    experts: Sequence[str],
    answers: Iterable[Mapping[str, Any]],
    *,
    overwrite: bool,
) -> None:
    """Write a line of JSON for each document, which its hash stands for, and for each item of a task.

    Args:
        path: File to write.
        contents: The domains; their texts are read anew.
        scores: By domain.
        experts: Names, in the order of the scores' shares.
        answers: Records of task items.
        overwrite: Whether a file that exists may be replaced.

    Raises:
        UsageError: The file exists and may not be replaced.
    """
    with new_file(path, overwrite=overwrite) as temporary, temporary.open("x", encoding="utf-8") as output:
        for content in contents:
            for record in _records(content, scores[content.domain.name], experts):
                output.write(json.dumps(record) + "\n")
        for answer in answers:
            output.write(json.dumps(_without_nan(answer)) + "\n")


def _records(content: Content, score: Score, experts: Sequence[str]) -> Iterator[dict[str, Any]]:
    rows = zip(content.domain.documents(), score.per_document.tolist(), score.document_shares.tolist(), strict=False)
    for index, (text, (nll, tokens, num_bytes), shares) in enumerate(rows):
        yield {
            "domain": content.domain.name,
            "index": index,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "bytes": int(num_bytes),
            "tokens": int(tokens),
            "nll": nll / tokens,
            "bits_per_byte": nll / math.log(2) / num_bytes,
            "experts": {name: share / tokens for name, share in zip(experts, shares, strict=True)},
        }


def write_results(bundle: Path, figures: Figures, reporter: Reporter) -> Path | None:
    """Write results.json into a bundle's directory, or NAME.results.json beside an expert.

    Args:
        bundle: The bundle.
        figures: What is to stand there, but for the path of another model and words of documents.
        reporter: Hears where that cannot be.

    Returns:
        The file; None where nothing can be written.
    """
    path = bundle / "results.json" if bundle.is_dir() else bundle.with_suffix(".results.json")
    fields = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(_public(figures))}
    text = json.dumps(_without_nan(fields), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        with new_file(path, overwrite=True, beside=bundle) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        reporter.note(f"{path}: is not written ({error.strerror})")
        return None
    return path


def _public(figures: Figures) -> Figures:
    """Return figures without paths and texts."""
    if figures.compare is None:
        return figures
    moved = [dataclasses.replace(document, words=None) for document in figures.compare.moved]
    return dataclasses.replace(figures, compare=dataclasses.replace(figures.compare, path=None, moved=moved))


def read_results(path: Path) -> Figures:
    """Return the figures in a results.json, or in what ``evaluate --json`` printed.

    Args:
        path: The file. Fields that this version does not know are left out.

    Raises:
        UsageError: It cannot be read, a field is missing or has another type, or a domain lacks a figure.
    """
    try:
        value = parse_json(read_bytes(path), str(path))
    except BundleError as error:
        raise UsageError(error.message, hint="give a results.json of `flexctl evaluate`", field=_FROM) from error
    if not isinstance(value, dict) or value.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: has no schema_version {SCHEMA_VERSION}", hint=_AGAIN, field=_FROM)
    figures: Figures = _decode(Figures, value, str(path), "")
    for place, names, expected in _names(figures):
        if missing := [name for name in expected if name not in names]:
            raise UsageError(f"{path}: {place} has no {shown(missing[0])}", hint=_AGAIN, field=_FROM)
    if len({len(row) for shares in figures.routing_layers.values() for row in shares.values()}) > 1:
        raise UsageError(f"{path}: rows of routing_layers differ in length", hint=_AGAIN, field=_FROM)
    return _public(figures)


def _names(figures: Figures) -> Iterator[tuple[str, Collection[Any], Iterable[Any]]]:
    """Yield (place, names there, names that must be there), so that figures fit together."""
    domains, experts = figures.perplexity, figures.experts
    members = [member.name for member in figures.lineage.members]
    yield "lineage.members", members, experts
    yield "experts", experts, members
    for field in ("routing", "routing_layers"):
        yield field, getattr(figures, field), domains
        for name, shares in getattr(figures, field).items():
            yield f"{field}.{name}", shares, experts
            yield "experts", experts, shares
    yield "public_alone", figures.public_alone, domains if figures.public_alone else ()
    yield "public_alone_change", figures.public_alone_change, figures.public_alone
    for field in ("ablation", "top_k", "baselines"):
        scores, changes = getattr(figures, field), getattr(figures, f"{field}_change")
        yield field, scores, changes
        yield f"{field}_change", changes, scores
        yield from ((f"{field}.{name}", row, domains) for name, row in scores.items())
        yield from ((f"{field}_change.{name}", row, domains) for name, row in changes.items())
    if figures.compare is not None:
        yield "compare.domains", figures.compare.domains, domains
        yield "perplexity", domains, figures.compare.domains


def _decode(kind: Any, value: Any, where: str, field: str) -> Any:
    """Return parsed JSON as a value of type ``kind``; a number that is null was none."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where, field)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _decode(arguments[0], value, where, field)
    if origin is dict and isinstance(value, dict):
        return _decode_items(arguments[0], arguments[1], value, where, field)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_decode(arguments[0], item, where, f"{field}.{i}") for i, item in enumerate(value))
    if kind is Path:
        return None
    if kind is float and (value is None or type(value) in (int, float)):
        return math.nan if value is None else value
    if type(value) is kind:
        return value
    raise UsageError(f"{where}: {field} is {shown(value)}; expected {kind.__name__}", hint=_AGAIN, field=_FROM)


def _decode_items(key: Any, kind: Any, value: dict[str, Any], where: str, field: str) -> dict[Any, Any]:
    if key is int and not all(map(str.isdecimal, value)):
        raise UsageError(f"{where}: a name in {field} is no number", hint=_AGAIN, field=_FROM)
    return {key(name): _decode(kind, item, where, f"{field}.{name}") for name, item in value.items()}


def _decode_fields(kind: Any, value: dict[str, Any], where: str, field: str) -> Any:
    hints, found = typing.get_type_hints(kind), {}
    for item in dataclasses.fields(kind):
        place = f"{field}.{item.name}" if field else item.name
        if item.name in value:
            found[item.name] = _decode(hints[item.name], value[item.name], where, place)
        elif item.default is item.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: {place} is missing", hint=_AGAIN, field=_FROM)
    return kind(**found)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
