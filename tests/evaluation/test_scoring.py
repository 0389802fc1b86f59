"""The one scorer, against a loop over documents that anyone can read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.nn import functional as F

from flexctl.evaluation.scoring import Score, held_out_losses, score_documents
from flexctl.model.routed import exclude, observing, routed_layers
from flexctl.runtime import SilentReporter
from flexctl.text.tokens import Framed

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a", "b"), top_k=2))


def make_documents(count: int = 7) -> list[Framed]:
    rng = np.random.default_rng(0)
    lengths = [2, 3, 9, 30, 31, 64, 5][:count]
    return [
        Framed(tokens=np.array([0, *rng.integers(2, 300, length - 2), 0], dtype=np.int64), num_bytes=3 * length)
        for length in lengths
    ]


@torch.no_grad()
def direct(model: Any, documents: list[Framed], seq_len: int) -> tuple[float, int]:
    """Total nats and targets, one window at a time: every token but t_0 is a target once."""
    total, targets = 0.0, 0
    for document in documents:
        tokens = torch.from_numpy(document.tokens)
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            logits = model(window[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            targets += len(window) - 1
    return total, targets


@pytest.mark.parametrize("seq_len", [1, 7, 30, 1000])
@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_scores_are_those_of_the_plain_loop(model: Any, seq_len: int, batch_tokens: int) -> None:
    documents = make_documents()
    score = score_documents(model, iter(documents), seq_len=seq_len, batch_tokens=batch_tokens)
    total, targets = direct(model, documents, seq_len)
    assert score.tokens == targets == sum(len(document.tokens) - 1 for document in documents)
    assert score.nll == pytest.approx(total / targets, abs=1e-5)
    assert score.documents == 7
    assert score.num_bytes == sum(document.num_bytes for document in documents)


def test_figures_follow_from_the_totals() -> None:
    score = Score(per_document=np.array([[10.0, 4, 15], [20.0, 6, 25]]))
    assert (score.nll_total, score.tokens, score.num_bytes, score.documents) == (30.0, 10, 40, 2)
    assert score.nll == 3.0
    assert score.perplexity == pytest.approx(math.exp(3))
    assert score.bits_per_byte == pytest.approx(30 / math.log(2) / 40)


def test_figures_of_nothing_and_of_too_much() -> None:
    assert math.isnan(Score().nll)
    assert math.isnan(Score().bits_per_byte)
    assert Score(per_document=np.array([[1e6, 1, 1]])).perplexity == math.inf


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_each_document_has_its_own_figures(model: Any, batch_tokens: int) -> None:
    documents = make_documents()
    score = score_documents(model, iter(documents), seq_len=7, batch_tokens=batch_tokens)
    for figures, shares, document in zip(score.per_document, score.document_shares, documents, strict=True):
        total, targets = direct(model, [document], 7)
        assert figures.tolist() == pytest.approx([total, targets, document.num_bytes], abs=1e-4)
        expected, _ = direct_routing(model, [document], 7)
        assert (shares / targets).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_order_of_documents_does_not_matter(model: Any) -> None:
    documents = make_documents()
    one = score_documents(model, documents, seq_len=16, batch_tokens=100)
    other = score_documents(model, documents[::-1], seq_len=16, batch_tokens=100)
    assert one.nll_total == pytest.approx(other.nll_total, abs=1e-3)
    assert one.routing() == pytest.approx(other.routing(), abs=1e-6)


def test_more_windows_than_are_sorted_together(model: Any) -> None:
    documents = make_documents(3) * 120
    score = score_documents(model, documents, seq_len=4, batch_tokens=4096)
    total, targets = direct(model, make_documents(3), 4)
    assert score.tokens == 120 * targets
    assert score.nll_total == pytest.approx(120 * total, rel=1e-5)
    assert score.documents == 360


@torch.no_grad()
def direct_routing(model: Any, documents: list[Framed], seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean renormalised kept probability (N,) and mean square of each layer's output (L,)."""
    blocks = routed_layers(model)
    shares = torch.zeros(len(blocks), len(blocks[0].experts), dtype=torch.float64)
    square = torch.zeros(len(blocks), dtype=torch.float64)
    count = 0

    def observe(layer: int, _inputs: torch.Tensor, kept: torch.Tensor, outputs: torch.Tensor) -> None:
        for token in kept.double():
            shares[layer] += token / token.sum()
        square[layer] += outputs.double().square().mean(dim=1).sum()

    with observing(model, observe):
        for document in documents:
            tokens = torch.from_numpy(document.tokens)
            for start in range(0, len(tokens) - 1, seq_len):
                window = tokens[start : start + seq_len + 1]
                model(window[None, :-1])
                count += len(window) - 1
    return shares.mean(dim=0) / count, square / count


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_routing_counts_every_target_once_and_no_padding(model: Any, batch_tokens: int) -> None:
    documents = make_documents()
    score = score_documents(model, documents, seq_len=16, batch_tokens=batch_tokens)
    shares, square = direct_routing(model, documents, 16)
    assert score.routing() == pytest.approx(shares.tolist(), abs=1e-6)
    assert sum(score.routing()) == pytest.approx(1.0, abs=1e-9)
    assert min(score.routing()) > 0.05
    assert (score.output_square / score.tokens).tolist() == pytest.approx(square.tolist(), rel=1e-5)


