"""The pages of audit and trace: everything escaped, in a real browser nothing logged, fetched or cut off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, LOWEST_CONTRAST, Browser

from flexctl.evaluation.attacks.every_model import strongest
from flexctl.evaluation.attacks.findings import (
    Answers,
    AtMost,
    Audited,
    CanaryBound,
    Extraction,
    Membership,
    Recovery,
)
from flexctl.evaluation.figures import Estimate, Lineage, Member
from flexctl.evaluation.report.audit import render_audit
from flexctl.evaluation.report.trace import render_trace
from flexctl.tracing.spans import Place, Span, Traced
from flexctl.trust.records import Absence

HOSTILE = "<script>alert(1)</script>"
NONE, SOME, MOST = (Estimate(value=at, low=max(0.0, at - 0.05), high=min(1.0, at + 0.05)) for at in (0.0, 0.5, 0.9))
CLAIM = AtMost(epsilon=8.0, delta=1e-5, unit="document", recomputed=True)
GONE = Absence(
    act="remove",
    date="2026-11-26",
    reason=HOSTILE,
    signers="hub (trusted without end)",
    before="sha256:" + "ab" * 32,
    after="sha256:" + "cd" * 32,
    tensors=210,
    rows=30,
    shared=1,
    is_left=True,
)


def audited(near: Estimate, auc: Estimate, *, is_anchor: bool = False, found: bool = False) -> Audited:
    scores = ("loss", "zlib", "min-k") if is_anchor else ("loss", "zlib", "min-k", "calibrated")
    return Audited(
        extraction=Extraction(
            documents=200, near=near, exact=NONE, above_anchor=None if is_anchor else near, copied=near
        ),
        membership={score: Membership(auc=auc, tpr=NONE) for score in scores},
        canaries=CanaryBound(canaries=200, guesses=100, right=99, epsilon=3.25, delta=1e-5, auc=auc),
        found=found,
    )


MODELS = {
    "anchor": audited(NONE, SOME, is_anchor=True),
    "merged": audited(MOST, MOST, found=True),
    "without law": audited(NONE, SOME),
}
RECOVERY = Recovery(
    documents=16,
    lr=1e-4,
    steps=[0, 1, 2],
    bits_per_byte={"without law": [MOST, SOME, NONE], "anchor": [MOST, SOME, SOME]},
    ahead=[NONE, NONE, SOME],
    faster=[NONE, NONE, SOME],
)
LINEAGE = Lineage(
    kind="merged",
    anchor=HOSTILE,
    model_type="olmo2",
    license=None,
    members=(
        Member(name="public", digest="sha256:0", license=None),
        Member(name="law", digest="sha256:1", license=None),
    ),
)
FACTS = {"members": 200, "others": 150, "prefix_tokens": 32, "max_new_tokens": 64, "draws": 10}


def audit_page(
    recovery: Recovery | None = RECOVERY,
    claimed: AtMost | None = CLAIM,
    gone: Absence | None = GONE,
    models: dict[str, Audited] = MODELS,
) -> str:
    answers = Answers(at_most=claimed, at_least=strongest(models), gone=gone)
    return render_audit("law", answers, models, recovery, lineage=LINEAGE, digest="sha256:" + "0" * 64, facts=FACTS)


def trace_page() -> str:
    text = f"It says {HOSTILE} and more words than one, of which some stand there."
    place = Place(file="a" * 90 + ".jsonl", record=3, start=5, stop=40, before=HOSTILE, text=HOSTILE, after="&amp;")
    exact = Span(text=text[8:33], start=8, stop=33, count=4, log_probability=-30.0, places=(place,))
    near = Span(text=text[38:60], start=38, stop=60, count=1, log_probability=-9.0, similarity=0.93, places=(place,))
    found = Traced(
        name="law", path=Path("law.index"), digest="sha256:0", documents=3, covered=0.4, spans=(exact,), near=(near,)
    )
    other = Traced(name="news", path=Path("news.index"), digest="sha256:0", documents=1, covered=0.0, spans=())
    return render_trace(text, [found, other], least_bytes=20, prompt=HOSTILE, digest="sha256:0")


MAKERS = {"audit": audit_page, "trace": trace_page}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return {name: make() for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_everything_is_escaped(pages: dict[str, str], name: str) -> None:
    assert "<script" not in pages[name]
    assert "&lt;script&gt;" in pages[name]


def test_what_an_audit_says_in_short() -> None:
    page = audit_page()
    for said in (
        "Attacks find something of law in the merged model.",
        "They find nothing in the model without law.",
        "comes back faster than to the anchor, by 0.500 bits per byte (0.450 to 0.550): other experts here",
    ):
        assert said in page
    passing = dataclasses.replace(RECOVERY, ahead=[NONE, SOME, NONE], faster=[NONE, SOME, SOME])
    assert "comes back no faster than it comes to the anchor" in audit_page(passing)
    unlike = audit_page(models={**MODELS, "anchor": audited(NONE, MOST, is_anchor=True, found=True)})
    assert "Of the model without law nothing can be said: even the anchor tells the two samples apart" in unlike
    bare = audit_page(None)
    assert "was not measured" in bare
    assert "nothing is left here but the anchor" not in bare


def test_at_most() -> None:
    for claim, figure, said in (
        (CLAIM, "epsilon 8 ", "computed again from its own figures"),
        (dataclasses.replace(CLAIM, recomputed=False), "epsilon 8 ", "not computed again: no privacy extra"),
        (None, "no bound", "trained without a guarantee"),
        (dataclasses.replace(CLAIM, epsilon=3.0), "no bound", "its canaries refute that: they show 3.25"),
        (dataclasses.replace(CLAIM, refuted="epsilon is 8; it is 9"), "no bound", "does not hold: epsilon is 8; it is"),
    ):
        page = audit_page(claimed=claim)
        assert f'<p class="answer">{figure}' in page
        assert said in page
        assert ("nobody can say how much" in page) == (figure == "no bound")


def test_at_least() -> None:
    anchor, whole = MODELS["anchor"], MODELS["merged"]
    told = audited(NONE, MOST, found=True)
    for first, second, figure, said in (
        (anchor, whole, "90\u00a0% drawn out", "the anchor, which never saw them, with 0\u00a0%"),
        (anchor, told, "AUC 0.90", "guessing has 0.50"),
        (anchor, audited(NONE, SOME), "nothing found", "has an AUC of 0.50 (0.45 to 0.55); guessing has 0.50"),
        (
            audited(NONE, MOST, is_anchor=True, found=True),
            audited(NONE, MOST),
            "not known",
            "0.90 (0.85 to 0.95), which counts for nothing: the anchor, which",
        ),
    ):
        page = audit_page(models={"anchor": first, "merged": second})
        assert f'<p class="answer">{figure}' in page
        assert said in page
        assert "By its canaries, epsilon is at least 3.25; its guarantee says at most 8." in page
    assert "epsilon is at least 3.25." in audit_page(claimed=None)
    unplanted = {name: dataclasses.replace(found, canaries=None) for name, found in MODELS.items()}
    assert "By its canaries" not in audit_page(models=unplanted)


def test_gone() -> None:
    page = audit_page()
    assert '<p class="answer">removed <span class="label">2026-11-26</span>' in page
    assert (
        "Signed by hub (trusted without end). None of the expert&#39;s 210 tensors and 30 router rows is in the" in page
    )
    assert GONE.before in page
    assert GONE.after in page
    later = audit_page(gone=dataclasses.replace(GONE, is_left=False, act="replace"))
    assert "made from the one that was left" in later
    assert '<p class="answer">replaced' in later
    here = audit_page(gone=None)
    assert '<p class="answer">not removed' in here
    assert "It is in the model that was audited, and no signed record says" in here


def test_what_a_trace_says_in_short() -> None:
    page = trace_page()
    assert "1 passage of this text, 40 % of it, stands in law word for word; the longest has 25 characters." in page
    assert "Nothing of this text stands in news word for word." in page
    assert "And 3 more." in page
    assert "Near, similarity 0.93" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, pages: dict[str, str]) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("pages")
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    try:
        found = Browser(folder / "profile")
    except ConnectionError as error:
        pytest.skip(f"Chromium does not run here: {error}")
    found.folder = folder
    yield found
    found.close()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_logged_fetched_or_cut_off(browser: Browser, name: str, width: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    browser.open((browser.folder / f"{name}.html").as_uri())
    assert browser.said("Log.entryAdded") == browser.said("Runtime.exceptionThrown") == []
    fetched = [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")]
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_of_an_audit_is_readable(browser: Browser, scheme: str) -> None:
    """Contrast by WCAG 2.2, 1.4.3, as on the report."""
    browser.open((browser.folder / "audit.html").as_uri())
    browser.set_screen(1000, scheme=scheme)
    lowest = browser.evaluate(LOWEST_CONTRAST)
    assert lowest[0] >= 4.5, lowest


def test_the_three_answers_stand_side_by_side_where_there_is_room(browser: Browser) -> None:
    browser.open((browser.folder / "audit.html").as_uri())
    tops = "new Set([...document.querySelectorAll('.answers > div')].map(e => e.getBoundingClientRect().top)).size"
    found = []
    for width in (390, 1000):
        browser.set_screen(width)
        found.append(browser.evaluate(tops))
    assert found == [3, 1]
