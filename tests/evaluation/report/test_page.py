"""The page without a browser: whole, labelled, closed to the outside, and a pure function of its report."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import matplotlib
import pytest
from reports import (
    EXPERTS,
    MERGED,
    WITHOUT,
    Metric,
    Shift,
    contrast,
    draw,
    example_excerpts,
    example_report,
    shifts,
    task,
)

import flexctl.evaluation.report.charts as charts
from flexctl.errors import UsageError
from flexctl.evaluation.explaining import Piece
from flexctl.evaluation.figures import Estimate, Moved
from flexctl.evaluation.report import Excerpt, render

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Element:
    """A parsed element: its name, attributes, children and own text."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: Element | None) -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element] = []
        self.pieces: list[str] = []

    def all(self, *tags: str) -> list[Element]:
        found = [self] if not tags or self.tag in tags else []
        return found + [element for child in self.children for element in child.all(*tags)]

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()


class Tree(HTMLParser):
    """Parses a page, and fails on elements that are not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(page)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        assert len(element.attributes) == len(attrs)
        self.here.children.append(element)
        if tag not in VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.here.children.append(Element(tag, dict(attrs), self.here))

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.here.tag
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        element: Element | None = self.here
        while element is not None:
            element.pieces.append(data)
            element = element.parent


def parse(page: str) -> Element:
    return Tree(page).root


@pytest.fixture(scope="module")
def page() -> str:
    return draw()


@pytest.fixture(scope="module")
def tree(page: str) -> Element:
    return parse(page)


def check_closed_and_labelled(page: str) -> Element:
    """Return the page's tree after checking what must hold for every report."""
    tree = parse(page)
    assert page.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.split("<body>")[0])
    assert tree.all("script", "iframe", "object", "embed", "form", "img", "base") == []
    for element in tree.all():
        assert "src" not in element.attributes
        assert not any(name.startswith("on") for name in element.attributes)
        assert not re.search(r"http|url\(", element.attributes.get("style", ""))
        href = element.attributes.get("href", "#")
        assert href.startswith("#") or href == "data:,"
    check_names(tree)
    return tree


def check_names(tree: Element) -> None:
    counts = Counter(element.attributes["id"] for element in tree.all() if "id" in element.attributes)
    assert [name for name, count in counts.items() if count > 1] == []
    for element in tree.all():
        for name in ("aria-labelledby", "aria-describedby"):
            assert element.attributes.get(name, next(iter(counts))) in counts
        if element.attributes.get("href", "").startswith("#"):
            assert element.attributes["href"][1:] in counts
    for chart in tree.all("svg"):
        assert chart.attributes["role"] == "img"
        title, description = chart.children[:2]
        assert (title.tag, description.tag) == ("title", "desc")
        assert title.text.strip()
        assert description.text.strip()
        assert chart.attributes["aria-labelledby"] == title.attributes["id"]
    for table in tree.all("table"):
        assert table.children[0].tag == "caption"
        assert table.children[0].text.strip()
        assert all(header.attributes["scope"] in ("row", "col") for header in table.all("th"))
        assert table.parent is not None
        assert "scroll" in table.parent.classes
    for region in tree.all("div"):
        if "scroll" in region.classes:
            assert (region.attributes["role"], region.attributes["tabindex"]) == ("region", "0")
            assert region.attributes["aria-label"]


def test_page_is_closed_and_labelled(page: str) -> None:
    tree = check_closed_and_labelled(page)
    (html,) = tree.all("html")
    assert html.attributes["lang"] == "en"
    (policy,) = [meta for meta in tree.all("meta") if "http-equiv" in meta.attributes]
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "https:" not in page
    assert "http:" not in page


def test_headings_are_in_order(tree: Element) -> None:
    levels = [int(heading.tag[1]) for heading in tree.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_skip_link_is_the_first_thing(tree: Element) -> None:
    (body,) = tree.all("body")
    assert body.children[0].attributes == {"class": "skip", "href": "#main"}


def test_all_charts_are_there(tree: Element) -> None:
    names = [chart.attributes["aria-labelledby"].removesuffix("-title") for chart in tree.all("svg")]
    panels = [f"{kind}-{i}" for kind in ("layers", "top-k", "baselines") for i in range(4)]
    assert names == ["before-and-after", "tasks", "ablation", *panels, "contrasts"]
    ablation = tree.all("svg")[2]
    shown = [text.text for text in ablation.all("text")]
    assert shown[:7] == ["public", "code", "math", "news", "code", "math", "news"]
    for figure in ("+1.058", "\u22120.233", "+0.984", "\u22120.006 ?"):
        assert figure in shown
    assert (
        "without code: public \u22120.006, code +1.058, math \u22120.233, news \u22120.073;"
        in ablation.all("desc")[0].text
    )


def test_charts_leave_fonts_colours_and_time_to_the_page(tree: Element, page: str) -> None:
    for chart in tree.all("svg"):
        inside = chart.all()
        assert not any(element.tag in ("metadata", "style") for element in inside)
        styles = " ".join(element.attributes.get("style", "") for element in inside)
        assert "font-family" not in styles
        assert "DejaVu" not in styles
        assert re.findall(r"#[0-9a-f]{6}", styles) == []
        assert all("fill" not in e.attributes or e.attributes["fill"] == "none" for e in inside)
        for variable in set(re.findall(r"var\((--[\w-]+)\)", styles)):
            assert f"{variable}: #" in page
    assert "matplotlib" not in page.lower()
    assert not re.search(r"20[0-9]{2}-[0-9]{2}-[0-9]{2}T", page)


def test_page_is_a_function_of_its_report_alone(page: str) -> None:
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "svg.fonttype": "path"}):
        assert draw() == page
    assert draw(num_experts_per_tok=3) != page