def test_excluded_experts_have_no_share() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a", "b"), top_k=2))
    exclude(model, [1])
    routing = score_documents(model, make_documents(), seq_len=16, batch_tokens=100).routing()
    assert routing[1] == 0.0
    assert sum(routing) == pytest.approx(1.0, abs=1e-9)


@torch.no_grad()
def test_agreement_counts_the_tokens_whose_experts_bfloat16_would_keep_too() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a", "b", "c"), top_k=2))
    for block in routed_layers(model):
        # Rows this close differ by less than bfloat16 can tell for some tokens.
        block.router.closed.copy_(block.router.closed[:1] * (1 + 0.004 * torch.arange(3)[:, None]))
    same, count = 0, 0

    def observe(layer: int, inputs: torch.Tensor, kept: torch.Tensor, _outputs: torch.Tensor) -> None:
        nonlocal same, count
        rows = routed_layers(model)[layer].router.rows
        for token, mine in zip(inputs, kept, strict=True):
            rounded = (rows.bfloat16() @ token.bfloat16()).float().topk(2).indices
            same += set(rounded.tolist()) == set(mine.nonzero().flatten().tolist())
            count += 1

    documents = make_documents()
    with observing(model, observe):
        for document in documents:
            model(torch.from_numpy(document.tokens)[None, :-1])
    score = score_documents(model, documents, seq_len=100, batch_tokens=100_000)
    assert 0.3 < same / count < 0.99
    assert score.router_agreement == pytest.approx(same / count, abs=0.01)


def test_there_is_no_agreement_to_speak_of_where_all_experts_run() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a")))
    assert score_documents(model, make_documents(), seq_len=16, batch_tokens=100).router_agreement is None


def test_text_is_read_as_the_model_takes_it(model: Any) -> None:
    """However many documents there are, a few hundred at most are in memory before they are scored."""
    read = scored = ahead = 0

    def stream() -> Any:
        nonlocal read, ahead
        for document in make_documents(3) * 700:
            read += 1
            ahead = max(ahead, read - scored)
            yield document

    def count(_module: Any, given: Any) -> None:
        nonlocal scored
        scored += len(given[0])

    handle = model.model.embed_tokens.register_forward_pre_hook(count)
    assert score_documents(model, stream(), seq_len=16, batch_tokens=4096).documents == 2100
    handle.remove()
    assert scored == 2100
    assert ahead <= 300


def test_anchor_alone_has_all_shares() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config()))
    assert score_documents(model, make_documents(), seq_len=16, batch_tokens=100).routing() == [1.0]


def test_no_document_is_no_score(model: Any) -> None:
    score = score_documents(model, [], seq_len=16, batch_tokens=100)
    assert (score.documents, score.tokens) == (0, 0)


def test_batches_stay_below_their_size(model: Any) -> None:
    sizes = []
    handle = model.lm_head.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    score_documents(model, make_documents(), seq_len=16, batch_tokens=40)
    handle.remove()
    assert max(sizes) <= 40
    assert len(sizes) > 3


def test_held_out_parts_are_scored_one_by_one_and_progress_is_shown(model: Any) -> None:
    done: dict[str, list[float]] = {}

    class Listener(SilentReporter):
        @contextmanager
        def progress(self, title: str, total: float, unit: str) -> Iterator[Any]:
            assert unit == "windows"
            done[title] = [total, 0]
            yield self
            assert done[title][0] == done[title][1]

        def advance(self, amount: float) -> None:
            list(done.values())[-1][1] += amount

    parts = {"own": make_documents(5), "public": make_documents()[5:]}
    found = held_out_losses(model, parts, seq_len=16, reporter=Listener())
    assert list(done) == ["scoring held-out text, own", "scoring held-out text, public"]
    for name, documents in parts.items():
        assert found[name] == score_documents(model, documents, seq_len=16, batch_tokens=8192).nll
