"""The summary says what the figures say, and no more than their intervals allow."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from reports import MERGED, Metric, Shift, contrast, example_report, shift, shifts, task

from flexctl.evaluation.figures import Estimate
from flexctl.evaluation.report.words import bits, interval, joined, percent, plain, share, signed, summary, who_differs


def test_summary_of_everything() -> None:
    assert summary(example_report()) == [
        "Merging code, math and news lowers the mean over their own texts from 4.44 to 3.05 bits per byte, "
        "by 31.3\u00a0%.",
        "Elsewhere: public text +1.3\u00a0% (2.169 to 2.197).",
        "Leaving code out costs code 1.06 bits per byte and gives math 0.23 and news 0.07 back.",
        "Leaving math out costs math 0.98 bits per byte and gives code 0.11 back.",
        "Leaving news out costs news 0.06 bits per byte and gives math 0.06 back.",
        "Tasks: acc 0.46 on arc_easy, above guessing (0.25); "
        "acc 0.52 on winogrande_of_a_long_name, not told from guessing (0.50); "
        "exact_match 0.07 on nq_open; 1 more in the table below.",
        "Beside another model (merged, 0b5d3c9a0b5d): in bits per byte this one is better on math by 0.90 "
        "and code by 0.14, and worse on news by 0.02; no difference is shown on public.",
    ]


def beside(**changes: Estimate) -> str:
    other = example_report().compare
    assert other is not None
    domains = {name: contrast(2, change) for name, change in changes.items()}
    return summary(example_report(compare=dataclasses.replace(other, domains=domains)))[-1].partition("): ")[2]


def test_nothing_is_claimed_of_another_model_without_an_interval_that_leaves_zero_out() -> None:
    lower = Estimate(value=-0.3, low=-0.4, high=-0.2)
    unsure = Estimate(value=-0.3, low=-0.7, high=0.1)
    assert beside(a=unsure, b=Estimate(value=-2.0)) == "no difference is shown on any domain."
    assert beside(a=Estimate(value=math.inf, low=math.inf, high=math.inf)) == "no difference is shown on any domain."
    assert beside(a=lower) == "in bits per byte this one is better on a by 0.30."
    many = beside(**{f"d{i}": lower for i in range(5)}, **{f"u{i}": unsure for i in range(5)})
    assert many == (
        "in bits per byte this one is better on d0 by 0.30, d1 by 0.30, d2 by 0.30 and 2 more; "
        "no difference is shown on 5 domains."
    )


def test_guessing_is_only_spoken_of_where_it_is_known() -> None:
    def told(low: float, high: float, chance: float | None) -> str:
        metric = Metric(score=Estimate(value=0.2, low=low, high=high), stderr=0.1, chance=chance)
        return summary(example_report(tasks={"quiz": task({"acc": metric})}, compare=None))[-1]

    assert told(0.1, 0.3, None) == "Tasks: acc 0.20 on quiz."
    assert told(0.1, 0.3, 0.25) == "Tasks: acc 0.20 on quiz, not told from guessing (0.25)."
    assert told(0.1, 0.3, 0.5) == "Tasks: acc 0.20 on quiz, below guessing (0.50)."


def test_who_differs_counts_those_that_took_part() -> None:
    lineage = example_report().lineage
    assert who_differs(lineage, lineage) == "the same in both"
    masked = tuple(dataclasses.replace(member, left_out=member.name == "code") for member in lineage.members)
    assert who_differs(dataclasses.replace(lineage, members=masked), lineage) == "in the other alone: code"


def test_intervals_that_cross_zero_are_said() -> None:
    wide = {**shifts({name: MERGED[name] + 0.02 for name in MERGED}, spread=0.1)}
    sentences = summary(example_report(public_alone=wide, ablation={"news": wide}))
    assert sentences[1] == "On code, math and news the interval of that difference crosses zero."
    assert "interval that crosses zero" in sentences[2]
    assert sentences[3] == (
        "Leaving news out changes news by +0.02, with an interval of \u22120.080 to +0.120 that crosses zero: "
        "this text does not show what it is worth."
    )


def test_merging_that_harms_is_said_plainly() -> None:
    better = {name: shift(score - 0.5, -0.5, 0.1) for name, score in MERGED.items()}
    sentences = summary(example_report(public_alone=better, ablation={"code": better}))
    assert "raises the mean" in sentences[0]
    assert sentences[2].startswith("Leaving code out gives code 0.50 bits per byte back and gives ")


def test_without_the_anchor_s_score_no_gain_is_claimed() -> None:
    sentences = summary(example_report(public_alone={}, ablation={}, tasks={}, compare=None))
    assert sentences == [
        "micro-anchor with code, math, news scores 2.20 on public, 3.45 on code, 3.12 on math and 2.58 on news, "
        "in bits per byte; lower is better."
    ]


def test_domains_that_no_expert_is_named_for() -> None:
    full = example_report()
    domains = {"books": full.perplexity["code"]}
    alone = {"books": shift(4.0, 0.55, 0.1)}
    sentences = summary(example_report(perplexity=domains, public_alone=alone, ablation={}, tasks={}, compare=None))
    assert sentences == [
        "micro-anchor with code, math, news scores 3.45 on books, in bits per byte; lower is better.",
        "Elsewhere: books \u221213.7\u00a0% (4.000 to 3.450).",
    ]


def test_many_experts_are_told_costliest_first() -> None:
    names = [f"e{i}" for i in range(6)]
    measured: dict[str, Any] = {
        name: {name: Shift(bits_per_byte=3.0 + i, change=Estimate(value=0.1 * (i + 1)))} for i, name in enumerate(names)
    }
    sentences = summary(example_report(public_alone={}, ablation=measured))
    assert [sentence.split()[1] for sentence in sentences[1:4]] == ["e5", "e4", "e3"]
    assert sentences[4] == "The other 3, and smaller changes, are in the table below."


def test_small_changes_are_not_dressed_up() -> None:
    ablation = {"code": {"code": Shift(bits_per_byte=3.451, change=Estimate(value=0.001))}}
    assert summary(example_report(ablation=ablation, tasks={}, compare=None))[-1] == (
        "Leaving code out costs code less than 0.01 bits per byte."
    )


def test_numbers_read_alike() -> None:
    assert (bits(2.19649), bits(-1.0, 1)) == ("2.196", "\u22121.0")
    assert (signed(0.0004), signed(-0.0004), signed(0.01), signed(-2)) == ("0.000", "0.000", "+0.010", "\u22122.000")
    assert (percent(0.0131), percent(-0.2)) == ("+1.3\u00a0%", "\u221220.0\u00a0%")
    assert (share(0.704), joined(["a"]), joined("abc")) == ("70\u00a0%", "a", "a, b and c")
    assert interval(Estimate(value=1.0)) == ""
    assert interval(Estimate(value=1, low=-0.1, high=2), sign=True) == "\u22120.100 to +2.000"
    assert plain("a\tb\nc\x07\x9b") == "a\tb\nc\ufffd\ufffd"


@pytest.mark.parametrize(
    ("low", "high", "crosses"), [(-1, 1, True), (0, 1, True), (0.1, 1, False), (None, None, False)]
)
def test_crossing_zero(low: float | None, high: float | None, crosses: bool) -> None:
    assert Estimate(value=0.5, low=low, high=high).crosses_zero is crosses
