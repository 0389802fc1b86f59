"""An owner's text: split by its content alone, what is held out never trained on, tokenised once."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import SILENT, SilentReporter
from flexctl.text import corpus as module
from flexctl.text.corpus import Corpus, prepare_corpus
from flexctl.text.tokenizer import train_tokenizer

TEXTS = tiny.make_texts("code", 60)


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(path: Path, tokenizer: Any, work: Path, seed: int = 0) -> Corpus:
    work.mkdir(exist_ok=True)
    return prepare_corpus([path], tokenizer, work, seed=seed, reporter=SILENT)


def held_out_texts(corpus: Corpus, tokenizer: Any) -> set[str]:
    assert corpus.held_out is not None
    return {tokenizer.decode(document.tokens[1:-1]) for document in corpus.held_out}


def test_every_document_is_trained_on_or_held_out(tmp_path: Path, tokenizer: Any) -> None:
    corpus = prepare(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "work")
    training, held_out = list(corpus.documents()), held_out_texts(corpus, tokenizer)
    assert len(held_out) == corpus.survey.held_out == 3
    assert sorted([*training, *held_out]) == sorted(TEXTS)
    assert corpus.survey.documents == len(training) == 57
    assert corpus.survey.num_bytes == sum(len(text.encode()) for text in training)
    stream = tokenizer.decode(corpus.stream.sequence(0, len(corpus.stream) - 1))
    assert stream == "<|endoftext|>" + "".join(text + "<|endoftext|>" for text in training)


def test_held_out_documents_stay_out_when_they_occur_twice(tmp_path: Path, tokenizer: Any) -> None:
    corpus = prepare(write(tmp_path / "a.jsonl", TEXTS * 2), tokenizer, tmp_path / "work")
    assert not set(corpus.documents()) & held_out_texts(corpus, tokenizer)
    assert corpus.survey.documents + corpus.survey.held_out == 120


def test_split_depends_on_text_and_seed_alone(tmp_path: Path, tokenizer: Any) -> None:
    shuffled = list(TEXTS)
    random.Random(1).shuffle(shuffled)
    one = prepare(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "1")
    other = prepare(write(tmp_path / "b.jsonl", shuffled), tokenizer, tmp_path / "2")
    reseeded = prepare(tmp_path / "a.jsonl", tokenizer, tmp_path / "3", seed=1)
    assert held_out_texts(one, tokenizer) == held_out_texts(other, tokenizer)
    assert held_out_texts(one, tokenizer) != held_out_texts(reseeded, tokenizer)
    assert one.survey.digest != other.survey.digest


def test_two_documents_hold_one_out_and_a_single_one_none(tmp_path: Path, tokenizer: Any) -> None:
    two = prepare(write(tmp_path / "a.jsonl", TEXTS[:2]), tokenizer, tmp_path / "1")
    assert (two.survey.documents, two.survey.held_out) == (1, 1)
    listener = Listener()
    (tmp_path / "2").mkdir()
    single = write(tmp_path / "b.jsonl", TEXTS[:1])
    one = prepare_corpus([single], tokenizer, tmp_path / "2", seed=0, reporter=listener)
    assert (one.survey.documents, one.survey.held_out, one.held_out) == (1, 0, None)
    assert len(listener.warnings) == 1
    assert "single document" in listener.warnings[0]
    assert list(one.documents()) == TEXTS[:1]


@pytest.mark.parametrize(("often", "copies"), [(TEXTS[7], 60), (min(TEXTS), 200), (TEXTS[0], 2)])
def test_copies_leave_the_held_out_share_as_it_is(tmp_path: Path, tokenizer: Any, often: str, copies: int) -> None:
    listener = Listener()
    path = write(tmp_path / "a.jsonl", [*TEXTS, *[often] * (copies - 1)])
    for seed in range(4):
        work = tmp_path / str(seed)
        work.mkdir()
        corpus = prepare_corpus([path], tokenizer, work, seed=seed, reporter=listener)
        survey, training = corpus.survey, list(corpus.documents())
        total = len(TEXTS) + copies - 1
        assert survey.held_out == round(0.05 * total)
        assert survey.documents == len(training) == total - survey.held_out
        assert survey.num_bytes == sum(len(text.encode()) for text in training)
        assert survey.duplicates == copies - 1
        assert f"{copies - 1} of {total} documents are copies" in listener.notes.pop()
        assert not set(training) & held_out_texts(corpus, tokenizer)


def test_one_text_many_times_is_trained_on_with_nothing_held_out(tmp_path: Path, tokenizer: Any) -> None:
    listener = Listener()
    path = write(tmp_path / "a.jsonl", TEXTS[:1] * 60)
    corpus = prepare_corpus([path], tokenizer, tmp_path, seed=0, reporter=listener)
    assert (corpus.survey.documents, corpus.survey.held_out, corpus.held_out) == (60, 0, None)
    assert list(corpus.documents()) == TEXTS[:1] * 60
    assert "single document 60 times" in listener.warnings[0]


def test_of_two_texts_with_many_copies_the_rarer_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "a.jsonl", [*TEXTS[:1] * 30, *TEXTS[1:2] * 20])
    corpus = prepare(path, tokenizer, tmp_path / "work")
    assert held_out_texts(corpus, tokenizer) == {TEXTS[1]}
    assert set(corpus.documents()) == {TEXTS[0]}


def test_what_is_held_out_is_what_was_held_out_by_former_versions(tmp_path: Path, tokenizer: Any) -> None:
    def rank(text: str) -> bytes:
        return hashlib.sha256(f"5\0{text}".encode()).digest()

    corpus = prepare(write(tmp_path / "a.jsonl", TEXTS), tokenizer, tmp_path / "work", seed=5)
    assert held_out_texts(corpus, tokenizer) == set(sorted(TEXTS, key=rank)[:3])


def test_text_without_documents_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match=r"no document with text in .*a\.jsonl"):
        prepare(write(tmp_path / "a.jsonl", ["", "  "]), tokenizer, tmp_path / "work")


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that tokens are packed into."""
    found: list[Path] = []
    pack = module.pack

    def counting(path: Path, documents: Any) -> Any:
        found.append(path)
        return pack(path, documents)

    monkeypatch.setattr(module, "pack", counting)
    return found


