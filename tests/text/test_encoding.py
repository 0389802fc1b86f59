"""A long text has the same tokens piece by piece as at once, whatever it is made of; a batch is small in characters."""

from __future__ import annotations

import base64
import copy
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flexctl.text.encoding import encoded, in_pieces
from flexctl.text.tokenizer import train_tokenizer

END = "<|endoftext|>"
CHANCE = random.Random(0)
PROSE = "\n\n".join(tiny.make_texts("public", 40) + tiny.make_texts("code", 40) + tiny.make_texts("sums", 40))
CHINESE = "".join(chr(0x4E00 + CHANCE.randrange(200)) for _ in range(3000))
TEXTS = {
    "prose": PROSE,
    "one line": " ".join(PROSE.split()),
    "no space": "".join(PROSE.split()),
    "base64": base64.b64encode(CHANCE.randbytes(9000)).decode(),
    "chinese": CHINESE,
    "digits": "pi: " + "".join(str(CHANCE.randrange(10)) for _ in range(8000)),
    "one letter": "b" + "a" * 8000,
    "white space": "a" + " " * 3000 + "b\n" + " " * 5000 + "\n" + "\r\n\t" * 900 + "c",
    "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301" * 900,
    "special": f"one {END} two{END}" * 400,
}
SPLIT = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def wrapped(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Any:
    import transformers

    tokenizer.train_from_iterator([PROSE, CHINESE[:500], TEXTS["base64"][:500], "aaaa" * 9, "    " * 9], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def bpe(special: str = END, alphabet: bool = True) -> trainers.BpeTrainer:
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    return trainers.BpeTrainer(
        vocab_size=700, special_tokens=[special, "<unk>"], initial_alphabet=letters, show_progress=False
    )


def ours() -> Any:
    return train_tokenizer([PROSE], 600, 128)


def digits_in_threes() -> Any:
    """As dolma2 and Llama 3: a pattern that looks ahead over white space and takes digits three at a time."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return wrapped(made, bpe())


def prepended() -> Any:
    """As Llama 2: no words at all, spaces become letters, and a text begins with one."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    found = wrapped(made, bpe(alphabet=False))
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("\x00", "isolated")
    return found


def unigram() -> Any:
    """As T5: the likeliest way through each word, and a text begins with a space."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=[END, "<unk>"], unk_token="<unk>", show_progress=False
    )
    return wrapped(made, trainer)


TOKENIZERS = {made.__name__: made() for made in (ours, digits_in_threes, prepended, unigram)}


def whole(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@pytest.mark.parametrize("piece", [256, 1000, 4096])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_tokens_are_those_of_the_whole(tokenizer: str, text: str, piece: int) -> None:
    ((_, ids),) = encoded(TOKENIZERS[tokenizer], [TEXTS[text]], piece=piece)
    assert ids.tolist() == whole(TOKENIZERS[tokenizer], TEXTS[text])


parts = st.sampled_from(
    [*PROSE.split("\n")[:20], CHINESE[:90], " " * 70, "\n", "\r\n \n", "1" * 50, "aaa", END, "e\u0301"]
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(parts, min_size=10, max_size=60).map("".join), piece=st.integers(200, 900))
def test_tokens_are_those_of_the_whole_for_any_mixture(text: str, piece: int) -> None:
    for tokenizer in TOKENIZERS.values():
        assert [ids.tolist() for _, ids in encoded(tokenizer, [text], piece=piece)] == [whole(tokenizer, text)]


class Watched:
    """A tokenizer, and the library's own inside it, that remember how many characters they were given at once."""

    def __init__(self, tokenizer: Any, is_fast: bool = True) -> None:
        self._tokenizer, self.is_fast = tokenizer, is_fast
        self.split_special_tokens, self.backend_tokenizer = tokenizer.split_special_tokens, self
        self.given: list[int] = []

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.given.append(len("".join(texts)))
        return self._tokenizer(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.given.append(len("".join(texts)))
        return self._tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.given.append(len("".join(texts)))
        return self._tokenizer.backend_tokenizer.encode_batch(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer.backend_tokenizer, name)


def test_a_tokenizer_is_given_no_more_than_a_piece_at_once() -> None:
    watched = Watched(TOKENIZERS["ours"])
    texts = [PROSE[:600], *["short"] * 200, PROSE, PROSE[:700], PROSE[:300]]
    assert [text for text, _ in encoded(watched, iter(texts), piece=1000)] == texts
    assert max(watched.given) <= 1000
    assert len(watched.given) < len(texts)


def test_a_batch_waits_for_no_more_text_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> Iterator[str]:
        yield "a" * 900
        yield "b" * 900
        raise AssertionError("read too far")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert next(encoded(TOKENIZERS["ours"], documents(), piece=1000))[0] == "a" * 900


@pytest.mark.parametrize("threads", [2, 5])
def test_tokens_and_their_order_are_those_of_one_thread(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Long texts between short ones take longest, and come where they stand."""
    texts = [PROSE[:50], PROSE * 3, *PROSE.split("\n")[:150], PROSE, "", PROSE[:7]]
    alone = list(encoded(TOKENIZERS["ours"], texts, piece=1000))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together = list(encoded(TOKENIZERS["ours"], texts, piece=1000))
    assert [text for text, _ in together] == texts
    assert [ids.tolist() for _, ids in together] == [ids.tolist() for _, ids in alone]


def test_threads_work_at_once_and_read_no_further_than_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches meet inside the tokenizer, which one after the other would not; nobody waits for all of the text."""
    both = threading.Barrier(2, timeout=10)
    read: list[int] = []

    class Meeting(Watched):
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            both.wait()
            return super().encode_batch_fast(texts, **options)

    def documents() -> Iterator[str]:
        for number in range(20):
            read.append(number)
            yield "a" * 900

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    found = encoded(Meeting(TOKENIZERS["ours"]), documents(), piece=1000)
    next(found)
    assert len(read) <= 4
    assert sum(1 for _ in found) == 19


def test_an_error_in_the_text_ends_the_work_of_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> Iterator[str]:
        yield from ["a" * 900] * 5
        raise OSError("no more")

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    before = threading.active_count()
    with pytest.raises(OSError, match="no more"):
        list(encoded(TOKENIZERS["ours"], documents(), piece=1000))
    assert threading.active_count() == before


def test_what_a_tokenizer_would_cut_or_pad_is_whole() -> None:
    cutting = copy.deepcopy(TOKENIZERS["ours"])
    cutting.backend_tokenizer.enable_truncation(3)
    cutting.backend_tokenizer.enable_padding(length=9)
    assert [ids.tolist() for _, ids in encoded(cutting, ["a", PROSE])] == [
        whole(TOKENIZERS["ours"], text) for text in ("a", PROSE)
    ]


def test_a_slow_tokenizer_takes_texts_whole() -> None:
    watched = Watched(TOKENIZERS["ours"], is_fast=False)
    ((_, ids),) = encoded(watched, [PROSE], piece=1000)
    assert watched.given == [len(PROSE)]
    assert ids.tolist() == whole(TOKENIZERS["ours"], PROSE)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_to_count_words_in_are_the_text_cut_before_words(text: str) -> None:
    pieces = list(in_pieces(["short", TEXTS[text], ""], piece=300))
    assert "".join(pieces[1:-1]) == TEXTS[text]
    assert max(map(len, pieces)) <= 300
    if text in ("prose", "one line"):
        assert all(piece[0] == " " and not piece[1].isspace() for piece in pieces[2:-1])


def test_a_tokenizer_trained_on_pieces_is_the_one_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from flexctl.text import tokenizer

    expected = TOKENIZERS["ours"].backend_tokenizer.to_str()
    monkeypatch.setattr(tokenizer, "in_pieces", lambda texts: in_pieces(texts, piece=300))
    assert train_tokenizer([PROSE], 600, 128).backend_tokenizer.to_str() == expected
