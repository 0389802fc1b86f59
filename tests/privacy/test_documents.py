"""Documents one by one: every one is there, and a long one is seen in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexctl.errors import FlexctlError, UsageError
from flexctl.privacy.documents import Documents, padded
from flexctl.text.tokens import Framed


def framed(*lengths: int) -> list[Framed]:
    return [Framed(tokens=np.arange(length) + 10 * i, num_bytes=1) for i, length in enumerate(lengths)]


def test_documents_come_back_as_they_went_in(tmp_path: Path) -> None:
    documents = Documents.write(tmp_path / "d", framed(5, 2, 9))
    assert len(documents) == 3
    assert documents.window(1, 100).tolist() == [10, 11]
    assert documents.window(2, 100).tolist() == list(range(20, 29))
    assert documents.shortest_first().tolist() == [1, 0, 2]
    assert documents.shortest_first(np.array([2, 0])).tolist() == [0, 2]


def test_every_part_of_a_long_document_may_be_seen(tmp_path: Path) -> None:
    documents = Documents.write(tmp_path / "d", framed(9))
    seen = {tuple(documents.window(0, 3, place)) for place in range(100)}
    assert seen == {tuple(range(start, start + 4)) for start in range(5)} | {(5, 6, 7, 8)}


def test_one_document_more_changes_no_other(tmp_path: Path) -> None:
    """None is held out, none is packed with another: what is left of a corpus is what it was."""
    few, more = (Documents.write(tmp_path / str(n), framed(5, 2, 9, 4)[:n]) for n in (3, 4))
    assert [few.window(i, 8).tolist() for i in range(3)] == [more.window(i, 8).tolist() for i in range(3)]


def test_rows_weigh_a_document_as_one_and_an_empty_row_as_nothing() -> None:
    rows = padded([np.array([5, 6, 7]), np.array([8, 9, 10, 11, 12])], 3)
    assert rows.inputs.tolist() == [[5, 6, 0, 0], [8, 9, 10, 11], [0, 0, 0, 0]]
    assert rows.targets.tolist() == [[6, 7, 0, 0], [9, 10, 11, 12], [0, 0, 0, 0]]
    assert torch.equal(rows.weights.sum(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_no_documents_and_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no document is left"):
        Documents.write(tmp_path / "none", [])
    documents = Documents.write(tmp_path / "d", framed(5))
    documents.refuse_change()
    with (tmp_path / "d").open("r+b") as file:
        file.write(b"\1")
    with pytest.raises(FlexctlError, match="was changed while a run used it"):
        documents.refuse_change()
