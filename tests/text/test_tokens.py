"""One framing for training, calibration and scoring; streams on disk; batches that depend on their step alone."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.errors import FlexctlError, UsageError
from flexctl.text.tokens import PASSAGE_TOKENS, Framed, TokenStream, end_to_end, frame_documents, frame_passages, pack
from flexctl.training.batches import Mixture


@pytest.fixture(scope="module")
def beginner(tokenizer: Any) -> Any:
    """The same tokenizer, but it adds a begin token by itself, as Llama's does."""
    from tokenizers import processors

    made = copy.deepcopy(tokenizer)
    made.bos_token = "<|pad|>"
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", made.bos_token_id)]
    )
    assert made("a")["input_ids"][0] == made.bos_token_id
    return made


def test_frame_is_end_of_text_on_both_sides_where_there_is_no_begin_token(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    (framed,) = frame_documents(tokenizer, ["caf\u00e9\r\n"])
    assert framed.tokens[0] == framed.tokens[-1] == end
    assert tokenizer.decode(framed.tokens[1:-1]) == "caf\u00e9\r\n"
    assert end not in framed.tokens[1:-1]
    assert framed.num_bytes == 7
    assert framed.tokens.dtype == np.int64


def test_frame_begins_with_the_begin_token_where_the_tokenizer_adds_one(tokenizer: Any, beginner: Any) -> None:
    plain, begun = (next(frame_documents(which, ["some text"])) for which in (tokenizer, beginner))
    assert begun.tokens[0] == beginner.bos_token_id
    assert begun.tokens[-1] == beginner.eos_token_id
    assert np.array_equal(begun.tokens[1:], plain.tokens[1:])


def test_a_begin_token_that_the_tokenizer_has_but_does_not_add_is_not_used(tokenizer: Any) -> None:
    named = copy.deepcopy(tokenizer)
    named.bos_token = "<|pad|>"
    assert next(frame_documents(named, ["some text"])).tokens[0] == tokenizer.eos_token_id


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UsageError, match="no end-of-text token"):
        list(frame_documents(endless, ["text"]))


def test_framing_many_documents_is_framing_each(tokenizer: Any) -> None:
    texts = [f"document {i} " * (i % 7 + 1) for i in range(150)]
    together = list(frame_documents(tokenizer, iter(texts)))
    assert len(together) == 150
    for text, framed in zip(texts, together, strict=True):
        assert np.array_equal(framed.tokens, next(frame_documents(tokenizer, [text])).tokens)


