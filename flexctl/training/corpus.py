"""An owner's text, prepared once: counted, split, tokenised into a file on disk."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.training.documents import read_documents
from flexctl.training.sample import draw_sample
from flexctl.training.tokens import Framed, TokenStream, frame_documents, pack

__all__ = ["Corpus", "Survey", "prepare_corpus", "text_digest"]

HELD_OUT_SHARE = 0.05
HELD_OUT_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one pass over the text finds.

    Attributes:
        documents: Training documents.
        num_bytes: Their UTF-8 bytes.
        held_out: Documents kept out of training.
        threshold: Largest seeded hash that is held out; -1 when none is.
        digest: sha256 of all documents in order.
    """

    documents: int
    num_bytes: int
    held_out: int
    threshold: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        survey: Counts.
        stream: Training tokens, on disk.
        held_out: Framed documents kept out of training, at most ``HELD_OUT_TOKENS`` tokens of them.
        read: Yields every document, read anew.
        seed: Of the split.
    """

    survey: Survey
    stream: TokenStream
    held_out: Sequence[Framed] | None
    read: Callable[[], Iterator[str]]
    seed: int

    def documents(self) -> Iterator[str]:
        """Yield the training documents, read anew."""
        return _part(self.read(), self.seed, self.survey.threshold, held_out=False)


def prepare_corpus(
    paths: Sequence[Path],
    tokenizer: Any,
    work: Path,
    *,
    text_field: str = "text",
    seed: int,
    reporter: Reporter,
) -> Corpus:
    """Return the owner's text as training tokens in ``work`` and held-out documents.

    One document in twenty is held out, at least one where there are two or more: those with the smallest seeded hash,
    so the split depends on the text and the seed alone. A token file of an earlier run over the same text is used
    again.

    Args:
        paths: What --data names.
        tokenizer: The anchor's.
        work: Folder for the token file.
        text_field: The column or field that holds the text.
        seed: Of the split.
        reporter: Hears of progress.

    Raises:
        UsageError: There is no document with text, or a file cannot be read.
    """
    read = partial(read_documents, paths, text_field)
    survey = _survey(read(), seed)
    if not survey.documents:
        raise UsageError(f"--data: no document with text in {', '.join(map(str, paths))}")
    held_out = None
    if survey.held_out:
        framed = frame_documents(tokenizer, _part(read(), seed, survey.threshold, held_out=True))
        held_out = draw_sample(framed, HELD_OUT_TOKENS, seed).documents
    else:
        reporter.warn("--data is a single document: nothing is held out, so no gain can be reported")
    file, mark = work / "own.tokens", work / "own.json"
    identity = json.dumps({**asdict(survey), "vocabulary": _vocabulary(tokenizer), "seed": seed}, sort_keys=True)
    stream = _packed(file, mark, identity)
    if stream is None:
        with reporter.progress("tokenising", survey.num_bytes, "bytes") as bar:

            def counted() -> Iterator[str]:
                for text in _part(read(), seed, survey.threshold, held_out=False):
                    bar.advance(len(text.encode()))
                    yield text

            stream = pack(file, frame_documents(tokenizer, counted()))
        with new_file(mark, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": identity, "tokens": stream.digest}))
    return Corpus(survey=survey, stream=stream, held_out=held_out, read=read, seed=seed)


def text_digest(paths: Sequence[Path], text_field: str, seed: int) -> str:
    """Return the digest that ``Survey`` has of the same text, after one pass over it."""
    return _survey(read_documents(paths, text_field), seed).digest


def _packed(file: Path, mark: Path, identity: str) -> TokenStream | None:
    """Return the tokens of an earlier run over the same text; None where there are none, or they are others."""
    try:
        kept = json.loads(mark.read_text())
        stream = TokenStream.open(file, kept["tokens"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return stream if kept["of"] == identity and stream.is_whole else None


def _survey(documents: Iterable[str], seed: int) -> Survey:
    digest = hashlib.sha256()
    ranks, sizes = array("Q"), array("Q")
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "big") + raw)
        ranks.append(_rank(text, seed))
        sizes.append(len(raw))
    wanted = max(1, round(len(ranks) * HELD_OUT_SHARE)) if len(ranks) > 1 else 0
    threshold = sorted(ranks)[wanted - 1] if wanted else -1
    kept = [size for rank, size in zip(ranks, sizes, strict=True) if rank > threshold]
    return Survey(
        documents=len(kept),
        num_bytes=sum(kept),
        held_out=len(ranks) - len(kept),
        threshold=threshold,
        digest=digest.hexdigest(),
    )


def _vocabulary(tokenizer: Any) -> str:
    """Return a digest of the vocabulary: another anchor's may be as large and mean other words."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()


def _rank(text: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[:8], "big")


def _part(documents: Iterable[str], seed: int, threshold: int, *, held_out: bool) -> Iterator[str]:
    for text in documents:
        if (_rank(text, seed) <= threshold) == held_out:
            yield text
