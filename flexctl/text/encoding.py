"""Texts as token ids, in memory that does not grow with them: a long text is tokenised piece by piece.

Neighbouring pieces overlap. They are joined where both have the same tokens at the same places, with _AGREEING of them
on either side: so neither the end of one piece nor the beginning of the other shows. For byte-pair encoding one such
token is proof enough: a row of tokens is what a text becomes exactly if each two neighbours are what they become by
themselves, and here each two neighbours stand side by side in one of the pieces. The others are for what goes before:
normalisation, and patterns that look ahead. White space, of which patterns look at a whole run, must end on either
side. Where pieces never agree they grow, up to the whole text, so tokens never depend on where it was cut.

Several threads tokenise, each some texts or a long one, and what they make comes in the order of the texts. They are as
many as torch has: the library lets go of the interpreter while it works, so they need neither processes nor copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = ["PIECE_CHARACTERS", "encoded", "in_pieces"]

Ids = np.ndarray[Any, np.dtype[np.int64]]

PIECE_CHARACTERS = 1 << 17
"""Characters that a tokenizer is given at once; it takes some 150 bytes for each."""

_TOGETHER = 64
_OVERLAP = 4096
_AGREEING = 16


def encoded(tokenizer: Any, texts: Iterable[str], *, piece: int = PIECE_CHARACTERS) -> Iterator[tuple[str, Ids]]:
    """Yield each text and its token ids, (n,), int64, without a begin or end token.

    Args:
        tokenizer: A Transformers tokenizer.
        texts: What to tokenise; with several threads some are read ahead.
        piece: Characters to tokenise at once. A slow tokenizer, which does not say where its tokens are from, takes
            every text whole, one after the other.
    """
    if tokenizer.is_fast:
        work, threads = partial(_encode, _ready(tokenizer), piece), torch.get_num_threads()
    else:
        work, threads = partial(_encode_slowly, tokenizer), 1
    for batch, found in _in_order(work, _batches(texts, piece), threads):
        yield from zip(batch, found, strict=True)


def _in_order(
    work: Callable[[list[str]], list[Ids]], batches: Iterable[list[str]], threads: int
) -> Iterator[tuple[list[str], list[Ids]]]:
    """Yield each batch and what ``work`` makes of it, in the order of the batches, whichever is ready first."""
    if threads == 1:
        for batch in batches:
            yield batch, work(batch)
        return
    waiting: deque[tuple[list[str], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(work, batch)))
                if len(waiting) > threads:
                    first, found = waiting.popleft()
                    yield first, found.result()
            while waiting:
                first, found = waiting.popleft()
                yield first, found.result()
        finally:
            for _, unwanted in waiting:
                unwanted.cancel()


def in_pieces(texts: Iterable[str], *, piece: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Yield texts, long ones cut before a single space where there is one: for counting words, not for tokens."""
    for text in texts:
        start = 0
        while len(text) - start > piece:
            stop = _word_end(text, start + piece // 2, start + piece)
            yield text[start:stop]
            start = stop
        yield text[start:] if start else text


def _word_end(text: str, start: int, stop: int) -> int:
    """Return the last place in a range where a single space stands between other characters, or else its end."""
    place = stop
    while (place := text.rfind(" ", start, place)) > start:
        if not text[place - 1].isspace() and not text[place + 1].isspace():
            return place
    return stop


def _batches(texts: Iterable[str], most: int) -> Iterator[list[str]]:
    """Yield texts some at a time: _TOGETHER at most, of ``most`` characters together or one longer one."""
    batch: list[str] = []
    room = most
    for text in texts:
        if batch and (len(batch) == _TOGETHER or len(text) > room):
            yield batch
            batch, room = [], most
        batch.append(text)
        room -= len(text)
    if batch:
        yield batch


def _encode(backend: Any, piece: int, batch: list[str]) -> list[Ids]:
    if len(batch) == 1 and len(batch[0]) > piece:
        return [_encode_long(backend, batch[0], piece)]
    return [_array(found.ids) for found in backend.encode_batch_fast(batch, add_special_tokens=False)]


def _encode_slowly(tokenizer: Any, batch: list[str]) -> list[Ids]:
    return [_array(ids) for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]]


def _ready(tokenizer: Any) -> Any:
    """Return the library's own tokenizer, which cuts and pads nothing and reads special tokens as ours does.

    It is asked directly: what Transformers makes of its answers takes as long as they took. Nothing is set that is set
    already, as it cannot be while another thread uses it.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _array(ids: Sequence[int]) -> Ids:
    return np.array(ids, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """Tokens of a part of a text.

    Attributes:
        start: First character.
        stop: Character after the last.
        ids: (n,), int64.
        spans: First character of each token and the one after its last, in the text, (n, 2), int64.
    """

    start: int
    stop: int
    ids: Ids
    spans: Ids

    def rows(self, first: int, last: int) -> list[tuple[int, ...]]:
        """Return (id, first character, character after the last) of tokens ``first`` to before ``last``."""
        return list(map(tuple, np.column_stack([self.ids, self.spans])[first:last].tolist()))


def _encode_long(backend: Any, text: str, piece: int) -> Ids:
    overlap = min(_OVERLAP, piece // 4)
    parts: list[Ids] = []
    here, done = _tokenise(backend, text, 0, piece), 0
    while here.stop < len(text):
        first = int(np.searchsorted(here.spans[:, 0], here.stop - overlap))
        start = int(here.spans[first, 0]) if first < len(here.ids) else here.stop - overlap
        following = _tokenise(backend, text, start, piece)
        seam = _seam(text, here, following)
        if seam is None:
            here = _tokenise(backend, text, here.start, 2 * (here.stop - here.start))
            continue
        parts.append(here.ids[done : seam[0]])
        here, done = following, seam[1]
    return np.concatenate([*parts, here.ids[done:]])


def _tokenise(backend: Any, text: str, start: int, length: int) -> _Part:
    part = text[start : start + length]
    (found,) = backend.encode_batch([part], add_special_tokens=False)  # ``encode`` holds the interpreter
    spans = np.array(found.offsets, dtype=np.int64).reshape(-1, 2) + start
    return _Part(start=start, stop=start + len(part), ids=_array(found.ids), spans=spans)


def _seam(text: str, here: _Part, following: _Part) -> tuple[int, int] | None:
    """Return a token's number in both pieces, such that both agree on it and its neighbours; None if there is none."""
    shift = int(np.searchsorted(here.spans[:, 0], following.start))
    ours = here.rows(shift, len(here.ids))
    theirs = following.rows(0, int(np.searchsorted(following.spans[:, 1], here.stop, side="right")))
    numbers = {row: number for number, row in enumerate(ours)}
    middle = len(theirs) // 2
    for theirs_at in sorted(range(_AGREEING, len(theirs) - _AGREEING + 1), key=lambda place: abs(place - middle)):
        at = numbers.get(theirs[theirs_at]) if theirs_at < len(theirs) else None
        if at is None or at < _AGREEING:
            continue
        sides = ours[at - _AGREEING : at], ours[at : at + _AGREEING]
        agree = sides == (theirs[theirs_at - _AGREEING : theirs_at], theirs[theirs_at : theirs_at + _AGREEING])
        if agree and all(_has_words(text, side) for side in sides):
            return shift + at, theirs_at
    return None


def _has_words(text: str, rows: Sequence[tuple[int, ...]]) -> bool:
    return not text[rows[0][1] : rows[-1][2]].isspace()
