"""The summary says what the figures say, and no more than their intervals allow."""

from __future__ import annotations

from typing import Any

import pytest
from reports import MERGED, example_report, shift, shifts

from flexctl.evaluation.report import Estimate, Shift
from flexctl.evaluation.report.words import bits, interval, joined, percent, plain, share, signed, summary


def test_summary_of_everything() -> None:
    assert summary(example_report()) == [
        "Merging code, math and news lowers the mean over their own texts from 4.44 to 3.05 bits per byte, "
        "by 31.3\u00a0%.",
        "Elsewhere: public text +1.3\u00a0% (2.169 to 2.197).",
        "Leaving code out costs code 1.06 bits per byte and gives math 0.23 and news 0.07 back.",
        "Leaving math out costs math 0.98 bits per byte and gives code 0.11 back.",
        "Leaving news out costs news 0.06 bits per byte and gives math 0.06 back.",
    ]


def test_intervals_that_cross_zero_are_said() -> None:
    wide = {**shifts({name: MERGED[name] + 0.02 for name in MERGED}, spread=0.1)}
    sentences = summary(example_report(alone=wide, ablation={"news": wide}))
    assert sentences[1] == "On code, math and news the interval of that difference crosses zero."
    assert "interval that crosses zero" in sentences[2]
    assert sentences[3] == (
        "Leaving news out changes news by +0.02, with an interval of \u22120.080 to +0.120 that crosses zero: "
        "this text does not show what it is worth."
    )


def test_merging_that_harms_is_said_plainly() -> None:
    better = {name: shift(score - 0.5, -0.5, 0.1) for name, score in MERGED.items()}
    sentences = summary(example_report(alone=better, ablation={"code": better}))
    assert "raises the mean" in sentences[0]
    assert sentences[2].startswith("Leaving code out gives code 0.50 bits per byte back and gives ")


def test_without_the_anchor_s_score_no_gain_is_claimed() -> None:
    sentences = summary(example_report(alone=None, ablation={}))
    assert sentences == [
        "micro-anchor with code, math, news scores 2.20 on public, 3.45 on code, 3.12 on math and 2.58 on news, "
        "in bits per byte; lower is better."
    ]


def test_domains_that_no_expert_is_named_for() -> None:
    full = example_report()
    domains = {"books": full.domains["code"]}
    sentences = summary(example_report(domains=domains, alone={"books": shift(4.0, 0.55, 0.1)}, ablation={}))
    assert sentences == [
        "micro-anchor with code, math, news scores 3.45 on books, in bits per byte; lower is better.",
        "Elsewhere: books \u221213.7\u00a0% (4.000 to 3.450).",
    ]


def test_many_experts_are_told_costliest_first() -> None:
    names = [f"e{i}" for i in range(6)]
    full = example_report()
    measured: dict[str, Any] = {
        name: {name: Shift(bits_per_byte=3.0 + i, change=Estimate(value=0.1 * (i + 1)))} for i, name in enumerate(names)
    }
    sentences = summary(example_report(alone=None, domains=full.domains, ablation=measured))
    assert [sentence.split()[1] for sentence in sentences[1:4]] == ["e5", "e4", "e3"]
    assert sentences[4] == "The other 3, and smaller changes, are in the table below."


def test_small_changes_are_not_dressed_up() -> None:
    ablation = {"code": {"code": Shift(bits_per_byte=3.451, change=Estimate(value=0.001))}}
    assert summary(example_report(ablation=ablation))[-1] == (
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
