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

__all__ = ["PublicSample", "draw_sample", "leading"]

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


def draw_sample(documents: Iterable[Framed], max_tokens: int, seed: int) -> PublicSample:
    """Return a seeded sample of at least one document and about ``max_tokens`` tokens.

    Documents are ranked by a seeded hash of their tokens, so the order of files does not matter and memory holds
    little more than the sample.
    """
    heap: list[tuple[int, int, Framed]] = []
    total = 0
    for number, document in enumerate(documents):
        key = hashlib.sha256(f"{seed}\2".encode() + document.tokens.tobytes()).digest()
        heapq.heappush(heap, (-int.from_bytes(key, "big"), number, document))
        total += len(document.tokens)
        while len(heap) > 1 and total - len(heap[0][2].tokens) >= max_tokens:
            total -= len(heapq.heappop(heap)[2].tokens)
    return PublicSample([document for _, _, document in sorted(heap, key=lambda entry: -entry[0])])
