"""The public sample: what every owner mixes into training, calibrates and screens with.

Kept in an anchor's ``public-sample.safetensors`` as ``tokens`` (n,), I32, framed documents one after the other, and
``offsets`` (documents + 1,), I64, where each begins.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexctl.model.tensors import RawBytes, to_torch
from flexctl.text.tokens import Framed, TokenStream, end_to_end

__all__ = ["PublicSample", "Sampler", "draw_sample", "leading"]

_HELD_OUT_EVERY = 20


class PublicSample:
    """Framed public documents in memory.

    Args:
        documents: In the order of their seeded hash.
    """

    def __init__(self, documents: Sequence[Framed]) -> None:
        self.documents = documents

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, RawBytes]) -> PublicSample:
        """Return the sample in an anchor's file; document sizes in bytes are not kept and read 0."""
        tokens, offsets = (to_torch(tensors[name]).numpy() for name in ("tokens", "offsets"))
        parts = np.split(tokens.astype(np.int64), offsets[1:-1])
        return cls([Framed(tokens=part, num_bytes=0) for part in parts])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of ``public-sample.safetensors``."""
        lengths = np.cumsum([0, *(len(document.tokens) for document in self.documents)])
        tokens = np.concatenate([document.tokens for document in self.documents])
        return {"tokens": torch.from_numpy(tokens.astype(np.int32)), "offsets": torch.from_numpy(lengths)}

    @property
    def digest(self) -> str:
        """sha256 of all documents in order, in hex."""
        digest = hashlib.sha256()
        for document in self.documents:
            digest.update(document.tokens.tobytes())
        return digest.hexdigest()

    @property
    def held_out(self) -> list[Framed]:
        """One document in twenty, kept out of training."""
        return list(self.documents[::_HELD_OUT_EVERY])

    @property
    def to_train_on(self) -> list[Framed]:
        """The other documents."""
        return [document for i, document in enumerate(self.documents) if i % _HELD_OUT_EVERY]

    def texts(self, tokenizer: Any) -> Iterator[str]:
        """Yield each document's text."""
        for document in self.documents:
            yield tokenizer.decode(document.tokens[1:-1])

    def stream(self) -> TokenStream:
        """Return the documents as one stream to train on."""
        return TokenStream(np.concatenate(list(end_to_end(self.documents))).astype(np.int32))


def leading(documents: Sequence[Framed], max_tokens: int) -> list[Framed]:
    """Return the first documents that together have about ``max_tokens`` tokens, at least one."""
    kept: list[Framed] = []
    for document in documents:
        if kept and max_tokens < len(document.tokens):
            break
        kept.append(document)
        max_tokens -= len(document.tokens)
    return kept


class Sampler:
    """Draws a seeded sample of at least one document and about as many tokens as are wanted.

    Documents are ranked by a seeded hash of their tokens, so their order does not matter and memory holds little more
    than the sample.

    Args:
        max_tokens: How many are wanted.
        seed: Of the draw.
    """

    def __init__(self, max_tokens: int, seed: int) -> None:
        self._max_tokens, self._seed = max_tokens, seed
        self._heap: list[tuple[int, int, Framed]] = []
        self._seen = self._total = 0

    def add(self, document: Framed) -> None:
        """Let the draw have a document."""
        key = hashlib.sha256(f"{self._seed}\2".encode() + document.tokens.tobytes()).digest()
        heapq.heappush(self._heap, (-int.from_bytes(key, "big"), self._seen, document))
        self._seen += 1
        self._total += len(document.tokens)
        while len(self._heap) > 1 and self._total - len(self._heap[0][2].tokens) >= self._max_tokens:
            self._total -= len(heapq.heappop(self._heap)[2].tokens)

    def drawn(self) -> PublicSample:
        """Return what was drawn of all documents so far."""
        return PublicSample([document for _, _, document in sorted(self._heap, key=lambda entry: -entry[0])])


def draw_sample(documents: Iterable[Framed], max_tokens: int, seed: int) -> PublicSample:
    """Return what a ``Sampler`` draws of all documents."""
    sampler = Sampler(max_tokens, seed)
    for document in documents:
        sampler.add(document)
    return sampler.drawn()
