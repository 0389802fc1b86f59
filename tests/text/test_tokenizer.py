"""The tokenizer that is trained with an anchor loses nothing and is the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flexctl.model.building import load_tokenizer
from flexctl.text.tokenizer import train_tokenizer

TEXTS = tiny.make_texts("public", 20) + tiny.make_texts("sums", 20)
TRAINED = train_tokenizer(TEXTS, 400, 128)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(text=st.text(max_size=60))
@example(text=" leading, two  blanks \t\r\n and a trailing one ")
@example(text="don ' t , stop . clean !")
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(encode(TRAINED, text)) == text


def test_special_tokens_and_size() -> None:
    assert len(TRAINED) == 400
    assert TRAINED.eos_token == "<|endoftext|>"
    assert TRAINED.pad_token_id not in (None, TRAINED.eos_token_id)
    assert TRAINED.bos_token is None
    assert TRAINED.model_max_length == 128


def test_merges_are_learnt_from_the_text() -> None:
    text = TEXTS[0]
    assert len(encode(TRAINED, text)) < 0.8 * len(text.encode())


def test_digits_stand_alone() -> None:
    assert len(encode(TRAINED, "7777")) == 4


def test_same_text_gives_the_same_tokenizer() -> None:
    again = train_tokenizer(iter(TEXTS), 400, 128)
    assert again.get_vocab() == TRAINED.get_vocab()
    assert encode(again, TEXTS[3]) == encode(TRAINED, TEXTS[3])


def test_it_is_the_same_after_loading(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "A caf\u00e9 , 12 'quotes' .\r\n"
    assert encode(loaded, text) == encode(TRAINED, text)
    assert loaded.decode(encode(loaded, text)) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (TRAINED.eos_token_id, TRAINED.pad_token_id)
