"""Batches to train on, from token streams: the owner's text with a share of public text, or equal shares of several.

Shapes: B sequences, S targets of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from flexctl.bundle.names import PUBLIC
from flexctl.errors import UsageError
from flexctl.text.tokens import TokenStream

__all__ = ["Batches", "EqualShares", "Mixture"]

Tokens = np.ndarray[Any, np.dtype[np.int64]]


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
