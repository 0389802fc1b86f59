"""An owner's text, prepared in two passes: counted and split, then tokenised into a file on disk."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from flexctl.bundle.store import new_file
from flexctl.runtime import Progress, Reporter
from flexctl.text.decontamination import Decontamination
from flexctl.text.documents import PassageSampler, read_documents
from flexctl.text.inventory import Inventory, Pace, Ranks, Stocktaking, rank_of, take_inventory
from flexctl.text.near_duplicates import NearDuplicates
from flexctl.text.sample import Sampler
from flexctl.text.tokens import Framed, TokenStream, frame_documents, pack

__all__ = ["Corpus", "Split", "Survey", "prepare_corpus", "split_of"]

HELD_OUT_SHARE = 0.05
HELD_OUT_TOKENS = 65_536
_NOTHING = Decontamination()


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What two passes over the text find.

    Attributes:
        documents: Training documents.
        num_bytes: Their UTF-8 bytes.
        held_out: Documents kept out of training.
        duplicates: Documents whose text had come before, in training or held out.
        near_duplicates: Others that are nearly the same as one before; None where nobody counted.
        contaminated: Documents left out as they share words with test text; None where there is none.
        digest: sha256 of all documents in order.
    """

    documents: int
    num_bytes: int
    held_out: int
    duplicates: int
    near_duplicates: int | None
    contaminated: int | None
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which texts are held out, each with all its copies, and which are left out altogether.

    Attributes:
        seed: Of the ranks.
        ranks: Seeded hashes of the texts held out.
        left_out: Of those that are in neither part.
    """

    seed: int
    ranks: Ranks
    left_out: Ranks

    def training(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are trained on."""
        return (text for text, is_held_out in self.parted(documents) if not is_held_out)

    def held_out(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are held out."""
        return (text for text, is_held_out in self.parted(documents) if is_held_out)

    def parted(self, documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield each document of either part, and whether it is held out."""
        for text in documents:
            rank = rank_of(text, self.seed)
            if rank not in self.left_out:
                yield text, rank in self.ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Text ready to train on.

    Attributes:
        survey: Counts.
        stream: Training tokens, on disk.
        held_out: Framed documents kept out of training, at most ``HELD_OUT_TOKENS`` tokens of them.
        passages: Of training documents, as ``sample_passages`` chooses them.
        read: Yields every document, read anew.
        split: Tells what is held out.
    """

    survey: Survey
    stream: TokenStream
    held_out: Sequence[Framed] | None
    passages: Sequence[str]
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
    passages: int = 0,
    decontamination: Decontamination = _NOTHING,
    near_duplicates: bool = False,
    cache: Path | None = None,
    reporter: Reporter,
) -> Corpus:
    """Return the owner's text as training tokens and held-out documents, after two passes over it.

    One document in twenty is held out, at least one where there are two different ones: those with the smallest seeded
    hash, so the split depends on the text and the seed alone. Copies of a text stay together: one with more copies than
    there is room for stays in training. Tokens of an earlier run over the same text are used again.

    Args:
        paths: The owner's text.
        tokenizer: The anchor's.
        work: Folder for what is needed on the way, and for the tokens where no cache is given.
        text_field: The column or field that holds the text.
        seed: Of the split.
        passages: Of training documents to choose, at most.
        decontamination: Test text; documents that share words with it are left out.
        near_duplicates: Whether to count documents that are nearly the same as one before.
        cache: Folder that keeps tokens for other runs. Several may use it at once.
        reporter: Hears of progress.

    Raises:
        UsageError: There is no document with text, or a file cannot be read.
    """
    with NearDuplicates.within(work) if near_duplicates else nullcontext() as near:
        inventory = take_inventory(
            Stocktaking(
                paths, text_field, seed, decontamination=decontamination, near_duplicates=near, reporter=reporter
            )
        )
    split = _split(inventory)
    if not len(split.ranks):
        copies = f" {len(inventory.ranks)} times" if inventory.duplicates else ""
        reporter.warn(f"`data` is a single document{copies}: nothing is held out, so no gain can be reported")
    read = partial(read_documents, paths, text_field)
    place = _Place.of(_identity(inventory, tokenizer, decontamination), work, cache)
    return _tokenised(inventory, split, read, tokenizer, place, passages, reporter)


def split_of(documents: Iterable[str], seed: int) -> Split:
    """Return which of some documents training with this seed holds out, as ``prepare_corpus`` does."""
    return Split(seed=seed, ranks=_held_out(sorted(rank_of(text, seed) for text in documents)), left_out=Ranks())


def _split(inventory: Inventory) -> Split:
    return Split(seed=inventory.seed, ranks=_held_out(inventory.ranks), left_out=inventory.left_out)


def _tokenised(
    inventory: Inventory,
    split: Split,
    read: Callable[[], Iterator[str]],
    tokenizer: Any,
    place: _Place,
    passages: int,
    reporter: Reporter,
) -> Corpus:
    """Return the corpus after the second pass: training documents are tokenised, unless their tokens are kept."""
    stream = place.kept()
    with reporter.progress("tokenising" if stream is None else "reading again", inventory.num_bytes, "bytes") as bar:
        second = _SecondPass(split, passages, bar)
        training = second.training(read(), tokenizer, needs_all=stream is None)
        if stream is None:
            stream = place.keep(training)
        else:
            deque(training, maxlen=0)
    survey = Survey(
        documents=second.counts[False],
        num_bytes=second.num_bytes,
        held_out=second.counts[True],
        duplicates=inventory.duplicates,
        near_duplicates=inventory.near_duplicates,
        contaminated=inventory.contaminated,
        digest=inventory.digest,
    )
    return Corpus(
        survey=survey,
        stream=stream,
        held_out=second.sampler.drawn().documents or None,
        passages=second.passages.chosen(),
        read=read,
        split=split,
    )


class _SecondPass:
    """Documents as they come once more: parted, counted and sampled.

    Args:
        split: Tells what is held out.
        passages: Of training documents to choose, at most.
        bar: Hears of every document.

    Attributes:
        counts: Documents, by whether they are held out.
        num_bytes: UTF-8 bytes of those to train on.
        sampler: Draws from those that are held out.
        passages: Chooses from those to train on.
    """

    def __init__(self, split: Split, passages: int, bar: Progress) -> None:
        self._split, self._pace = split, Pace(bar)
        self._are_held_out: deque[bool] = deque()
        self.counts = {True: 0, False: 0}
        self.num_bytes = 0
        self.sampler = Sampler(HELD_OUT_TOKENS, split.seed)
        self.passages = PassageSampler(passages, split.seed)

    def training(self, texts: Iterable[str], tokenizer: Any, *, needs_all: bool) -> Iterator[Framed]:
        """Yield the documents to train on, framed; unless ``needs_all`` none, as only those held out are tokenised."""
        for framed in frame_documents(tokenizer, self._documents(texts, needs_all)):
            if self._are_held_out.popleft():
                self.sampler.add(framed)
            else:
                yield framed

    def _documents(self, texts: Iterable[str], needs_all: bool) -> Iterator[str]:
        for text, is_held_out in self._split.parted(texts):
            size = len(text.encode())
            self._pace.add(size)
            self.counts[is_held_out] += 1
            if not is_held_out:
                self.num_bytes += size
                self.passages.add(text)
            if is_held_out or needs_all:
                self._are_held_out.append(is_held_out)
                yield text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where tokens lie, and how they are known again.

    Attributes:
        tokens: Their file.
        mark: A file that says what they are of, and their digest. It is written last.
        identity: All that decides them.
    """

    tokens: Path
    mark: Path
    identity: str

    @classmethod
    def of(cls, identity: str, work: Path, cache: Path | None) -> _Place:
        if cache is None:
            return cls(tokens=work / "own.tokens", mark=work / "own.json", identity=identity)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = hashlib.sha256(identity.encode()).hexdigest()
        return cls(tokens=cache / f"{name}.tokens", mark=cache / f"{name}.json", identity=identity)

    def kept(self) -> TokenStream | None:
        """Return the tokens of an earlier run over the same text; None where there are none, or they are others."""
        try:
            kept = json.loads(self.mark.read_text())
            stream = TokenStream.open(self.tokens, kept["tokens"])
        except (FileNotFoundError, KeyError, RecursionError, TypeError, ValueError):
            return None
        return stream if kept["of"] == self.identity and stream.is_whole else None

    def keep(self, documents: Iterable[Framed]) -> TokenStream:
        """Write tokens; another run that writes the same at the same time does no harm."""
        stream = pack(self.tokens, documents)
        with new_file(self.mark, overwrite=True) as temporary:
            temporary.write_text(json.dumps({"of": self.identity, "tokens": stream.digest}))
        return stream


def _identity(inventory: Inventory, tokenizer: Any, decontamination: Decontamination) -> str:
    about = {
        "text": inventory.digest,
        "seed": inventory.seed,
        "left_out": decontamination.digest,
        "reading": _reading(tokenizer),
    }
    return json.dumps(about, sort_keys=True)


def _held_out(ranks: Sequence[int]) -> Ranks:
    """Return the ranks of the texts to hold out: the smallest whose copies fit into the share that is held out.

    Args:
        ranks: Of all documents, in order of size.
    """
    if not ranks or ranks[0] == ranks[-1]:
        return Ranks()
    room = max(1, round(len(ranks) * HELD_OUT_SHARE))
    chosen, rarest = array("Q"), (len(ranks), 0)
    for rank, copies in groupby(ranks):
        count = sum(1 for _ in copies)
        rarest = min(rarest, (count, rank))
        if count <= room:
            chosen.append(rank)
            room -= count
        if not room:
            break
    return Ranks(chosen or [rarest[1]])


def _reading(tokenizer: Any) -> str:
    """Return a digest of what decides a text's tokens: another anchor's vocabulary may be as large and mean others."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    about = [rules, tokenizer.split_special_tokens, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
