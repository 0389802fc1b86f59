"""Documents as tokens: one framing for training, calibration and scoring, a stream of them on disk."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexctl.bundle.store import new_file
from flexctl.errors import FlexctlError, UsageError
from flexctl.text.encoding import encoded

__all__ = [
    "Framed",
    "TokenStream",
    "frame_documents",
    "frame_passages",
    "end_to_end",
    "pack",
]

Tokens = np.ndarray[Any, np.dtype[np.int64]]
PASSAGE_TOKENS = 256
_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Framed:
    """A document as t_0 .. t_n.

    Attributes:
        tokens: (n + 1,), int64: begin (or end-of-text) token, the text's tokens, end-of-text.
        num_bytes: UTF-8 bytes of the text.
    """

    tokens: Tokens
    num_bytes: int


def frame_documents(tokenizer: Any, documents: Iterable[str]) -> Iterator[Framed]:
    """Yield each document framed as docs/how-it-works.md, section 7, says.

    Args:
        tokenizer: A Transformers tokenizer.
        documents: Texts.

    Raises:
        UsageError: The tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UsageError("the tokenizer has no end-of-text token (eos_token)", hint="set it in the anchor's tokenizer")
    begin = _begin_token(tokenizer, end)
    for text, ids in encoded(tokenizer, documents):
        tokens = np.concatenate([[begin], ids, [end]], dtype=np.int64)
        yield Framed(tokens=tokens, num_bytes=len(text.encode()))


def frame_passages(tokenizer: Any, passages: Iterable[str]) -> list[Tensor]:
    """Return the framed token ids of each passage, at most PASSAGE_TOKENS of them, (S,), int64."""
    return [torch.from_numpy(framed.tokens[:PASSAGE_TOKENS]) for framed in frame_documents(tokenizer, passages)]


def _begin_token(tokenizer: Any, end: int) -> int:
    first = tokenizer("a")["input_ids"][:1]
    begins_by_itself = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return int(tokenizer.bos_token_id) if begins_by_itself else int(end)


class TokenStream:
    """Framed documents one after the other.

    Neighbouring documents share the end-of-text token between them when documents also begin with it.

    Args:
        ids: (n,), int32; usually a memory map, so that memory stays flat.
        file: Where they lie; None is in memory.
        mapped: That file's memory map; None where there is none.
        digest: Of the tokens that were written into it.
    """

    def __init__(
        self,
        ids: np.ndarray[Any, np.dtype[np.int32]],
        *,
        file: Path | None = None,
        mapped: mmap.mmap | None = None,
        digest: str | None = None,
    ) -> None:
        self._ids, self._file, self._mapped, self._digest = ids, file, mapped, digest

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> TokenStream:
        """Return the stream in a file that ``pack`` wrote.

        Args:
            path: The file.
            digest: Of what was written; None takes what is there.
        """
        if not path.stat().st_size:
            return cls(np.zeros(0, dtype="<i4"), file=path, digest=digest or _digest(np.zeros(0, dtype="<i4")))
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        ids = np.frombuffer(mapped, dtype="<i4")
        return cls(ids, file=path, mapped=mapped, digest=digest or _digest(ids, mapped))

    @classmethod
    def empty(cls) -> TokenStream:
        """Return a stream of nothing."""
        return cls(np.zeros(0, dtype="<i4"))

    def __len__(self) -> int:
        return len(self._ids)

    def __reduce__(self) -> tuple[Any, ...]:
        """Go to another process as the place of the file, where there is one."""
        return (TokenStream, (self._ids,)) if self._file is None else (TokenStream.open, (self._file, self._digest))

    @property
    def digest(self) -> str:
        """A digest of all tokens, of a file those that were written into it."""
        return self._digest or _digest(self._ids, self._mapped)

    @property
    def is_whole(self) -> bool:
        """Whether the tokens are those of ``digest``; what is in memory always is."""
        return self._digest is None or self._digest == _digest(self._ids, self._mapped)

    def refuse_change(self) -> None:
        """Refuse to go on with a file that was written over: nobody knows whose text was trained on.

        Raises:
            FlexctlError: It was.
        """
        if not self.is_whole:
            raise FlexctlError(
                f"{self._file}: was changed while a run used it; nothing was written",
                hint="start again, and let nothing else write there",
            )

    def num_sequences(self, seq_len: int) -> int:
        """Return how many sequences of ``seq_len`` targets there are."""
        return max(0, (len(self) - 1) // seq_len)

    def sequence(self, index: int, seq_len: int) -> Tokens:
        """Return sequence ``index``, (seq_len + 1,), int64: its targets follow its inputs by one."""
        start = index * seq_len
        return np.asarray(self._ids[start : start + seq_len + 1], dtype=np.int64)


def _digest(ids: np.ndarray[Any, np.dtype[np.int32]], mapped: mmap.mmap | None = None) -> str:
    """Return the sha256 of tokens, in hex; of a mapped file no more than a block stays in memory for it."""
    digest = hashlib.sha256()
    data = np.ascontiguousarray(ids).view(np.uint8).data
    for start in range(0, len(data), _BLOCK_BYTES):
        digest.update(data[start : start + _BLOCK_BYTES])
        if mapped is not None and hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_DONTNEED, start, min(_BLOCK_BYTES, len(data) - start))
    return digest.hexdigest()


def end_to_end(documents: Iterable[Framed]) -> Iterator[Tokens]:
    """Yield each document's tokens without its first when the document before already ended with that token."""
    last = None
    for document in documents:
        yield document.tokens[int(document.tokens[0] == last) :]
        last = document.tokens[-1]


def pack(path: Path, documents: Iterable[Framed]) -> TokenStream:
    """Write framed documents to ``path`` one after the other and return them as a ``TokenStream``.

    A file that is there is replaced and never written into: another process may have it mapped.
    """
    digest = hashlib.sha256()
    with new_file(path, overwrite=True) as temporary, temporary.open("xb") as stream:
        for piece in end_to_end(documents):
            data = piece.astype("<i4").tobytes()
            digest.update(data)
            stream.write(data)
    return TokenStream.open(path, digest.hexdigest())
