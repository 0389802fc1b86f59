"""Public documents that are most like an owner's text: a classifier tells the two apart and ranks them.

Shapes: D documents, F features.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flexctl.bundle.proxy import Proxy, ProxyDocument, PublicText
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import Reporter
from flexctl.text.documents import read_documents
from flexctl.text.sample import PublicSample
from flexctl.text.tokens import PASSAGE_TOKENS, Framed, frame_documents

__all__ = ["PASSAGES_A_FOLD", "Ranking", "listed_documents", "fit_classifier", "public_reader", "rank_public"]

Features = Callable[[Sequence[Tensor]], Tensor]
"""Turns token ids, (S,), int64 each, into (D, F), float32."""

PASSAGES_A_FOLD = 512
SHRINKAGE = 0.03
"""Weight of the squared norm of the classifier, over the number of features. Not tuned."""
_TOGETHER = 64
_PREFIX = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """What ranking a public text found.

    Attributes:
        public: The text.
        documents: The best of it.
        accuracy: Share of passages, the owner's and public ones counted equally, that the classifier puts right among
            those that it was not fitted on.
    """

    public: PublicText
    documents: list[ProxyDocument]
    accuracy: float


def public_reader(
    sample: PublicSample, tokenizer: Any, path: Path | None, text_field: str
) -> Callable[[], Iterator[Framed]]:
    """Return what reads the public text anew each time: the anchor's sample, or the documents behind a path."""
    if path is None:
        return lambda: iter(sample.documents)
    return lambda: frame_documents(tokenizer, read_documents([path], text_field))


def rank_public(
    read: Callable[[], Iterator[Framed]],
    own: Sequence[Tensor],
    features: Features,
    *,
    count: int | None,
    share: float,
    seed: int,
    reporter: Reporter,
) -> Ranking:
    """Return the public documents that are most like the owner's passages.

    Both sides fall into two folds by a seeded hash; each fold has its classifier, and documents are scored by the one
    that was fitted on the other fold. A document is judged by its middle PASSAGE_TOKENS tokens.

    Args:
        read: Reads the public text.
        own: The owner's passages as token ids, in an order that means nothing.
        features: What classifiers see.
        count: How many documents; None is ``share`` of them.
        share: Above 0 to 1.
        seed: Of the folds.
        reporter: Hears of progress.

    Raises:
        UsageError: There are too few documents or passages, or fewer documents than ``count``.

    Source: FlexOlmo for the idea (docs/how-it-works.md, section 9); folds, and router inputs as features, are ours.
    """
    public, sampled = _survey(read, seed)
    wanted = max(2, round(share * public.documents)) if count is None else count
    if wanted > public.documents:
        raise UsageError(f"{wanted} is more than the {public.documents} public documents there are", field="count")
    mine = [features(own[fold::2]) for fold in range(2)]
    theirs = [features([window for half, window in sampled if half == fold]) for fold in range(2)]
    judges = [fit_classifier(mine[fold], theirs[fold]) for fold in range(2)]
    right = [
        float((judges[1 - fold](mine[fold]) > 0).float().mean() + (judges[1 - fold](theirs[fold]) <= 0).float().mean())
        for fold in range(2)
    ]
    with reporter.progress("scoring public documents", public.documents, "documents") as bar:
        best = heapq.nlargest(wanted, _scored(read, features, judges, seed, bar.advance))
    documents = [ProxyDocument(index=-negative, sha256=prefix) for _, negative, prefix in best]
    return Ranking(public=public, documents=documents, accuracy=sum(right) / 4)


