"""How well a score tells members: against a count of all pairs, and where there is nothing to tell."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.evaluation.attacks.membership import Losses, area, measure_losses, memberships, true_positives
from flexctl.model.building import load_dense
from flexctl.runtime import SILENT
from flexctl.text.tokens import frame_documents

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=20).map(np.array)


@given(SCORES, SCORES)
def test_the_area_is_the_share_of_pairs_in_order(members: np.ndarray, others: np.ndarray) -> None:
    pairs = [(a > b) + (a == b) / 2 for a in members for b in others]
    assert area(members, others) == pytest.approx(sum(pairs) / len(pairs))


@given(SCORES, SCORES)
def test_no_threshold_with_so_few_false_alarms_finds_more(members: np.ndarray, others: np.ndarray) -> None:
    allowed = [t for t in [*others, others.min() - 1] if (others > t).mean() <= 0.01]
    assert true_positives(members, others) == max((members > t).mean() for t in allowed)


def test_one_false_alarm_in_a_hundred_is_allowed() -> None:
    others = np.arange(100.0)
    assert true_positives(np.array([98.5, 97.5]), others) == 0.5


def test_scores_from_nowhere_are_not_told_apart() -> None:
    rng = np.random.default_rng(1)
    found = memberships({"loss": rng.normal(size=150)}, {"loss": rng.normal(size=150)})["loss"]
    assert found.auc.low is not None
    assert found.auc.high is not None
    assert found.auc.low < 0.5 < found.auc.high
    apart = memberships({"loss": rng.normal(size=150) + 2}, {"loss": rng.normal(size=150)})["loss"]
    assert apart.auc.low is not None
    assert apart.auc.low > 0.85
    assert apart.tpr.value > 0.2


def test_each_score_is_higher_where_the_loss_is_lower() -> None:
    low = Losses(mean=np.array([1.0]), zlib=np.array([0.1]), hardest=np.array([2.0]))
    high = Losses(mean=np.array([2.0]), zlib=np.array([0.2]), hardest=np.array([4.0]))
    assert all(low.scores(None)[name] > high.scores(None)[name] for name in high.scores(None))
    assert low.scores(high)["calibrated"] == [1.0]
    assert "calibrated" not in low.scores(None)


def test_losses_are_those_of_each_document_alone(checkpoint: Path, tokenizer: Any) -> None:
    import torch

    model = load_dense(checkpoint)
    texts = ["the miller walked", "a", "the old king left behind the long road without a word " * 9]
    framed = list(frame_documents(tokenizer, texts))
    with SILENT.progress("", 0, "") as bar:
        found = measure_losses(model, tokenizer, framed, seq_len=32, batch_tokens=70, progress=bar)
    for number, document in enumerate(framed):
        ids = torch.from_numpy(document.tokens[:33])[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.log_softmax(-1)
        nll = -logits[0].gather(1, ids[0, 1:, None])[:, 0].double().numpy()
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert found.mean[number] == pytest.approx(nll.mean(), abs=1e-4)
        assert found.zlib[number] == pytest.approx(nll.sum() / len(zlib.compress(text.encode())), abs=1e-3)
        hardest = np.sort(nll)[-max(1, round(0.2 * len(nll))) :]
        assert found.hardest[number] == pytest.approx(hardest.mean(), abs=1e-4)
    assert math.isfinite(found.mean.sum())