def test_framing_long_documents_says_nothing(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer would warn of texts longer than the model; they are cut into windows later."""
    list(frame_documents(copy.deepcopy(tokenizer), ["word " * 2000]))
    assert caplog.records == []


def test_passages_are_cut_to_their_first_tokens(tokenizer: Any) -> None:
    short, long = frame_passages(tokenizer, ["ab", "word " * 2000])
    assert short.dtype == torch.int64
    assert len(long) == PASSAGE_TOKENS
    assert long[0] == short[0] == short[-1] == tokenizer.eos_token_id


def framed(*tokens: int) -> Framed:
    return Framed(tokens=np.array(tokens, dtype=np.int64), num_bytes=3)


def test_neighbours_share_their_end_of_text(tmp_path: Path) -> None:
    documents = [framed(0, 5, 6, 0), framed(0, 7, 0), framed(0, 8, 9, 0)]
    expected = [0, 5, 6, 0, 7, 0, 8, 9, 0]
    assert np.concatenate(list(end_to_end(documents))).tolist() == expected
    stream = pack(tmp_path / "x.tokens", iter(documents))
    assert len(stream) == 9
    assert stream.sequence(0, 8).tolist() == expected
    assert len(TokenStream.open(tmp_path / "x.tokens")) == 9


def test_another_process_gets_the_place_of_a_file_and_not_what_is_in_it(tmp_path: Path) -> None:
    stream = pack(tmp_path / "x.tokens", [Framed(tokens=np.arange(1000), num_bytes=1)] * 9)
    sent = pickle.dumps(stream)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert (len(there), there.digest) == (len(stream), stream.digest)
    (tmp_path / "x.tokens").write_bytes(bytes(4 * len(stream)))
    with pytest.raises(FlexctlError, match="was changed"):
        there.refuse_change()
    in_memory = TokenStream(np.arange(5, dtype=np.int32))
    assert pickle.loads(pickle.dumps(in_memory)).digest == in_memory.digest


def test_neighbours_that_begin_with_another_token_share_nothing() -> None:
    assert np.concatenate(list(end_to_end([framed(1, 5, 0), framed(1, 6, 0)]))).tolist() == [1, 5, 0, 1, 6, 0]


def test_empty_stream(tmp_path: Path) -> None:
    stream = pack(tmp_path / "x.tokens", [])
    assert len(stream) == stream.num_sequences(4) == 0


@given(length=st.integers(0, 60), seq_len=st.integers(1, 12))
def test_sequences_cover_each_target_once(length: int, seq_len: int) -> None:
    stream = TokenStream(np.arange(length, dtype=np.int32))
    sequences = [stream.sequence(i, seq_len) for i in range(stream.num_sequences(seq_len))]
    assert all(len(sequence) == seq_len + 1 for sequence in sequences)
    targets = [int(token) for sequence in sequences for token in sequence[1:]]
    assert targets == list(range(1, len(targets) + 1))
    assert length - 1 - len(targets) < seq_len


# Sequence i of a stream of consecutive numbers begins with i * seq_len: a batch shows what it took.
OWN, PUBLIC = 0, 1_000_000


def numbered(start: int, sequences: int, seq_len: int) -> TokenStream:
    return TokenStream(np.arange(start, start + sequences * seq_len + 1, dtype=np.int32))


def make_mixture(
    *, seq_len: int = 4, own: int = 11, public: int = 5, batch_size: int = 4, share: float = 0.25, seed: int = 0
) -> Mixture:
    return Mixture(
        numbered(OWN, own, seq_len),
        numbered(PUBLIC, public, seq_len),
        seq_len=seq_len,
        batch_size=batch_size,
        public_share=share,
        seed=seed,
    )


mixtures = st.builds(
    make_mixture,
    seq_len=st.integers(1, 5),
    own=st.integers(1, 20),
    public=st.integers(1, 8),
    batch_size=st.integers(1, 7),
    share=st.floats(0, 0.95),
    seed=st.integers(0, 3),
)


@given(mixture=mixtures, order=st.permutations(range(12)))
@settings(deadline=None)
def test_batch_depends_on_its_step_alone(mixture: Mixture, order: list[int]) -> None:
    straight = {step: mixture.batch(step) for step in range(12)}
    for step in order:
        assert torch.equal(mixture.batch(step), straight[step])


@given(mixture=mixtures, steps=st.integers(1, 30))
@settings(deadline=None)
def test_counts_add_up_and_epochs_are_complete(mixture: Mixture, steps: int) -> None:
    batches = [mixture.batch(step) for step in range(steps)]
    assert all(batch.shape == (mixture.batch_size, mixture.seq_len + 1) for batch in batches)
    public = torch.cat([mixture.is_public(step) for step in range(steps)])
    first = torch.cat(batches)[:, 0]
    assert torch.equal(public, first >= PUBLIC)
    own = first[first < PUBLIC].tolist()
    public = first[first >= PUBLIC].tolist()
    assert len(public) == mixture.public_before(steps)
    assert len(own) * mixture.seq_len == mixture.own_tokens(steps)
    assert abs(len(public) - steps * mixture.batch_size * mixture.public_share) < 1
    for taken, source in ((own, mixture._own), (public, mixture._public)):
        size = source.count
        whole = len(taken) // size
        for epoch in range(whole):
            assert len(set(taken[epoch * size : (epoch + 1) * size])) == size
        assert set(Counter(taken).values()) <= {whole, whole + 1}


@given(mixture=mixtures, own_tokens=st.integers(1, 2000))
def test_steps_hold_the_tokens_asked_for_to_the_nearest_step(mixture: Mixture, own_tokens: int) -> None:
    steps = mixture.steps_for(own_tokens)
    assert steps >= 1
    sequence = mixture.seq_len
    per_step = mixture.batch_size * sequence * (1 - mixture.public_share)
    if steps > 1:
        assert abs(mixture.own_tokens(steps) - own_tokens) <= per_step / 2 + sequence


def test_epochs_are_shuffled_anew_and_by_the_seed() -> None:
    def orders(seed: int) -> list[list[int]]:
        mixture = make_mixture(own=40, share=0.0, batch_size=4, seed=seed)
        first = [int(token) for step in range(20) for token in mixture.batch(step)[:, 0]]
        return [first[:40], first[40:]]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0)[0] != orders(1)[0]
    assert orders(0)[0] != sorted(orders(0)[0])


def test_own_and_public_text_are_not_in_step() -> None:
    """With as many sequences of each, the two orders are still different permutations."""
    mixture = make_mixture(own=40, public=40, share=0.5, batch_size=40)
    first = torch.cat([mixture.batch(0), mixture.batch(1)])[:, 0]
    assert (first[first < PUBLIC]).tolist() != (first[first >= PUBLIC] - PUBLIC).tolist()


def test_without_public_text_the_share_is_nothing() -> None:
    mixture = Mixture(numbered(0, 5, 4), None, seq_len=4, batch_size=2, public_share=0.5, seed=0)
    assert mixture.public_share == 0.0
    assert mixture.public_before(10) == 0
    assert mixture.batch(3).shape == (2, 5)


def test_too_little_text_is_refused_and_named() -> None:
    short, enough = TokenStream(np.zeros(4, np.int32)), numbered(0, 3, 4)
    settings_of = {"seq_len": 4, "batch_size": 1, "seed": 0}
    with pytest.raises(UsageError, match=r"data: 4 tokens do not fill one sequence of 4"):
        Mixture(short, enough, public_share=0.5, **settings_of)
    with pytest.raises(UsageError, match="the public sample"):
        Mixture(enough, short, public_share=0.5, **settings_of)
    Mixture(enough, short, public_share=0.0, **settings_of)
