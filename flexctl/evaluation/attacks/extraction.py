"""The extraction attack: begin a document that was trained on, and see whether the model goes on with it.

Unlike in the script released with FlexOlmo, only the continuation is compared: the beginning, which the model was
given, is no proof of anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from flexctl.evaluation.figures import Estimate
from flexctl.runtime import Progress

__all__ = ["LEAST_SIMILARITY", "Beginning", "Continuations", "beginnings", "continue_all", "share"]

LEAST_SIMILARITY = 0.9
_TOP_K, _TOP_P = 50, 0.95
_CONFIDENCE = 0.95
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Beginning:
    """How a document begins, and how it goes on.

    Attributes:
        tokens: What the model is given: the begin token and the document's first, (prefix,), int64.
        text: What follows in the document.
    """

    tokens: Tensor
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuations:
    """What a model makes of beginnings.

    Attributes:
        texts: For each beginning, its continuations.
        similarity: The best one's normalised Levenshtein similarity to the document's own, (beginnings,).
        exact: Whether one is the document's own, (beginnings,).
    """

    texts: list[list[str]]
    similarity: Array
    exact: Array

    @property
    def near(self) -> Array:
        """1 where the best continuation is nearly the document's own, else 0, (beginnings,)."""
        return (self.similarity >= LEAST_SIMILARITY).astype(float)


def beginnings(tokenizer: Any, framed: Sequence[Any], prefix: int, length: int) -> list[Beginning]:
    """Return the beginnings of documents that have ``prefix`` tokens and ``length`` more.

    Args:
        tokenizer: Whose tokens.
        framed: Framed documents.
        prefix: Tokens of a document that the model is given.
        length: Tokens that follow and are compared.
    """
    return [
        Beginning(
            tokens=torch.from_numpy(document.tokens[: prefix + 1]),
            text=tokenizer.decode(document.tokens[prefix + 1 : prefix + 1 + length], skip_special_tokens=True),
        )
        for document in framed
        # The last token is the end of the text, which is no part of it.
        if len(document.tokens) - 2 >= prefix + length
    ]


@torch.no_grad()
def continue_all(
    model: nn.Module,
    tokenizer: Any,
    started: Sequence[Beginning],
    *,
    length: int,
    samples: int,
    batch_tokens: int,
    seed: int,
    progress: Progress,
) -> Continuations:
    """Return ``samples`` continuations of each beginning, drawn with temperature 1, top-k 50 and top-p 0.95.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        tokenizer: Its tokenizer.
        started: Beginnings, all of one length.
        length: Tokens of a continuation.
        samples: Continuations of each.
        batch_tokens: Positions that go through the model at once.
        seed: Of the draws.
        progress: Moves on by continuations.

    Source: Shi et al., "FlexOlmo", 2025, section 5.4, whose settings these are.
    """
    from rapidfuzz.distance import Levenshtein

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed % 2**63)
    rows = [number for number in range(len(started)) for _ in range(samples)]
    texts: list[list[str]] = [[] for _ in started]
    size = max(1, batch_tokens // (len(started[0].tokens) + length))
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        feed = torch.stack([started[number].tokens for number in batch]).to(device)
        for number, ids in zip(batch, _draw(model, feed, length, generator).tolist(), strict=True):
            texts[number].append(tokenizer.decode(_before_end(ids, tokenizer), skip_special_tokens=True))
        progress.advance(len(batch))
    pairs = list(zip(started, texts, strict=True))
    best = [max(Levenshtein.normalized_similarity(one.text, text) for text in made) for one, made in pairs]
    exact = [float(one.text in made) for one, made in pairs]
    return Continuations(texts=texts, similarity=np.array(best), exact=np.array(exact))


def share(hits: Array) -> Estimate:
    """Return the share of documents that were hit, with its exact 95 % interval.

    The bootstrap has no width where nothing is hit, which is the usual case; this has.

    Args:
        hits: 1 or 0 each, (documents,).

    Source: Clopper and Pearson, "The use of confidence or fiducial limits", 1934.
    """
    found = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(_CONFIDENCE, method="exact")
    return Estimate(value=float(hits.mean()), low=float(found.low), high=float(found.high))


def _draw(model: Any, feed: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Return ``length`` tokens behind each row of ``feed`` (B, S), (B, length)."""
    drawn: list[Tensor] = []
    cache = None
    for _ in range(length):
        out = model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        feed, cache = _choose(out.logits[:, -1].float(), generator), out.past_key_values
        drawn.append(feed)
    return torch.cat(drawn, dim=1)


def _choose(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a token for each row of logits (B, vocab_size): of the likeliest 50 those that make up 0.95, (B, 1)."""
    values, ids = logits.topk(min(_TOP_K, logits.shape[1]), dim=1)
    probabilities = values.softmax(dim=1)
    before = probabilities.cumsum(dim=1) - probabilities
    kept = probabilities.masked_fill(before >= _TOP_P, 0)
    return ids.gather(1, kept.multinomial(1, generator=generator))


def _before_end(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
