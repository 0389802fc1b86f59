"""Documents as tokens: one framing for training, calibration and scoring, a cache on disk, batches from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexctl.bundle.names import PUBLIC
from flexctl.bundle.store import new_file
from flexctl.errors import FlexctlError, UsageError
from flexctl.training.encoding import encoded

__all__ = [
    "Batches",
    "EqualShares",
    "Framed",
    "Mixture",
    "TokenStream",
    "frame_documents",
    "frame_passages",
    "joined",
    "pack",
]

Tokens = np.ndarray[Any, np.dtype[np.int64]]
PASSAGE_TOKENS = 256


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
        digest: Of the tokens that were written into it.
    """

    def __init__(
        self, ids: np.ndarray[Any, np.dtype[np.int32]], *, file: Path | None = None, digest: str | None = None
    ) -> None:
        self._ids, self._file, self._digest = ids, file, digest

    @classmethod
    def open(cls, path: Path, digest: str | None = None) -> TokenStream:
        """Return the stream in a file that ``pack`` wrote.

        Args:
            path: The file.
            digest: Of what was written; None takes what is there.
        """
        ids = np.memmap(path, dtype="<i4", mode="r") if path.stat().st_size else np.zeros(0, dtype="<i4")
        return cls(ids, file=path, digest=digest or _digest(ids))

    @classmethod
    def empty(cls) -> TokenStream:
        """Return a stream of nothing."""
        return cls(np.zeros(0, dtype="<i4"))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def digest(self) -> str:
        """A digest of all tokens, of a file those that were written into it."""
        return self._digest or _digest(self._ids)

    @property
    def is_whole(self) -> bool:
        """Whether the tokens are those of ``digest``; what is in memory always is."""
        return self._digest is None or self._digest == _digest(self._ids)

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


def _digest(ids: np.ndarray[Any, np.dtype[np.int32]]) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()


def joined(documents: Iterable[Framed]) -> Iterator[Tokens]:
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
        for piece in joined(documents):
            data = piece.astype("<i4").tobytes()
            digest.update(data)
            stream.write(data)
    return TokenStream.open(path, digest.hexdigest())


class Batches(Protocol):
    """What the loop trains on: step ``s`` depends on ``s`` alone."""

    seq_len: int
    batch_size: int

    def batch(self, step: int) -> Tensor:
        """Return the sequences of one step, (batch_size, seq_len + 1), int64."""

    def is_public(self, step: int) -> Tensor:
        """Return which sequences of one step are public, (batch_size,), bool."""

    def refuse_change(self) -> None:
        """Refuse to go on where a file of tokens was changed: ``TokenStream.refuse_change``."""


class _Shuffled:
    """Sequences of a stream in a seeded order, a new one each time it is gone through."""

    def __init__(self, source: TokenStream, seq_len: int, seed: Sequence[int]) -> None:
        self.count = source.num_sequences(seq_len)
        self.source, self._seq_len, self._seed = source, seq_len, [part % 2**64 for part in seed]
        self._order: tuple[int, np.ndarray[Any, Any]] = (-1, np.zeros(0))

    def pick(self, position: int) -> Tokens:
        """Return the sequence at ``position``, counted from 0 over all passes, (seq_len + 1,), int64."""
        epoch, offset = divmod(position, self.count)
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([*self._seed, epoch]))
            self._order = (epoch, generator.permutation(self.count))
        return self.source.sequence(int(self._order[1][offset]), self._seq_len)