def fit_classifier(own: Tensor, public: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a logistic regression, as a function from features (D, F) to logits (D,), positive for the owner's.

    Both kinds weigh the same however many there are. Features are centred and divided by their spread.

    Args:
        own: (D, F), float32.
        public: (D, F), float32.
    """
    both = torch.cat([own, public])
    middle, spread = both.mean(dim=0), both.std(dim=0).clamp(min=1e-6) * both.shape[1] ** 0.5
    labels = torch.cat([torch.ones(len(own)), torch.zeros(len(public))])
    weights = torch.cat([torch.full((len(part),), 0.5 / len(part)) for part in (own, public)])
    inputs = (both - middle) / spread
    slope, offset = torch.zeros(both.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([slope, offset], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        losses = F.binary_cross_entropy_with_logits(inputs @ slope + offset, labels, reduction="none")
        loss: Tensor = (weights * losses).sum() + SHRINKAGE / both.shape[1] * slope.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return lambda features: ((features - middle) / spread @ slope + offset).detach()


def listed_documents(read: Callable[[], Iterator[Framed]], proxies: Sequence[tuple[Path, Proxy]]) -> list[list[Framed]]:
    """Return the documents of each proxy list, after checking that they are the ones that the owner meant.

    Args:
        read: Reads the public text.
        proxies: Lists and the files that they are in, for messages.

    Raises:
        BundleError: A list was made from another public text, or a document has another hash.
    """
    wanted = {document.index for _, proxy in proxies for document in proxy.documents}
    digest, number = hashlib.sha256(), 0
    found: dict[int, tuple[str, Framed]] = {}
    for number, document in enumerate(read(), start=1):
        identity = _identity(document)
        digest.update(identity.encode())
        if number - 1 in wanted:
            found[number - 1] = (identity[:_PREFIX], document)
    for path, proxy in proxies:
        if proxy.public != PublicText(sha256=digest.hexdigest(), documents=number):
            raise BundleError(
                f"{path}: was made from another public text of {proxy.public.documents} documents, not from this one",
                hint="give the one that its owner used by `public`",
            )
        for wrong in (entry for entry in proxy.documents if found[entry.index][0] != entry.sha256):
            raise BundleError(f"{path}: documents: number {wrong.index} of the public text has another sha256")
    return [[found[entry.index][1] for entry in proxy.documents] for _, proxy in proxies]


def _survey(read: Callable[[], Iterator[Framed]], seed: int) -> tuple[PublicText, list[tuple[int, Tensor]]]:
    """Return what the public text is, and a seeded sample of it as (fold, token ids)."""
    digest, count = hashlib.sha256(), 0

    def ranked() -> Iterator[tuple[str, int, Tensor]]:
        nonlocal count
        for count, document in enumerate(read(), start=1):
            identity = _identity(document)
            digest.update(identity.encode())
            yield _rank(identity, seed), count, _window(document)

    best = heapq.nsmallest(2 * PASSAGES_A_FOLD, ranked())
    sampled = [(_fold(rank), window) for rank, _, window in best]
    if len({fold for fold, _ in sampled}) < 2:
        raise UsageError(f"{count} public documents are too few to choose from", hint="give more by `public`")
    return PublicText(sha256=digest.hexdigest(), documents=count), sampled


def _scored(
    read: Callable[[], Iterator[Framed]],
    features: Features,
    judges: Sequence[Callable[[Tensor], Tensor]],
    seed: int,
    advance: Callable[[float], None],
) -> Iterator[tuple[float, int, str]]:
    """Yield (score, minus the index, start of the hash) of every document; of equals the first is the best."""
    stream = enumerate(read())
    while batch := list(islice(stream, _TOGETHER)):
        seen = features([_window(document) for _, document in batch])
        scores = torch.stack([judge(seen) for judge in judges])
        for column, (index, document) in enumerate(batch):
            identity = _identity(document)
            other = 1 - _fold(_rank(identity, seed))
            yield float(scores[other, column]), -index, identity[:_PREFIX]
        advance(len(batch))


def _identity(document: Framed) -> str:
    return hashlib.sha256(document.tokens.astype("<i8").tobytes()).hexdigest()


def _rank(identity: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\4{identity}".encode()).hexdigest()


def _fold(rank: str) -> int:
    return int(rank[-1], 16) % 2


def _window(document: Framed) -> Tensor:
    """Return the middle of a document, at most PASSAGE_TOKENS tokens, (S,), int64; it begins as documents do."""
    start = max(0, (len(document.tokens) - PASSAGE_TOKENS) // 2)
    window = torch.from_numpy(document.tokens[start : start + PASSAGE_TOKENS].copy())
    window[0] = int(document.tokens[0])
    return window
