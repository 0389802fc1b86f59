"""The excerpts of a page, token by token: the only part of it that needs the model, and that results lack."""

from __future__ import annotations

import dataclasses
from itertools import islice

from flexctl.evaluation.domains import Content
from flexctl.evaluation.explaining import Piece, explain_tokens
from flexctl.evaluation.passes import Passes, Variant
from flexctl.evaluation.report.page import Excerpt
from flexctl.text.tokens import frame_documents

__all__ = ["take_excerpt"]

EXCERPT_TOKENS = 120
_EXCERPT_DOCUMENTS = 16


def take_excerpt(passes: Passes, content: Content, whole: Variant) -> Excerpt:
    """Return about EXCERPT_TOKENS tokens from the beginning of a domain.

    Args:
        passes: The model's.
        content: The domain.
        whole: How the model runs.
    """
    model = passes.model_as(whole)
    pieces: list[Piece] = []
    texts = islice(content.domain.documents(), _EXCERPT_DOCUMENTS)
    for framed in frame_documents(passes.tokenizer, texts):
        if len(pieces) >= EXCERPT_TOKENS:
            break
        if pieces:
            # The end-of-text token has no text of its own.
            pieces[-1] = dataclasses.replace(pieces[-1], text="\n\n")
        tokens = framed.tokens[: EXCERPT_TOKENS - len(pieces) + 1].tolist()
        pieces += explain_tokens(model, passes.tokenizer, tokens, passes.runnable.experts, passes.seq_len)
    return Excerpt(domain=content.domain.name, pieces=tuple(pieces))