class EqualShares:
    """Batches that take a sequence from one text after the other, so that every text has the same share.

    Args:
        texts: Tokens by name; ``public`` stands for itself in ``is_public``.
        seq_len: Targets a sequence.
        batch_size: Sequences a step.
        seed: Seed of the orders.

    Raises:
        UsageError: A text does not fill one sequence.
    """

    def __init__(self, texts: Mapping[str, TokenStream], *, seq_len: int, batch_size: int, seed: int) -> None:
        self.seq_len, self.batch_size = seq_len, batch_size
        self._public = list(texts).index(PUBLIC)
        self._texts = [_Shuffled(text, seq_len, [seed, number]) for number, text in enumerate(texts.values())]
        for name, text in texts.items():
            if text.num_sequences(seq_len) == 0:
                raise UsageError(
                    f"{name}: {len(text)} tokens of public text do not fill one sequence of {seq_len}",
                    hint="choose more documents (flexctl select-proxy --count), or give a smaller `seq_len`",
                )

    def batch(self, step: int) -> Tensor:
        """Return the sequences of one step, (batch_size, seq_len + 1), int64."""
        picks = [divmod(number, len(self._texts)) for number in self._numbers(step)]
        return torch.from_numpy(np.stack([self._texts[text].pick(position) for position, text in picks]))

    def is_public(self, step: int) -> Tensor:
        """Return which sequences of one step are public, (batch_size,), bool."""
        return torch.tensor([number % len(self._texts) == self._public for number in self._numbers(step)])

    def refuse_change(self) -> None:
        """Refuse to go on where a file of tokens was changed: ``TokenStream.refuse_change``."""
        for text in self._texts:
            text.source.refuse_change()

    def _numbers(self, step: int) -> range:
        return range(step * self.batch_size, (step + 1) * self.batch_size)


class Mixture:
    """Batches of the owner's sequences with a share of public ones, each in a seeded order.

    Step ``s`` depends on ``s`` alone, so a resumed run reads what an uninterrupted one would have read.

    Args:
        own: The owner's tokens.
        public: Public tokens, or None for no public share.
        seq_len: Targets a sequence.
        batch_size: Sequences a step.
        public_share: Share of them that is public, from 0 to below 1.
        seed: Seed of both orders.

    Raises:
        UsageError: There is not enough text for one sequence.
    """

    def __init__(
        self,
        own: TokenStream,
        public: TokenStream | None,
        *,
        seq_len: int,
        batch_size: int,
        public_share: float,
        seed: int,
    ) -> None:
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.public_share = public_share if public is not None else 0.0
        self._own = _Shuffled(own, seq_len, [seed, 0])
        self._public = None if public is None else _Shuffled(public, seq_len, [seed, 1])
        parts = (("", "data", own), ("the public sample: ", None, public if self.public_share else None))
        for name, field, source in parts:
            if source is not None and source.num_sequences(seq_len) == 0:
                raise UsageError(
                    f"{name}{len(source)} tokens do not fill one sequence of {seq_len}",
                    hint="give more text, or a smaller `seq_len`",
                    field=field,
                )

    def public_before(self, step: int) -> int:
        """Return how many public sequences steps 0 .. step - 1 have together."""
        return int(step * self.batch_size * self.public_share + 1e-9)

    def own_tokens(self, steps: int) -> int:
        """Return the owner's tokens in the first ``steps`` steps."""
        return (steps * self.batch_size - self.public_before(steps)) * self.seq_len

    def steps_for(self, own_tokens: int) -> int:
        """Return the number of steps that comes nearest to ``own_tokens`` of the owner's tokens, at least one."""
        per_step = self.batch_size * (1 - self.public_share) * self.seq_len
        return max(1, round(own_tokens / per_step))

    def batch(self, step: int) -> Tensor:
        """Return the sequences of one step, public ones last, (batch_size, seq_len + 1), int64."""
        public_from, public_to = self.public_before(step), self.public_before(step + 1)
        own_from = step * self.batch_size - public_from
        own_to = (step + 1) * self.batch_size - public_to
        rows = [self._own.pick(i) for i in range(own_from, own_to)]
        if self._public is not None:
            rows += [self._public.pick(i) for i in range(public_from, public_to)]
        return torch.from_numpy(np.stack(rows))

    def is_public(self, step: int) -> Tensor:
        """Return which sequences of one step are public, (batch_size,), bool."""
        count = self.public_before(step + 1) - self.public_before(step)
        return torch.arange(self.batch_size) >= self.batch_size - count

    def refuse_change(self) -> None:
        """Refuse to go on where a file of tokens was changed: ``TokenStream.refuse_change``."""
        for part in (self._own, self._public):
            if part is not None:
                part.source.refuse_change()
