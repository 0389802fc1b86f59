"""Who answered, token by token: the same shares that scoring counts, and pieces that are the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from flexctl.bundle import open_merged
from flexctl.evaluation.explaining import explain_tokens
from flexctl.evaluation.scoring import score_documents
from flexctl.model.building import load_tokenizer
from flexctl.text.tokens import frame_documents

NAMES = ["public", "code", "sums"]


@pytest.mark.parametrize(("kind", "seq_len"), [("code", 5000), ("sums", 16)])
def test_shares_of_all_tokens_are_those_of_the_score(merged: Path, kind: str, seq_len: int) -> None:
    model, tokenizer = tiny.build(open_merged(merged).weights()), load_tokenizer(merged)
    (text,) = tiny.make_texts(kind, 1, seed=5)
    framed = list(frame_documents(tokenizer, [text]))
    pieces = explain_tokens(model, tokenizer, framed[0].tokens.tolist(), NAMES, seq_len)
    assert "".join(piece.text for piece in pieces) == text
    assert len(pieces) == len(framed[0].tokens) - 1
    shares = score_documents(model, framed, seq_len=seq_len, batch_tokens=5000).routing()
    for name, share in zip(NAMES, shares, strict=True):
        assert sum(piece.shares[name] for piece in pieces) / len(pieces) == pytest.approx(share, abs=1e-5)


def test_letters_that_span_tokens_stand_with_the_token_that_ends_them(merged: Path) -> None:
    model, tokenizer = tiny.build(open_merged(merged).weights()), load_tokenizer(merged)
    (framed,) = frame_documents(tokenizer, ["a\u20acb\U0001f600"])
    pieces = explain_tokens(model, tokenizer, framed.tokens.tolist(), NAMES, 5000)
    texts = [piece.text for piece in pieces]
    assert "".join(texts) == "a\u20acb\U0001f600"
    assert "" in texts
    assert all(sum(piece.shares.values()) == pytest.approx(1) for piece in pieces)
