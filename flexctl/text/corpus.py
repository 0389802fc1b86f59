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

import numpy as np

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.text.documents import read_documents
from flexctl.text.sample import draw_sample
from flexctl.text.tokens import Framed, TokenStream, frame_documents, pack

__all__ = ["Corpus", "Split", "Survey", "prepare_corpus", "split_of", "text_digest"]

Array = np.ndarray[Any, Any]

HELD_OUT_SHARE = 0.05
HELD_OUT_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What one pass over the text finds.

    Attributes:
        documents: Training documents.
        num_bytes: Their UTF-8 bytes.
        held_out: Documents kept out of training.
        duplicates: Documents whose text had come before, in training or held out.
        digest: sha256 of all documents in order.
    """

    documents: int
    num_bytes: int
    held_out: int
    duplicates: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which texts are held out: each with all its copies.

    Attributes:
        seed: Of the ranks.
        ranks: Seeded hashes of the texts held out.
    """

    seed: int
    ranks: frozenset[int]

    def training(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are not held out."""
        return (text for text in documents if _rank(text, self.seed) not in self.ranks)

    def held_out(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are held out."""
        return (text for text in documents if _rank(text, self.seed) in self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        survey: Counts.
        stream: Training tokens, on disk.
        held_out: Framed documents kept out of training, at most ``HELD_OUT_TOKENS`` tokens of them.
        read: Yields every document, read anew.
        split: Tells what is held out.
    """

    survey: Survey
    stream: TokenStream
    held_out: Sequence[Framed] | None
    read: Callable[[], Iterator[str]]
    split: Split

    def documents(self) -> Iterator[str]:
        """Yield the training documents, read anew."""
        return self.split.training(self.read())


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

    One document in twenty is held out, at least one where there are two different ones: those with the smallest seeded
    hash, so the split depends on the text and the seed alone. Copies of a text stay together: one with more copies than
    there is room for stays in training. A token file of an earlier run over the same text is used again.

    Args:
        paths: The owner's text.
        tokenizer: The anchor's.
        work: Folder for the token file.
        text_field: The column or field that holds the text.
        seed: Of the split.
        reporter: Hears of progress.

    Raises:
        UsageError: There is no document with text, or a file cannot be read.
    """
    read = partial(read_documents, paths, text_field)
    survey, split = _survey(read(), seed)
    if not survey.documents:
        raise UsageError(f"no document with text in {', '.join(map(str, paths))}", field="data")
    held_out = None
    if survey.held_out:
        framed = frame_documents(tokenizer, split.held_out(read()))
        held_out = draw_sample(framed, HELD_OUT_TOKENS, seed).documents
    else:
        copies = f" {survey.documents} times" if survey.duplicates else ""
        reporter.warn(f"`data` is a single document{copies}: nothing is held out, so no gain can be reported")
    if survey.duplicates:
        total = survey.documents + survey.held_out
        reporter.note(f"{survey.duplicates} of {total} documents are copies of others; copies are held out together")
    file, mark = work / "own.tokens", work / "own.json"
    identity = json.dumps({**asdict(survey), "reading": _reading(tokenizer), "seed": seed}, sort_keys=True)
    stream = _packed(file, mark, identity)
    if stream is None:
        with reporter.progress("tokenising", survey.num_bytes, "bytes") as bar:

            def counted() -> Iterator[str]:
                for text in split.training(read()):
                    bar.advance(len(text.encode()))
                    yield text

            stream = pack(file, frame_documents(tokenizer, counted()))
        with new_file(mark, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": identity, "tokens": stream.digest}))
    return Corpus(survey=survey, stream=stream, held_out=held_out, read=read, split=split)


def text_digest(paths: Sequence[Path], text_field: str, seed: int) -> str:
    """Return the digest that ``Survey`` has of the same text, after one pass over it."""
    survey, _ = _survey(read_documents(paths, text_field), seed)
    return survey.digest


def split_of(documents: Iterable[str], seed: int) -> Split:
    """Return which of some documents training with this seed holds out, as ``prepare_corpus`` does."""
    return _survey(documents, seed)[1]


def _packed(file: Path, mark: Path, identity: str) -> TokenStream | None:
    """Return the tokens of an earlier run over the same text; None where there are none, or they are others."""
    try:
        kept = json.loads(mark.read_text())
        stream = TokenStream.open(file, kept["tokens"])
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None
    return stream if kept["of"] == identity and stream.is_whole else None


def _survey(documents: Iterable[str], seed: int) -> tuple[Survey, Split]:
    digest = hashlib.sha256()
    found, sizes = array("Q"), array("Q")
    for text in documents:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "big"))
        digest.update(raw)
        found.append(_rank(text, seed))
        sizes.append(len(raw))
    ranks, copies = np.unique(np.asarray(found), return_counts=True)
    held_out = _held_out(ranks, copies)
    is_kept = ~np.isin(np.asarray(found), held_out)
    survey = Survey(
        documents=int(is_kept.sum()),
        num_bytes=int(np.asarray(sizes)[is_kept].sum()),
        held_out=len(found) - int(is_kept.sum()),
        duplicates=len(found) - len(ranks),
        digest=digest.hexdigest(),
    )
    return survey, Split(seed=seed, ranks=frozenset(held_out.tolist()))


def _held_out(ranks: Array, copies: Array) -> Array:
    """Return the ranks of the texts to hold out: the smallest whose copies fit into the share that is held out.

    Args:
        ranks: Of the different texts, in order, (n,), uint64.
        copies: How often each comes, (n,), int64.
    """
    if len(ranks) < 2:
        return ranks[:0]
    room = max(1, round(int(copies.sum()) * HELD_OUT_SHARE))
    chosen = []
    for place, count in enumerate(copies.tolist()):
        if count <= room:
            chosen.append(place)
            room -= count
        if not room:
            break
    return ranks[chosen or [int(copies.argmin())]]


def _reading(tokenizer: Any) -> str:
    """Return a digest of what decides a text's tokens: another anchor's vocabulary may be as large and mean others."""
    about = [tokenizer.get_vocab(), tokenizer.split_special_tokens]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _rank(text: str, seed: int) -> int:
    hasher = hashlib.sha256(f"{seed}\0".encode())
    hasher.update(text.encode())
    return int.from_bytes(hasher.digest()[:8], "big")
