"""The page in a real browser: nothing goes wrong, nothing is fetched, and it needs no eyes, mouse or wide screen.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

import pytest
from browser import CHROMIUM, LOWEST_CONTRAST, Browser
from reports import draw

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(draw(), encoding="utf-8")
    try:
        browser = Browser(folder / "profile")
    except ConnectionError as error:
        pytest.skip(f"Chromium does not run here: {error}")
    browser.open((folder / "report.html").as_uri())
    yield browser
    browser.close()


def test_nothing_is_logged_and_nothing_is_fetched(page: Browser) -> None:
    assert page.evaluate("document.readyState") == "complete"
    assert page.said("Runtime.consoleAPICalled") == []
    assert page.said("Runtime.exceptionThrown") == []
    assert page.said("Log.entryAdded") == []
    fetched = [said["request"]["url"] for said in page.said("Network.requestWillBeSent")]
    assert [url for url in fetched if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in fetched) == 1


def test_the_policy_holds(page: Browser) -> None:
    """The page's own policy keeps out whatever might still get in."""
    page.evaluate("""(() => {
        const image = new Image();
        image.src = 'https://localhost:1/x';
        document.body.append(image);
        image.remove();
    })()""")
    page.call("Runtime.evaluate", expression="new Promise(r => setTimeout(r, 50))", awaitPromise=True)
    assert any("Content Security Policy" in said["entry"]["text"] for said in page.said("Log.entryAdded"))
    page.events.clear()


@pytest.mark.parametrize("width", [320, 390, 800, 1400])
def test_charts_are_seen_and_nothing_sticks_out(page: Browser, width: int) -> None:
    page.set_screen(width)
    sizes = page.evaluate("""[...document.querySelectorAll('svg')].map(svg => {
        const box = svg.getBoundingClientRect();
        return [box.width, box.height, svg.querySelectorAll('path, use').length]})""")
    assert len(sizes) == 16
    assert all(shown > 200 and high > 50 and drawn > 5 for shown, high, drawn in sizes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_text_in_charts_has_the_page_s_font_and_stays_inside(page: Browser) -> None:
    page.set_screen(1000)
    fonts = page.evaluate("""[...new Set([document.body, ...document.querySelectorAll('svg text')].map(
        text => getComputedStyle(text).fontFamily))]""")
    assert len(fonts) == 1
    outside = page.evaluate("""[...document.querySelectorAll('svg')].flatMap(svg => {
        const frame = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(text => {
            const box = text.getBoundingClientRect();
            return box.left < frame.left - 1 || box.right > frame.right + 1;
        }).map(text => text.textContent)})""")
    assert outside == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_readable(page: Browser, scheme: str) -> None:
    """Contrast by WCAG 2.2, 1.4.3: at least 4.5, for every piece of text over whatever lies behind it in HTML."""
    page.set_screen(1000, scheme=scheme)
    lowest = page.evaluate(LOWEST_CONTRAST)
    assert lowest[0] >= 4.5, lowest


def test_dark_and_print_have_their_own_colours(page: Browser) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    found = []
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        page.set_screen(1000, scheme=scheme, media=media)
        found.append(page.evaluate(paper))
    assert found == ["rgb(253, 253, 251)", "rgb(21, 23, 26)", "rgb(255, 255, 255)"]
    page.set_screen(1000)
    printed = base64.b64decode(page.call("Page.printToPDF")["data"])
    assert printed.startswith(b"%PDF")


def test_a_screen_reader_finds_everything_by_name(page: Browser) -> None:
    page.set_screen(1000)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert len(names["image"]) == 16
    for told in ("Score on each task, from 0 to 1", "Change in bits per byte from the other model to this one"):
        assert told in names["image"]
    for told in ("Tasks, table", "Another model, table", "Documents that moved most, table"):
        assert told in names["region"]
    for role in ("image", "table", "region", "heading", "link", "navigation", "DisclosureTriangle"):
        assert names[role], role
        assert all(names[role]), role
        if role in ("image", "region", "heading"):
            assert len(set(names[role])) == len(names[role]) or role == "heading"
    described = [node for node in nodes if node.get("role", {}).get("value") == "image" and node.get("description")]
    assert len(described) == 16


def test_the_keyboard_reaches_everything(page: Browser) -> None:
    page.set_screen(390)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.call("Input.dispatchKeyEvent", type="rawKeyDown", windowsVirtualKeyCode=9, key="Tab")
        reached.append(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
        if len(reached) > 1 and reached[-1] in ("skip", "BODY"):
            break
    assert reached[0] == "skip"
    assert page.evaluate("getComputedStyle(document.querySelector('.skip')).position") == "absolute"
    wanted = page.evaluate("""[...document.querySelectorAll('a, summary, [tabindex="0"]')].filter(
        place => !place.closest('details:not([open]) > :not(summary)')).length""")
    assert sum(place != "BODY" for place in reached) >= wanted
