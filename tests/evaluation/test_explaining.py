"""Who answered, token by token: the same shares that scoring counts, and pieces that are the text."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from flexctl.bundle import open_merged
from flexctl.evaluation.explaining import ShareCollector, explain_tokens
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


def test_shares_are_means_over_layers_and_a_pass_that_broke_off_leaves_none() -> None:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 3, 5, 4, generator=generator)
    whole, last = ShareCollector(3), ShareCollector(3, positions=1)
    nothing = torch.empty(0)
    for collector in (whole, last):
        collector(0, nothing, torch.ones(5, 4), nothing)
        for one_pass in kept:
            for layer, probabilities in enumerate(one_pass):
                collector(layer, nothing, probabilities, nothing)
    expected = (kept.double() / kept.double().sum(-1, keepdim=True)).mean(dim=1)
    torch.testing.assert_close(torch.tensor(whole.rows).double(), expected.flatten(0, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(last.rows).double(), expected[:, -1], rtol=0, atol=1e-6)
    assert whole.rows == whole.rows


def test_no_pass_waits_for_the_shares_only_who_reads_them() -> None:
    """Fake tensors have no numbers: to ask for one fails, as a device would have to be waited for."""
    collector = ShareCollector(2, positions=1)
    with FakeTensorMode():
        kept = torch.ones(5, 4)
        for layer in (0, 1, 0, 1):
            collector(layer, kept, kept, kept)
        with pytest.raises(DataDependentOutputException):
            _ = collector.rows
