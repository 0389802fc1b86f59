"""Two models side by side: differences, who is better where, which documents moved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flexctl.evaluation.bootstrap import resample
from flexctl.evaluation.comparison import compare_domain, most_moved
from flexctl.evaluation.domains import Content, Domain, read_domain
from flexctl.evaluation.scoring import Score
from flexctl.runtime import SILENT

TEXTS = {
    "law": [f"law number {i} says that nobody may do this or that" for i in range(30)],
    "sea": ["waves\n\nand\tmore"],
}


@pytest.fixture
def contents(tmp_path: Path) -> list[Content]:
    found = []
    for name, texts in TEXTS.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found.append(read_domain(Domain(name=name, path=path), SILENT))
    return found


def make_scores(changes: dict[str, dict[int, float]] | None = None) -> dict[str, Score]:
    """Two bits a byte for every document, but for ``changes`` in bits a byte."""
    scores = {}
    for name, texts in TEXTS.items():
        bits = np.full(len(texts), 2.0)
        for index, change in (changes or {}).get(name, {}).items():
            bits[index] += change
        sizes = np.array([float(len(text)) for text in texts])
        scores[name] = Score(per_document=np.column_stack([bits * math.log(2) * sizes, sizes // 4, sizes]))
    return scores


def compared(contents: list[Content], **changes: Any) -> SimpleNamespace:
    scores, others = make_scores(changes), make_scores()
    drawn, others_drawn = ({n: resample(score.per_document) for n, score in of.items()} for of in (scores, others))
    return SimpleNamespace(
        domains={n: compare_domain(scores[n], others[n], drawn[n], others_drawn[n]) for n in scores},
        moved=most_moved(contents, scores, others),
    )


def test_a_model_beside_itself_does_not_differ(contents: list[Content]) -> None:
    found = compared(contents)
    assert found.moved == []
    law = found.domains["law"]
    assert (law.difference, law.difference_low, law.difference_high) == (0.0, 0.0, 0.0)
    assert (law.documents_better, law.documents_worse) == (0, 0)
    assert found.domains["sea"].difference_low is None


def test_differences_are_this_model_s_above_the_other_s(contents: list[Content]) -> None:
    found = compared(contents, law={3: -0.5, 7: 0.2, 9: 0.00005}, sea={0: 0.4})
    law = found.domains["law"]
    sizes = np.array([len(text) for text in TEXTS["law"]])
    assert law.bits_per_byte == pytest.approx(2.0)
    expected = (-0.5 * sizes[3] + 0.2 * sizes[7] + 0.00005 * sizes[9]) / sizes.sum()
    assert law.difference == pytest.approx(expected)
    assert law.difference_low is not None
    assert law.difference_high is not None
    assert law.difference_low <= law.difference <= law.difference_high
    assert (law.documents_better, law.documents_worse) == (1, 1)
    assert [(moved.domain, moved.index) for moved in found.moved] == [("law", 3), ("sea", 0), ("law", 7)]
    assert [moved.difference for moved in found.moved] == pytest.approx([-0.5, 0.4, 0.2])
    assert [moved.words for moved in found.moved][:2] == ["law number 3 says that nobody may do", "waves and more"]


def test_no_more_than_ten_documents_are_named(contents: list[Content]) -> None:
    found = compared(contents, law={i: 0.1 * i for i in range(1, 25)})
    assert [moved.index for moved in found.moved] == list(range(24, 14, -1))