def test_figures_are_the_report_s(tree: Element) -> None:
    scores = next(table for table in tree.all("table") if table.all("caption")[0].text == "Scores, domain by domain")
    rows = {row.children[0].text: [cell.text for cell in row.children[1:]] for row in scores.all("tr")[1:]}
    assert rows["code"] == ["3.450", "3.410 to 3.500", "6.186", "\u221244.2\u00a0%", "352.48", "127", "62,234"]
    assert list(rows) == list(MERGED)
    (lede,) = [p for p in tree.all("p") if "lede" in p.classes]
    assert lede.text.startswith("Merging code, math and news lowers the mean over their own texts from 4.44 to 3.05")


def test_lineage_is_told(tree: Element) -> None:
    inside = next(table for table in tree.all("table") if table.all("caption")[0].text.startswith("4 experts"))
    rows = {row.children[0].all("span")[0].text: [cell.text for cell in row.all("td")] for row in inside.all("tr")[1:]}
    assert list(rows) == list(EXPERTS)
    assert rows["news"] == ["CC-BY-2.5", "2030-12-31", "research", "no guarantee", "43b1c5f043b1"]
    assert rows["math"] == ["GFDL-1.2-or-later", "none set", "not restricted", "epsilon 8, delta 1e-05", "33b1c5f033b1"]
    text = tree.text
    assert "reddit" in text
    for member in example_report().lineage.members:
        assert member.digest in text


def test_excerpts_wear_their_leader_s_line_and_are_in_full(tree: Element) -> None:
    shown = [element for element in tree.all("div") if "excerpt" in element.classes]
    for excerpt, element in zip(example_excerpts(), shown, strict=True):
        assert element.text == "".join(piece.text for piece in excerpt.pieces)
        for piece, span in zip(excerpt.pieces, element.all("span"), strict=True):
            leader = max(piece.shares, key=lambda name: piece.shares[name])
            assert span.classes == [f"e{EXPERTS.index(leader)}"]
            assert span.attributes["title"].startswith(leader)
            assert float(span.attributes["style"].removeprefix("--s:")) == pytest.approx(
                piece.shares[leader], abs=0.006
            )
    lines = re.findall(r"^\.e(\d) \{.*--line: ([^;]+);", draw(), re.MULTILINE)
    assert len({line for _, line in lines}) == len(lines) == 8, "experts must differ by more than colour"


def test_sections_that_were_not_asked_for_say_which_flag_adds_them() -> None:
    bare = example_report(
        tasks={},
        public_alone={},
        ablation={},
        top_k={},
        baselines={},
        compare=None,
        routing_layers={},
        removed=(),
        data={},
    )
    tree = check_closed_and_labelled(render(bare))
    absent = [p.text for p in tree.all("p") if "absent" in p.classes]
    assert [re.findall(r"--[\w-]+", text) for text in absent] == [["--ablate"], ["--sweep-top-k"], ["--baselines"], []]
    assert len(tree.all("svg")) == 1
    places = {link.attributes["href"] for link in tree.all("a")} | {h2.attributes["id"] for h2 in tree.all("h2")}
    assert not places & {"#tasks", "#other", "tasks", "other"}


def rows_of(tree: Element, caption: str) -> list[list[str]]:
    """Return a table's rows below its head."""
    (table,) = [table for table in tree.all("table") if table.children[0].text == caption]
    return [[cell.text for cell in row.children] for row in table.all("tr")[1:]]


