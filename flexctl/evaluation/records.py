"""What an evaluation leaves behind: a record of each document and task item, and results.json beside the bundle.

No text of documents and tasks stands in them; of tasks the model's own answers do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import indented_json
from flexctl.bundle.store import new_file
from flexctl.evaluation.domains import Content
from flexctl.evaluation.scoring import Score
from flexctl.runtime import Reporter

__all__ = ["write_results", "write_samples"]


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


def write_results(bundle: Path, results: Mapping[str, Any], reporter: Reporter) -> Path | None:
    """Write results.json into a bundle's directory, or NAME.results.json beside an expert.

    Args:
        bundle: The bundle.
        results: What is to stand there; paths, dates and texts must not.
        reporter: Hears where that cannot be.

    Returns:
        The file; None where nothing can be written.
    """
    path = bundle / "results.json" if bundle.is_dir() else bundle.with_suffix(".results.json")
    try:
        with new_file(path, overwrite=True, beside=bundle) as temporary:
            temporary.write_bytes(indented_json(_without_nan(results)))
    except OSError as error:
        reporter.note(f"{path}: is not written ({error.strerror})")
        return None
    return path


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
