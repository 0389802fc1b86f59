"""The public sample: seeded, the same whatever the order, no larger than it must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexctl.bundle import RawTensor
from flexctl.model.tensors import to_bytes
from flexctl.text.sample import PublicSample, draw_sample, leading
from flexctl.text.tokens import Framed, frame_documents


def make_documents(lengths: list[int]) -> list[Framed]:
    return [
        Framed(tokens=np.array([0, *[i + 2] * length, 0], dtype=np.int64), num_bytes=length)
        for i, length in enumerate(lengths)
    ]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    most=st.integers(0, 400),
    seed=st.integers(0, 3),
    shuffle=st.randoms(),
)
def test_sample_is_minimal_and_does_not_depend_on_the_order(
    lengths: list[int], most: int, seed: int, shuffle: Any
) -> None:
    documents = make_documents(lengths)
    sample = draw_sample(iter(documents), most, seed)
    shuffled = list(documents)
    shuffle.shuffle(shuffled)
    again = draw_sample(iter(shuffled), most, seed)
    assert [d.tokens.tolist() for d in again.documents] == [d.tokens.tolist() for d in sample.documents]

    sizes = [len(d.tokens) for d in sample.documents]
    everything = sum(len(d.tokens) for d in documents)
    assert sum(sizes) >= min(most, everything)
    assert len(sizes) == 1 or sum(sizes[:-1]) < most
    assert len(sizes) >= 1


def test_other_seeds_draw_other_documents() -> None:
    documents = make_documents([5] * 60)
    first, other = (draw_sample(documents, 100, seed).documents for seed in (0, 1))
    assert {int(d.tokens[1]) for d in first} != {int(d.tokens[1]) for d in other}


@pytest.mark.parametrize("count", [1, 2, 9])
def test_sample_survives_its_tensors(count: int) -> None:
    sample = PublicSample(make_documents(list(range(1, count + 1))))
    tensors = sample.to_tensors()
    assert tensors["tokens"].dtype == torch.int32
    assert tensors["offsets"].dtype == torch.int64
    assert len(tensors["offsets"]) == count + 1
    again = PublicSample.from_tensors({name: RawTensor(*to_bytes(tensor)) for name, tensor in tensors.items()})
    assert [d.tokens.tolist() for d in again.documents] == [d.tokens.tolist() for d in sample.documents]


def test_stream_and_texts_are_the_documents(tokenizer: Any) -> None:
    texts = tiny.make_texts("public", 5)
    sample = PublicSample(list(frame_documents(tokenizer, texts)))
    assert list(sample.texts(tokenizer)) == texts
    stream = sample.stream()
    assert len(stream) == sum(len(d.tokens) for d in sample.documents) - 4
    decoded = tokenizer.decode(stream.sequence(0, len(stream) - 1))
    assert decoded == "<|endoftext|>" + "".join(text + "<|endoftext|>" for text in texts)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), most=st.integers(0, 400))
def test_leading_documents_fit_and_one_more_would_not(lengths: list[int], most: int) -> None:
    documents = make_documents(lengths)
    kept = leading(documents, most)
    assert kept == documents[: len(kept)]
    sizes = [len(document.tokens) for document in documents]
    assert len(kept) == 1 or sum(sizes[: len(kept)]) <= most
    assert len(kept) == len(documents) or sum(sizes[: len(kept) + 1]) > most
