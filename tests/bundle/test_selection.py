"""Who may answer: names resolve to indices once, or are an error."""

from __future__ import annotations

import pytest

from flexctl.bundle import select
from flexctl.errors import UsageError

EXPERTS = ("public", "code", "law", "sums")


@pytest.mark.parametrize(
    ("without", "left_out", "names"),
    [
        ((), (), ()),
        (("law",), (2,), ("law",)),
        (("sums", "code"), (1, 3), ("code", "sums")),
        (("law", "law"), (2,), ("law",)),
        (("sums", "law", "code"), (1, 2, 3), ("code", "law", "sums")),
    ],
)
def test_names_become_indices(without: tuple[str, ...], left_out: tuple[int, ...], names: tuple[str, ...]) -> None:
    selection = select(EXPERTS, "merged", without=without)
    assert (selection.left_out, selection.without) == (left_out, names)
    assert selection.count == len(EXPERTS) - len(left_out)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nobody", "without: 'nobody' is not in merged, which holds public, code, law, sums"),
        ("Law", "without: 'Law' is not in merged, which holds public, code, law, sums"),
        ("public", "without: the public expert cannot be left out"),
    ],
)
def test_who_is_not_there_is_refused(name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(EXPERTS, "merged", without=("law", name))
    assert caught.value.message == says