def test_another_model_is_told_by_what_is_in_it(tree: Element) -> None:
    rows = rows_of(tree, "This model beside the other")
    assert rows[0] == ["public", "2.197", "2.199", "\u22120.002", "\u22120.013 to +0.009 crosses zero", "103", "3"]
    assert rows[3] == ["news", "2.576", "2.551", "+0.025", "+0.011 to +0.039", "3", "103"]
    moved = "Change in bits per byte of single documents, which are counted from 0 in their domain"
    assert rows_of(tree, moved) == [
        ["math", "17", "\u22122.310"],
        ["math", "3", "\u22121.874"],
        ["news", "101", "+0.212"],
    ]
    facts = {term.text: what.text for term, what in zip(tree.all("dt"), tree.all("dd"), strict=True)}
    assert facts["the other"] == "merged model micro-anchor with code, news, 3 of 3 experts active for a token"
    assert facts["digest"] == "sha256:" + "0b5d3c9a" * 8
    assert facts["experts"] == "in this model alone: math; in both, with different digests: code"


def test_a_change_has_a_side_only_where_its_interval_leaves_zero_out(tree: Element) -> None:
    chart = tree.all("svg")[-1]
    marks = [use.attributes["style"] for use in chart.all("use")]
    colours = [re.findall(r"var\(--(\w+)\)", style) for style in marks if "better" in style or "worse" in style]
    assert colours == [["better"] * 2, ["better"] * 2, ["worse"] * 2]
    assert "public \u22120.002 (\u22120.013 to +0.009, crosses zero); code \u22120.142 (" in chart.all("desc")[0].text


def test_tasks_have_a_row_a_metric_and_a_mark_each(tree: Element) -> None:
    rows = {row[0]: row[1:] for row in rows_of(tree, "Scores, task by task")}
    assert rows["arc_easy acc"] == ["0.460", "0.364 to 0.556", "0.048", "0.250", "100", "1"]
    assert rows["nq_open bits_per_byte"] == ["1.792", "none", "none", "", "300", "1"]
    assert len(rows) == 7
    chart = tree.all("svg")[1]
    told = chart.all("desc")[0].text
    assert told.startswith("arc_easy acc 0.460 (0.364 to 0.556, guessing 0.250); winogrande_of_a_long_name acc 0.520 (")
    assert told.count(";") == 3
    shown = [text.text for text in chart.all("text")]
    assert {"arc_easy", "winogrande_of_a\u2026", "exact_match", "edit_similarity"} <= {*shown}
    assert "bits_per_byte" not in shown


def test_tasks_without_a_share_have_a_table_alone() -> None:
    bits = {"bits_per_byte": Metric(score=Estimate(value=1.792))}
    tree = check_closed_and_labelled(draw(tasks={"nq": task(bits, items=300)}))
    (row,) = rows_of(tree, "Scores, task by task")
    assert row == ["nq bits_per_byte", "1.792", "none", "none", "300", "1"]
    assert len(tree.all("svg")) == 15


def alone() -> str:
    """Return the page of an anchor."""
    return draw(
        kind="anchor",
        members=example_report().lineage.members[:1],
        num_experts_per_tok=1,
        removed=(),
        public_alone={},
        routing={name: {"public": 1.0} for name in MERGED},
        routing_layers={name: {"public": [1.0] * 6} for name in MERGED},
        ablation={},
        top_k={},
        baselines={},
        excerpts=(Excerpt(domain="code", pieces=(Piece(text="x", shares={"public": 1.0}),)),),
    )


def test_an_anchor_has_a_report_too() -> None:
    tree = check_closed_and_labelled(alone())
    assert tree.all("h1")[0].text == "micro-anchor alone"
    assert "There is no closed expert to leave out." in tree.text


def variables(page: str, scheme: str) -> dict[str, tuple[float, ...]]:
    """Return the page's colours, red, green and blue from 0 to 1."""
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2]
    found = re.findall(r"--([\w-]+): #(\w{6});", light + (dark if scheme == "dark" else ""))
    return {name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in found}


def over(colour: tuple[float, ...], alpha: float, below: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(alpha * c + (1 - alpha) * b for c, b in zip(colour, below, strict=True))


def apart(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2.2's ratio."""
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour] for colour in (one, other)]
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_from_what_they_lie_on(page: str, scheme: str) -> None:
    colours = variables(page, scheme)
    paper, ink = colours["paper"], colours["ink"]
    for side in ("worse", "better"):
        darkest = over(colours[side], charts._UNDER_TEXT, over(colours["rule"], 0.35, paper))
        assert apart(ink, darkest) >= 4.5, "figures in the heat map"
    for name in ("accent", "heat", "worse", "better", *(f"e{i}" for i in range(8))):
        assert apart(colours[name], paper) >= 3, name
    for i in range(8):
        assert apart(ink, over(colours[f"e{i}"], 0.34, paper)) >= 4.5, "a token at full tint"


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='x",
    "$x^2$ & {{ 7 * 7 }} {% raw %}",
    "]]></desc></svg><b>",
    "a\x00b\x1bc\ud800d\ufffe",
    "\u202eright to left \u05d0",
]


