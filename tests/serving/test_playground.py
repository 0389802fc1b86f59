"""The playground in a real browser: it asks for what it shows, shows what comes as text, and needs no eyes or mouse.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from browser import CHROMIUM, LOWEST_CONTRAST, Browser
from playing import DIGEST, HOSTILE, NAMES, Played, played

from flexctl.engine import serve as engine_serve
from flexctl.engine.serve import ServeConfig
from flexctl.runtime import SILENT
from flexctl.serving.permits import Key, Permits

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
SECRET = "a key that nobody guesses"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            browser = Browser(Path(profile))
        except ConnectionError as error:
            pytest.skip(f"Chromium does not run here: {error}")
        browser.set_screen(1280)
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser: Browser, batcher: Played, **settings: Any) -> Iterator[str]:
    """Serve what is played and open its page; give the address."""
    browser.set_screen(1280)
    with played(batcher, **settings) as address:
        browser.open(address)
        browser.until("!document.getElementById('facts').textContent.startsWith('Asking')")
        yield address


@pytest.fixture
def batcher() -> Played:
    return Played(explains=True)


@pytest.fixture
def page(browser: Browser, batcher: Played) -> Iterator[Browser]:
    with page_of(browser, batcher):
        yield browser


def write(page: Browser, **values: object) -> None:
    """Fill fields by their ids, as a person does."""
    for field, value in values.items():
        page.evaluate(f"""(() => {{ const field = document.getElementById('{field}'); field.value = {str(value)!r};
            field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")


def ask(page: Browser, prompt: str = "It was found that", **values: object) -> None:
    write(page, prompt=prompt, length=10, **values)
    page.evaluate("document.getElementById('go').click()")
    finish(page)


def finish(page: Browser) -> None:
    page.until("document.getElementById('go').textContent === 'Answer'")


def texts(page: Browser, selector: str) -> list[str]:
    return list(page.evaluate(f"[...document.querySelectorAll({selector!r})].map(found => found.textContent)"))


def calls(page: Browser) -> list[str]:
    return texts(page, "#calls code")


# What is served.


def fetch(address: str, path: str) -> tuple[int, dict[str, str], str]:
    with contextlib.closing(http.client.HTTPConnection(urlsplit(address).netloc)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()


def test_the_page_has_a_strict_policy_and_needs_no_key(batcher: Played) -> None:
    keys = [Key(name="me", sha256=hashlib.sha256(SECRET.encode()).hexdigest())]
    with played(batcher, keys=keys) as address:
        for path, kind in (("/", "text/html"), ("/playground.css", "text/css"), ("/playground.js", "text/javascript")):
            status, headers, text = fetch(address, path)
            assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
            policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
            assert "://" not in text
            assert text.isascii()
        assert fetch(address, "/v1/models")[0] == 401
        assert fetch(address, "/other")[0] == 404


def test_there_is_no_page_unless_asked_for(batcher: Played) -> None:
    with played(batcher, has_page=False) as address:
        assert [fetch(address, path)[0] for path in ("/", "/playground.js")] == [404, 404]


def test_serve_has_it_where_ui_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.serving.batching.Batcher", lambda *_, **__: Played(explains=False))
    speaker: Any = SimpleNamespace(
        net=SimpleNamespace(config=SimpleNamespace(vocab_size=9)),
        tokenizer=None,
        ends=(),
        has_template=False,
        encode=lambda _: [np.array([1])],
        runnable=SimpleNamespace(digest=DIGEST),
    )
    permits = Permits("merged", NAMES, (), ())
    for ui in (True, False):
        service = engine_serve._service(ServeConfig(ui=ui), speaker, permits, 64, SILENT, ())
        assert service.has_page == ui


def test_its_files_are_in_the_package() -> None:
    for name in ("playground.html", "playground.css", "playground.js"):
        text = (files("flexctl.serving") / name).read_text(encoding="utf-8")
        assert "innerHTML" not in text
        assert "localStorage" not in text


# Who may answer.


@in_browser
def test_experts_stand_there_with_their_rights(page: Browser) -> None:
    assert page.evaluate("document.title") == "merged: playground"
    assert texts(page, "#name, #digest") == ["merged", DIGEST]
    assert texts(page, ".switch .key") == list(NAMES)
    dot = " \u00b7 "
    assert texts(page, ".switch .about") == [
        "the anchor, always in",
        f"Apache-2.0{dot}no last day",
        f"CC-BY-NC-4.0{dot}until 2035-12-31{dot}for research, teaching",
        f"{HOSTILE} in writing{dot}rights ended on 2020-01-31",
    ]
    assert page.evaluate("[...document.querySelectorAll('#purposes option')].map(found => found.value)") == [
        "research",
        "teaching",
    ]
    assert page.evaluate("document.querySelector('.switch input').disabled")


@in_browser
def test_switches_and_purpose_change_the_request(page: Browser, batcher: Played) -> None:
    ask(page)
    assert (batcher.asks[-1].left_out, batcher.asks[-1].max_new_tokens) == ((), 10)
    assert "without" not in calls(page)[0]
    page.evaluate("document.querySelector('input[value=law]').focus()")
    page.press(" ", 32, text=" ")
    assert '"without":["law"]' in calls(page)[0]
    assert 'extra_body={"without":["law"]}' in calls(page)[1]
    ask(page)
    assert batcher.asks[-1].left_out == (2,)
    assert texts(page, ".pane h3, .out") == ["Without law", "lawleft out: the request leaves it out"]
    page.evaluate("document.getElementById('none').click()")
    ask(page)
    assert batcher.asks[-1].left_out == (1, 2, 3)
    assert texts(page, ".pane h3") == ["The public expert alone"]
    page.evaluate("document.getElementById('all').click()")
    ask(page, purpose="commercial")
    assert batcher.asks[-1].left_out == (2, 3)
    assert "it is for research, teaching, not for 'commercial'" in texts(page, ".out")[0]


@in_browser
def test_temperature_brings_a_seed_along(page: Browser, batcher: Played) -> None:
    ask(page)
    assert (batcher.asks[-1].sampling.temperature, "seed" in calls(page)[0]) == (0, False)
    assert page.evaluate("document.getElementById('seed').disabled")
    write(page, temperature=0.7)
    ask(page, seed=5)
    assert (batcher.asks[-1].sampling.temperature, batcher.asks[-1].sampling.seed) == (0.7, 5)


# The answer.


@in_browser
def test_an_answer_comes_piece_by_piece_in_the_colours_of_who_led(browser: Browser) -> None:
    with page_of(browser, Played(wait_s=0.03, explains=True)):
        write(browser, prompt="It was", length=10)
        browser.evaluate("document.getElementById('go').click()")
        browser.until("document.querySelectorAll('.excerpt span').length > 2")
        assert browser.evaluate("document.querySelectorAll('.excerpt span').length") < 11
        assert browser.evaluate("document.querySelector('.pane').hasAttribute('data-busy')")
        finish(browser)
        spans = browser.evaluate("""[...document.querySelectorAll('.excerpt span')].map(
            span => [span.textContent, span.className, span.style.getPropertyValue('--s')])""")
        assert spans[0] == ["It was", "prompt", ""]
        assert spans[1:4] == [[" the", "e0", "0.500"], [" defendant", "e2", "0.580"], [" had", "e0", "0.660"]]
        assert texts(browser, ".state") == ["10 tokens, ended at the length asked for"]
        assert sum(float(text.rstrip("%")) for text in texts(browser, ".shares .percent")) == pytest.approx(100, abs=2)
        assert browser.evaluate("document.querySelectorAll('.shares li').length") == 4
        browser.evaluate("document.querySelector('.words').open = true")
        browser.until("document.querySelectorAll('.words tbody tr').length === 10")
        assert texts(browser, ".words thead th") == ["piece", "leading", *NAMES]


@in_browser
def test_stopping_stops(browser: Browser) -> None:
    batcher = Played(wait_s=0.02, explains=True)
    with page_of(browser, batcher):
        write(browser, prompt="It was", length=200)
        browser.evaluate("document.getElementById('go').focus()")
        browser.press("Enter", 13, text="\r")
        browser.until("document.querySelectorAll('.excerpt span').length > 3")
        assert browser.evaluate("[document.activeElement.id, document.activeElement.textContent]") == ["go", "Stop"]
        browser.press("Escape", 27)
        finish(browser)
        assert texts(browser, ".state")[0].startswith("Stopped after ")
        assert texts(browser, "#problem") == [""]
        assert browser.evaluate("document.activeElement.id") == "go"


@in_browser
def test_the_same_with_and_without_an_expert(page: Browser, batcher: Played) -> None:
    assert page.evaluate("[...document.getElementById('beside').options].map(option => option.text)") == [
        "nothing",
        "the same without code",
        "the same without law",
        "the same without news",
        "the public expert alone",
    ]
    ask(page, beside="-law")
    assert [one.left_out for one in batcher.asks] == [(), (2,)] or [one.left_out for one in batcher.asks] == [(2,), ()]
    assert texts(page, ".pane h3") == ["All experts", "Without law"]
    assert texts(page, "#fork") == ["They part after 1 token, at the bar."]
    assert texts(page, ".fork") == [" defendant", "\u2026"]
    assert len(calls(page)) == 4
    widths = page.evaluate("[...document.querySelectorAll('.pane')].map(pane => pane.getBoundingClientRect().top)")
    assert widths[0] == widths[1], "side by side"
    page.evaluate("document.querySelector('input[value=law]').click()")
    assert page.evaluate("document.getElementById('beside').value") == "", "it is left out already"


@in_browser
def test_shares_are_not_told_without_explain(browser: Browser) -> None:
    with page_of(browser, Played(explains=False), explains=False):
        assert "was started without --explain, as routing tells something of a text" in texts(browser, "#told")[0]
        ask(browser)
        assert set(browser.evaluate("[...document.querySelectorAll('.excerpt span')].map(span => span.className)")) == {
            "prompt",
            "plainly",
        }
        assert texts(browser, ".shares li") == []
        browser.evaluate("document.querySelector('input[value=law]').click()")
        ask(browser)
        assert texts(browser, ".shares li") == ["lawleft out: the request leaves it out"]
        assert browser.evaluate("document.querySelector('.words').hidden")


@in_browser
def test_a_question_goes_to_the_assistant(browser: Browser) -> None:
    with page_of(browser, Played(explains=True), chat=True):
        browser.evaluate("document.querySelector('input[value=chat]').click()")
        ask(browser, "Who pays?")
        assert "/v1/chat/completions" in calls(browser)[0]
        assert '"messages":[{"role":"user","content":"Who pays?"}]' in calls(browser)[0]
        assert texts(browser, ".excerpt")[0].startswith(" the defendant had breached")
        assert texts(browser, ".state") == ["10 tokens, ended at the length asked for"]


# What comes from anybody is text.


@in_browser
def test_hostile_text_stays_text(browser: Browser) -> None:
    with page_of(browser, Played([(HOSTILE, "law"), ("</div>", "public")], explains=True)):
        ask(browser, HOSTILE)
        assert texts(browser, ".excerpt") == [HOSTILE + (HOSTILE + "</div>") * 5]
        browser.evaluate("document.querySelector('.words').open = true")
        browser.until("document.querySelectorAll('.words tbody tr').length === 10")
        assert browser.evaluate("document.title") == "merged: playground"
        assert browser.evaluate("document.querySelectorAll('img, main script').length") == 0
        assert browser.said("Runtime.exceptionThrown") == []
        found = browser.call("Runtime.evaluate", expression="document.body.innerHTML = '<b>x</b>'")
        assert "TrustedHTML" in found["exceptionDetails"]["exception"]["description"]
        browser.events.clear()


@in_browser
def test_nothing_is_fetched_from_elsewhere_and_nothing_goes_wrong(browser: Browser) -> None:
    with page_of(browser, Played(explains=True)) as address:
        ask(browser, beside="*")
        fetched = [said["request"]["url"] for said in browser.said("Network.requestWillBeSent")]
        assert len(fetched) >= 6
        assert [url for url in fetched if not url.startswith((address, "data:"))] == []
        for kind in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            assert browser.said(kind) == []


@in_browser
def test_a_refusal_is_said_in_the_server_s_words(page: Browser) -> None:
    write(page, length=900)
    page.evaluate("document.getElementById('go').click()")
    assert texts(page, "#problem") == ["Write a prompt first."]
    write(page, prompt="It was")
    page.evaluate("document.getElementById('go').click()")
    page.until("document.getElementById('problem').textContent.includes('max_tokens is 900')")
    finish(page)
    assert texts(page, ".state") == ["No answer"]


@in_browser
def test_a_key_is_asked_for_and_kept_nowhere(browser: Browser) -> None:
    key = Key(name="me", sha256=hashlib.sha256(SECRET.encode()).hexdigest(), experts=("code",))
    batcher = Played(explains=True)
    with page_of(browser, batcher, keys=[key]):
        browser.until("document.activeElement.id === 'key'")
        assert texts(browser, "#facts") == ["This server asks for an API key."]
        assert browser.evaluate("document.getElementById('prompt').offsetParent === null"), "nothing to ask yet"
        for given, says in (
            ("wrong", "the API key is not known here"),
            (SECRET, "the public expert and 3 closed ones"),
        ):
            write(browser, key=given)
            browser.press("Enter", 13, text="\r")
            browser.until(f"document.getElementById('facts').textContent.includes({says!r})")
        ask(browser)
        assert batcher.asks[-1].left_out == (2, 3)
        assert "this key may not use it" in texts(browser, ".out")[0]
        assert "Authorization: Bearer $FLEXCTL_API_KEY" in calls(browser)[0]
        kept = browser.evaluate("document.documentElement.outerHTML + location + document.cookie")
        assert SECRET not in kept
        assert browser.evaluate("localStorage.length + sessionStorage.length") == 0


# The call.


@in_browser
def test_the_calls_work_as_they_stand(browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = 'It\'s "found"\n\\that\\ $(x) \u00e9'
    with page_of(browser, Played(explains=True)):
        write(browser, length=4)
        browser.evaluate(f"document.getElementById('prompt').value = {prompt!r}")
        write(browser, purpose="it's research")
        browser.evaluate("document.querySelector('input[value=code]').click()")
        curl, python = calls(browser)
        monkeypatch.delenv("FLEXCTL_API_KEY", raising=False)
        said = io.StringIO()
        pytest.importorskip("openai")
        with contextlib.redirect_stdout(said):
            exec(python, {})
        assert said.getvalue() == " the\u2026 had\u2026\n"
        if shutil.which("curl"):
            done = subprocess.run(["sh", "-c", f"{curl} -s"], capture_output=True, text=True, check=True)
            assert '"text":" the\\u2026 had\\u2026"' in done.stdout or " the\u2026 had\u2026" in done.stdout


@in_browser
def test_a_call_is_copied_or_at_least_selected(page: Browser) -> None:
    page.evaluate("document.querySelector('.copy').click()")
    page.until("document.querySelector('.copy').textContent !== 'Copy'")
    assert texts(page, ".copy")[0] in ("Copied", "Selected")
    assert texts(page, "#status")[0].startswith(("Copied", "Selected"))


# For everybody.


@in_browser
@pytest.mark.parametrize("width", [320, 390, 800, 920, 1280])
def test_nothing_sticks_out_at_any_width(page: Browser, width: int) -> None:
    page.set_screen(width)
    ask(page, "x" * 300, beside="-law")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate("""[...document.querySelectorAll('main *')].filter(found => !found.closest('pre, .scroll')
        && found.getBoundingClientRect().right > document.body.getBoundingClientRect().right).length""")
        == 0
    )
    small = page.evaluate("""[...document.querySelectorAll('button, input:not([type=radio]), select, summary')].filter(
        found => found.offsetParent && found.getBoundingClientRect().height < 24).map(found => found.outerHTML)""")
    assert small == []


@in_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_of_it_can_be_seen(page: Browser, scheme: str) -> None:
    """Text by WCAG 2.2, 1.4.3 (4.5 to 1), the edges of controls and experts' colours by 1.4.11 (3 to 1)."""
    page.set_screen(1280, scheme=scheme)
    ask(page, beside="-law")
    page.evaluate("document.querySelector('input[value=code]').click()")
    write(page, length="")
    lowest = page.evaluate(LOWEST_CONTRAST)
    assert lowest[0] >= 4.5, lowest
    colours = page.evaluate("""['--paper', '--edge', '--accent', ...[0, 1, 2, 3, 4, 5, 6, 7].map(i => `--e${i}`)].map(
        name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())""")
    paper, *others = map(luminance, colours)
    ratios = [(max(paper, other) + 0.05) / (min(paper, other) + 0.05) for other in others]
    assert min(ratios) >= 3, dict(zip(colours[1:], ratios, strict=True))


def luminance(colour: str) -> float:
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@in_browser
def test_experts_are_told_apart_without_colour(page: Browser) -> None:
    ask(page)
    lines = page.evaluate("""[...document.querySelectorAll('.switch .key')].map(found => {
        const style = getComputedStyle(found);
        return `${style.textDecorationStyle} ${style.textDecorationThickness}`; })""")
    assert len(set(lines)) == len(NAMES)


@in_browser
def test_nothing_moves_for_those_who_ask_for_that(browser: Browser) -> None:
    with page_of(browser, Played(wait_s=0.05, explains=True)):
        browser.set_screen(1280, motion="reduce")
        write(browser, prompt="It was", length=20)
        browser.evaluate("document.getElementById('go').click()")
        browser.until("document.querySelector('.pane') !== null")
        assert (
            browser.evaluate("getComputedStyle(document.querySelector('.excerpt'), '::after').animationName") == "none"
        )
        assert browser.evaluate("getComputedStyle(document.querySelector('.switch input')).transitionDuration") == "0s"
        browser.press("Escape", 27)
        finish(browser)


@in_browser
def test_a_screen_reader_finds_everything_by_name(page: Browser) -> None:
    ask(page, beside="-law")
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    names: dict[str, list[str]] = {}
    for node in nodes:
        names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert [name.split()[0] for name in names["switch"]] == list(NAMES)
    for role in ("switch", "button", "textbox", "spinbutton", "combobox", "region", "heading", "article"):
        assert names[role], role
        assert all(names[role]), (role, names[role])
    assert "Experts" in names["group"]
    assert {"Answer: All experts", "Answer: Without law"} <= set(names["region"])
    assert {"Prompt", "Copy curl, All experts", "Copy Python, Without law"} <= {*names["textbox"], *names["button"]}
    switches = [node for node in nodes if node["role"]["value"] == "switch"]
    assert "until 2035-12-31" in switches[2]["description"]["value"]
    (status,) = texts(page, "#status[role=status]")
    assert status.startswith("All experts: 10 tokens, ended at the length asked for. Most by public, ")
    assert status.endswith("They part after 1 token, at the bar.")


@in_browser
def test_the_keyboard_does_all_of_it(page: Browser) -> None:
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(60):
        page.press("Tab", 9)
        reached.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || "
                "document.activeElement.value || document.activeElement.tagName"
            )
        )
        if len(reached) > 1 and reached[-1] in ("skip", "BODY"):
            break
    assert reached[0] == "skip"
    for wanted in ("code", "law", "news", "all", "none", "purpose", "prompt", "length", "temperature", "beside", "go"):
        assert wanted in reached, wanted
    page.evaluate("document.getElementById('prompt').focus()")
    write(page, prompt="It was", length=10)
    page.press("Enter", 13, modifiers=2)
    page.until("document.querySelectorAll('.excerpt span').length === 11")
    finish(page)
    page.evaluate("document.querySelector('.excerpt').focus()")
    for _ in range(2):
        page.press("ArrowRight", 39)
    assert texts(page, ".current") == [" defendant"]
    readout = texts(page, ".readout")[0]
    assert readout.startswith('" defendant" law 58\u00a0% \u00b7 public 14\u00a0%')
    page.press("End", 35)
    assert texts(page, ".current") == ["."]
