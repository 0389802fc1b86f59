"""Who may answer: names resolve to indices once, or are an error."""

from __future__ import annotations

import pytest

from flexctl.bundle import left_out_of, model_name, select
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


@pytest.mark.parametrize(
    ("without", "only", "names"),
    [
        ((), ("law",), ("code", "sums")),
        ((), ("sums", "law", "law"), ("code",)),
        ((), ("code", "law", "sums"), ()),
        (("law",), ("law", "code"), ("law", "sums")),
        (("law",), ("law",), ("code", "law", "sums")),
    ],
)
def test_only_leaves_all_others_out(without: tuple[str, ...], only: tuple[str, ...], names: tuple[str, ...]) -> None:
    assert select(EXPERTS, "merged", without=without, only=only).without == names


@pytest.mark.parametrize(
    ("only", "says"),
    [
        ((), "only: it names nobody"),
        (("public",), "only: the public expert always answers"),
        (("code", "nobody"), "only: 'nobody' is not in merged, which holds public, code, law, sums"),
    ],
)
def test_only_needs_closed_experts_that_are_there(only: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        select(EXPERTS, "merged", only=only)
    assert caught.value.message == says


@pytest.mark.parametrize(
    ("without", "name"),
    [((), "m-without-x"), (("law",), "m-without-x-without-law"), (("sums", "code"), "m-without-x-without-code+sums")],
)
def test_a_models_name_says_who_is_left_out(without: tuple[str, ...], name: str) -> None:
    assert model_name("m-without-x", without) == name
    assert left_out_of(name, "m-without-x", EXPERTS) == tuple(sorted(without))


def test_order_in_a_models_name_does_not_matter() -> None:
    assert left_out_of("m-without-sums+code", "m", EXPERTS) == ("code", "sums")


FORM = "m-without-A+B leaves out A and B, of code, law, sums"


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("gpt", f"'gpt' is not served here; m is, and {FORM}"),
        ("", f"'' is not served here; m is, and {FORM}"),
        ("m/../m", f"'m/../m' is not served here; m is, and {FORM}"),
        ("m-only-law", f"'m-only-law' is not served here; m is, and {FORM}"),
        ("m-without-", f"'m-without-': '' is no expert of it; {FORM}"),
        ("m-without-law+", f"'m-without-law+': '' is no expert of it; {FORM}"),
        ("m-without-Law", f"'m-without-Law': 'Law' is no expert of it; {FORM}"),
        ("m-without-public", f"'m-without-public': the public expert cannot be left out; {FORM}"),
        ("m-without-law+law", f"'m-without-law+law' names an expert twice; {FORM}"),
    ],
)
def test_another_models_name_is_refused_with_the_form(model: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        left_out_of(model, "m", EXPERTS)
    assert caught.value.message == f"model: {problem}"