def test_tokens_of_the_same_text_are_used_again(tmp_path: Path, tokenizer: Any, packings: list[Path]) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    first = prepare(path, tokenizer, tmp_path / "work")
    again = prepare(path, tokenizer, tmp_path / "work")
    assert len(packings) == 1
    assert np.array_equal(first.stream.sequence(0, 500), again.stream.sequence(0, 500))


def test_tokens_of_other_text_seed_or_tokenizer_are_not(tmp_path: Path, tokenizer: Any, packings: list[Path]) -> None:
    path, work = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "work"
    other = train_tokenizer(tiny.make_texts("public", 30), len(tokenizer), tiny.CONTEXT)
    assert len(other) == len(tokenizer)
    prepare(path, tokenizer, work)
    prepare(path, tokenizer, work, seed=1)
    prepare(path, tokenizer, work)
    corpus = prepare(path, other, work)
    assert len(packings) == 4
    assert other.decode(corpus.stream.sequence(0, 60)) in "<|endoftext|>" + "<|endoftext|>".join(corpus.documents())
    write(path, TEXTS[:-1])
    prepare(path, other, work)
    assert len(packings) == 5


def test_a_token_file_that_was_not_finished_is_made_again(tmp_path: Path, tokenizer: Any) -> None:
    path, work = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "work"
    whole = prepare(path, tokenizer, work)
    expected = len(whole.stream)
    (work / "own.json").unlink()
    (work / "own.tokens").write_bytes(b"\0" * 8)
    assert len(prepare(path, tokenizer, work).stream) == expected


def test_a_token_file_of_other_content_is_made_again_beside_the_old_one(tmp_path: Path, tokenizer: Any) -> None:
    """Of the same length, under a mark that fits; who has the old file mapped goes on with what it was."""
    path, work = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "work"
    whole = prepare(path, tokenizer, work).stream
    expected = whole.sequence(0, len(whole) - 1).copy()
    (work / "own.tokens").write_bytes(bytes(4 * len(whole)))
    assert not whole.is_whole
    with pytest.raises(FlexctlError, match=r"own\.tokens: was changed while a run used it"):
        whole.refuse_change()
    again = prepare(path, tokenizer, work).stream
    again.refuse_change()
    assert np.array_equal(again.sequence(0, len(again) - 1), expected)
    assert not whole.sequence(0, len(whole) - 1).any()