def test_nobody_s_words_are_markup() -> None:
    """Domain names, licenses, labels, purposes, baselines, settings and excerpts are untrusted."""
    full = example_report()
    assert full.compare is not None
    public, member = full.lineage.members[:2]
    spoilt = [
        dataclasses.replace(member, name=f"e{i}", license=words, label=words, purposes=(words,), privacy=words)
        for i, words in enumerate(HOSTILE)
    ]
    shares = {member.name: 0.2 if member.name == "e1" else 0.1 for member in (public, *spoilt)}
    shift = Shift(bits_per_byte=4.508, change=Estimate(value=1.058, low=1.028, high=1.088))
    acc = Metric(score=Estimate(value=0.46, low=0.364, high=0.556), stderr=0.048, chance=0.25)
    page = draw(
        members=(public, *spoilt),
        license=HOSTILE[0],
        tasks={words: task({words: acc}) for words in HOSTILE},
        compare=dataclasses.replace(
            full.compare,
            lineage=dataclasses.replace(full.compare.lineage, anchor=HOSTILE[0], members=(public, *spoilt)),
            domains=dict.fromkeys(HOSTILE, full.compare.domains["code"]),
            moved=[Moved(domain=words, index=0, difference=1.0) for words in HOSTILE],
        ),
        perplexity=dict.fromkeys(HOSTILE, full.perplexity["code"]),
        public_alone=dict.fromkeys(HOSTILE, shift),
        routing=dict.fromkeys(HOSTILE, shares),
        routing_layers={},
        ablation={"e1": dict.fromkeys(HOSTILE, shift)},
        top_k={},
        baselines={words: dict.fromkeys(HOSTILE, shift) for words in HOSTILE},
        excerpts=tuple(Excerpt(domain=words, pieces=(Piece(text=words, shares=shares),)) for words in HOSTILE),
        data={words: words for words in HOSTILE},
        software={words: words for words in HOSTILE},
    )
    page.encode("utf-8")
    tree = check_closed_and_labelled(page)
    assert tree.all("b") == []
    seen = [re.sub("[\x00-\x08\x0b-\x1f\ud800-\udfff\ufffe]", "\ufffd", words) for words in HOSTILE]
    assert {*seen} <= {header.text for header in tree.all("th")}
    assert {*seen} <= {cell.text for cell in tree.all("td")}
    assert [div.text for div in tree.all("div") if "excerpt" in div.classes] == seen
    assert {*seen} == {definition.text for definition in tree.all("dd")} & {*seen}
    assert all(words in tree.all("desc")[0].text for words in seen)


def test_figures_that_are_no_numbers_break_nothing() -> None:
    none = Shift(bits_per_byte=math.nan, change=Estimate(value=math.nan))
    infinite = Shift(bits_per_byte=math.inf, change=Estimate(value=math.inf))
    broken = {"public": none, "code": infinite, "math": none, "news": infinite}
    figures = dataclasses.replace(example_report().perplexity["code"], perplexity=math.inf)
    full = example_report()
    assert full.compare is not None
    contrasts = {name: contrast(shift.bits_per_byte, shift.change) for name, shift in broken.items()}
    unanswered = Metric(score=Estimate(value=math.nan, low=math.nan, high=math.nan), stderr=math.nan, chance=0.5)
    page = draw(
        tasks={"quiz": task({"acc": unanswered})},
        compare=dataclasses.replace(full.compare, domains=contrasts),
        perplexity=dict.fromkeys(MERGED, figures),
        public_alone=broken,
        ablation={"code": broken},
        top_k={1: broken, 2: broken},
        baselines={"soup": broken},
    )
    check_closed_and_labelled(page)
    assert not re.search(r"\bnan\b|\binf\b", page)


def test_more_experts_than_colours() -> None:
    names = ["public", *(f"expert-{i}" for i in range(12))]
    shares = dict.fromkeys(names, 1 / 13)
    public = example_report().lineage.members[0]
    page = draw(
        members=tuple(dataclasses.replace(public, name=name) for name in names),
        routing=dict.fromkeys(MERGED, shares),
        routing_layers={name: {expert: [1 / 13] * 40 for expert in names} for name in MERGED},
        ablation=dict.fromkeys(names[1:], shifts(WITHOUT["code"])),
        baselines={},
        excerpts=(Excerpt(domain="code", pieces=(Piece(text="x", shares=shares),)),),
    )
    tree = check_closed_and_labelled(page)
    keys = [tuple(span.classes[1:]) for span in tree.all("span") if "key" in span.classes][:13]
    assert keys[:9] == [("e0",), *((f"e{i}",) for i in range(1, 8)), ("e1", "again")]
    assert len(set(keys)) == 13


def test_without_matplotlib_it_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="report: needs matplotlib") as caught:
        draw()
    assert caught.value.hint == "pip install 'flexctl[report]'"
