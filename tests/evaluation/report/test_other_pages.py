"""The pages of audit and trace: everything escaped, in a real browser nothing logged, fetched or cut off."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from flexctl.bundle.manifest import PrivacyInfo
from flexctl.evaluation.attacks.findings import Audited, CanaryBound, Extraction, Membership, Recovery
from flexctl.evaluation.figures import Estimate, Lineage, Member
from flexctl.evaluation.report.audit import render_audit
from flexctl.evaluation.report.trace import render_trace
from flexctl.tracing.spans import Place, Span, Traced

HOSTILE = "<script>alert(1)</script>"
NONE, SOME, MOST = (Estimate(value=at, low=max(0.0, at - 0.05), high=min(1.0, at + 0.05)) for at in (0.0, 0.5, 0.9))
CLAIM = PrivacyInfo(
    mechanism="dp-sgd",
    epsilon=8.0,
    delta=1e-5,
    unit="document",
    accountant="pld",
    noise_multiplier=0.7,
    sampling_rate=0.01,
    steps=100,
    max_grad_norm=1.0,
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


def audit_page(recovery: Recovery | None = RECOVERY, claimed: PrivacyInfo | None = CLAIM) -> str:
    return render_audit(
        "law", MODELS, recovery, lineage=LINEAGE, digest="sha256:" + "0" * 64, claimed=claimed, facts=FACTS
    )


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


PAGES = {"audit": audit_page(), "trace": trace_page()}


@pytest.mark.parametrize("name", PAGES)
def test_everything_is_escaped(name: str) -> None:
    assert "<script" not in PAGES[name]
    assert "&lt;script&gt;" in PAGES[name]


def test_what_an_audit_says_in_short() -> None:
    page = audit_page()
    for said in (
        "Attacks find something of law in the merged model.",
        "They find nothing in the model without law.",
        "By its canaries, epsilon is at least 3.25.",
        "By its guarantee, epsilon is at most 8, at delta ",
        "comes back faster than it comes to the anchor",
    ):
        assert said in page
    bare = audit_page(None, None)
    assert "No guarantee is claimed, so nothing bounds what law gives away at most." in bare
    refuted = audit_page(claimed=dataclasses.replace(CLAIM, epsilon=3.0))
    assert ("The canaries refute the guarantee." in refuted, "refute" in page) == (True, False)
    assert "was not measured" in bare
    assert "nothing is left here but the anchor" not in bare


def test_what_a_trace_says_in_short() -> None:
    page = trace_page()
    assert "1 passage of this text, 40 % of it, stands in law word for word; the longest has 25 characters." in page
    assert "Nothing of this text stands in news word for word." in page
    assert "And 3 more." in page
    assert "Near, similarity 0.93" in page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    folder = tmp_path_factory.mktemp("pages")
    for name, page in PAGES.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    try:
        found = Browser(folder / "profile")
    except ConnectionError as error:
        pytest.skip(f"Chromium does not run here: {error}")
    found.folder = folder
    yield found
    found.close()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [320, 1200])
def test_nothing_is_logged_fetched_or_cut_off(browser: Browser, name: str, width: int) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    browser.open((browser.folder / f"{name}.html").as_uri())
    assert browser.said("Log.entryAdded") == browser.said("Runtime.exceptionThrown") == []
    fetched = [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")]
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
