"""Extraction: a model that has learned its text by heart is caught, one that has not is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from flexctl.evaluation.attacks.extraction import _choose, beginnings, continue_all, share
from flexctl.model.building import load_dense
from flexctl.model.losses import training_loss
from flexctl.runtime import SILENT
from flexctl.text.tokens import frame_documents

TEXTS = tiny.make_texts("sums", 3, seed=7)


def extract(model: Any, tokenizer: Any, samples: int = 2, batch_tokens: int = 4096) -> Any:
    started = beginnings(tokenizer, list(frame_documents(tokenizer, TEXTS)), 12, 20)
    with SILENT.progress("", 0, "") as bar:
        return continue_all(
            model, tokenizer, started, length=20, samples=samples, batch_tokens=batch_tokens, seed=0, progress=bar
        )


@pytest.fixture(scope="module")
def by_heart(checkpoint: Path, tokenizer: Any) -> Any:
    """The checkpoint, trained on the texts until it knows them."""
    torch.manual_seed(0)
    model = load_dense(checkpoint).requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [torch.from_numpy(document.tokens[:60])[None] for document in frame_documents(tokenizer, TEXTS)]
    ids = torch.cat(rows)
    for _ in range(120):
        loss = training_loss(model, ids[:, :-1], ids[:, 1:], 0.0) / ids[:, 1:].numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1
    return model.eval()


def test_a_model_that_learned_by_heart_is_caught(by_heart: Any, tokenizer: Any) -> None:
    found = extract(by_heart, tokenizer)
    assert found.near.tolist() == [1, 1, 1]
    assert found.exact.sum() >= 2
    assert [len(made) for made in found.texts] == [2, 2, 2]


def test_a_model_that_never_saw_the_text_is_not(checkpoint: Path, tokenizer: Any) -> None:
    found = extract(load_dense(checkpoint), tokenizer)
    assert found.near.sum() == found.exact.sum() == 0
    assert (found.similarity < 0.6).all()


def test_the_size_of_a_batch_changes_the_draws_alone(by_heart: Any, tokenizer: Any) -> None:
    """Beginnings go with their own documents, in whatever batch."""
    assert extract(by_heart, tokenizer, samples=3, batch_tokens=1).near.tolist() == [1, 1, 1]


def test_only_what_follows_is_compared(tokenizer: Any) -> None:
    (document,) = frame_documents(tokenizer, TEXTS[:1])
    (started,) = beginnings(tokenizer, [document], 12, 20)
    assert tokenizer.decode(started.tokens[1:]) + started.text == tokenizer.decode(document.tokens[1:33])
    assert len(started.tokens) == 13
    assert beginnings(tokenizer, [document], 12, len(document.tokens) - 2 - 12 + 1) == []
    assert len(beginnings(tokenizer, [document], 12, len(document.tokens) - 2 - 12)) == 1


def test_rare_tokens_are_never_drawn() -> None:
    logits = torch.log(torch.tensor([[0.6, 0.36, 0.03, 0.01]]))
    generator = torch.Generator().manual_seed(0)
    drawn = {int(_choose(logits, generator)) for _ in range(300)}
    assert drawn == {0, 1}


def test_a_share_of_none_has_an_interval() -> None:
    none, half = share(np.zeros(100)), share(np.array([1.0, 0.0] * 50))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 100))
    assert half.low is not None
    assert half.high is not None
    assert half.low < 0.5 < half.high
