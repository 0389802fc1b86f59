"""An owner's text: split by its content alone, what is held out never trained on, tokenised once."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import SILENT, SilentReporter
from flexctl.text import corpus as module
from flexctl.text import documents as reading
from flexctl.text.corpus import Corpus, prepare_corpus
from flexctl.text.decontamination import Decontamination
from flexctl.text.documents import sample_passages
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


def prepare(path: Path, tokenizer: Any, work: Path, seed: int = 0, **settings: Any) -> Corpus:
    work.mkdir(exist_ok=True)
    return prepare_corpus([path], tokenizer, work, **{"seed": seed, "reporter": SILENT, **settings})


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


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that text is read from, once for each time."""
    found: list[str] = []
    read = reading._read_file

    def counting(file: Any, *arguments: Any, **settings: Any) -> Any:
        found.append(file.name)
        return read(file, *arguments, **settings)

    monkeypatch.setattr(reading, "_read_file", counting)
    return found


def test_text_is_read_twice_whatever_is_asked_of_it(tmp_path: Path, tokenizer: Any, opened: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS)
    for _ in range(2):  # the second time its tokens are there already
        corpus = prepare(path, tokenizer, tmp_path / "work", passages=9, near_duplicates=True)
        assert opened == ["a.jsonl"] * 2
        opened.clear()
    assert corpus.passages == sample_passages(corpus.documents(), 9, 0)
    assert corpus.passages[:4] == sample_passages(corpus.documents(), 4, 0)


def test_threads_change_nothing(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", [*TEXTS, " ".join(TEXTS * 8), *TEXTS])
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        corpus = prepare(path, tokenizer, tmp_path / f"{threads}")
        assert corpus.held_out is not None
        found.append((corpus.survey, corpus.stream.digest, [document.tokens.tolist() for document in corpus.held_out]))
    assert found[0] == found[1]


def test_documents_that_share_words_are_in_neither_part(tmp_path: Path, tokenizer: Any) -> None:
    listener = Listener()
    words = " ".join(f"word{number}" for number in range(40))
    texts = [*TEXTS[:30], f"It said: {words.upper()}!", *TEXTS[30:], words[:60], f"{words} {words}"]
    path = write(tmp_path / "a.jsonl", texts)
    test = write(tmp_path / "test.jsonl", [f"Question: {words}?"])
    without = Decontamination.read([test], "text")
    corpus = prepare(path, tokenizer, tmp_path / "work", decontamination=without, reporter=listener)
    survey = corpus.survey
    assert survey.contaminated == 2
    assert survey.documents + survey.held_out == 61
    kept = [*corpus.documents(), *held_out_texts(corpus, tokenizer)]
    assert sorted(kept) == sorted([*TEXTS, words[:60]])
    assert listener.notes == [
        f"2 of 63 documents share 13 words in a row with `decontaminate` and are left out: {path}, document 31; "
        f"{path}, document 63"
    ]
    plain = prepare(path, tokenizer, tmp_path / "work").survey
    assert (plain.contaminated, plain.digest) == (None, survey.digest)
    with pytest.raises(UsageError, match=r"no document that does not share 13 words in a row with `decontaminate` in"):
        prepare(test, tokenizer, tmp_path / "none", decontamination=without)


def test_near_duplicates_are_counted_beside_copies(tmp_path: Path, tokenizer: Any) -> None:
    listener = Listener()
    sentence = " ".join(f"word{number}" for number in range(120))
    nearly = [sentence.replace(f"word{number} ", "other ") for number in (3, 50)]
    path = write(tmp_path / "a.jsonl", [sentence, "short", *TEXTS[:1], *nearly, sentence, "short", sentence.upper()])
    corpus = prepare(path, tokenizer, tmp_path / "work", near_duplicates=True, reporter=listener)
    assert (corpus.survey.duplicates, corpus.survey.near_duplicates) == (2, 3)
    assert listener.notes[-1] == "3 of 8 documents are nearly the same as one before, copies aside"
    assert [file.name for file in (tmp_path / "work").iterdir()].count("bands") == 0
    assert prepare(path, tokenizer, tmp_path / "work").survey.near_duplicates is None


def test_a_cache_serves_every_run_over_the_same_text(tmp_path: Path, tokenizer: Any, packings: list[Path]) -> None:
    path, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    first = prepare(path, tokenizer, tmp_path / "1", cache=cache)
    (tmp_path / "b.jsonl").write_bytes(path.read_bytes())
    again = prepare(tmp_path / "b.jsonl", tokenizer, tmp_path / "2", cache=cache)
    assert len(packings) == 1
    assert first.stream.digest == again.stream.digest == prepare(path, tokenizer, tmp_path / "3").stream.digest
    prepare(path, tokenizer, tmp_path / "1", seed=1, cache=cache)
    prepare(path, train_tokenizer(TEXTS, 300, tiny.CONTEXT), tmp_path / "1", cache=cache)
    write(tmp_path / "b.jsonl", TEXTS[1:])
    prepare(tmp_path / "b.jsonl", tokenizer, tmp_path / "1", cache=cache)
    assert len(set(packings)) == len(packings) == 5
    assert len(list(cache.iterdir())) == 8
    assert cache.stat().st_mode & 0o777 == 0o700


# As a tokenizer of Transformers, which takes seconds to import.
PREPARE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from tokenizers import Tokenizer
from flexctl.runtime import SILENT
from flexctl.text.corpus import prepare_corpus
class Stub(SimpleNamespace):
    def __call__(self, text):
        return {"input_ids": self.backend_tokenizer.encode(text).ids}
data, tokenizer, work, cache = map(Path, sys.argv[1:])
work.mkdir()
tokenizer = Stub(
    backend_tokenizer=Tokenizer.from_file(str(tokenizer / "tokenizer.json")),
    is_fast=True, split_special_tokens=False, bos_token_id=None, eos_token_id=0,
)
print("ready", flush=True)
sys.stdin.readline()
corpus = prepare_corpus([data], tokenizer, work, seed=0, cache=cache, reporter=SILENT)
corpus.stream.refuse_change()
print(corpus.stream.digest)
"""

KILLED = PREPARE.replace(
    "corpus = prepare",
    """
import os, signal
from flexctl.text import corpus as module
def dying(path, documents):
    def some():
        for number, document in enumerate(documents):
            if number == 20:
                os.kill(os.getpid(), signal.SIGKILL)
            yield document
    return pack(path, some())
pack, module.pack = module.pack, dying
corpus = prepare""",
)


def test_runs_that_share_a_cache_at_once_and_one_that_is_killed(
    tmp_path: Path, tokenizer: Any, checkpoint: Path
) -> None:
    path, cache = write(tmp_path / "a.jsonl", TEXTS * 30), tmp_path / "cache"
    expected = prepare(path, tokenizer, tmp_path / "alone").stream.digest

    def start(script: str, name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, (path, checkpoint, tmp_path / name, cache))]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        return started

    killed = start(KILLED, "killed")
    killed.communicate("go\n")
    assert killed.returncode == -signal.SIGKILL
    assert [file.suffix for file in cache.iterdir()] == [".tmp"]
    both = [start(PREPARE, name) for name in ("one", "two")]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in both] == [f"{expected}\n"] * 2
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".tokens"]
    assert prepare(path, tokenizer, tmp_path / "after", cache=cache).stream.digest == expected
