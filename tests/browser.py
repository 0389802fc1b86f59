"""A headless Chromium to hold pages to: the DevTools protocol over a pipe, which needs no other package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from fcntl import F_DUPFD, fcntl
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--no-first-run",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes answers and events to 4.
_LAUNCH = "import os, sys; r, w, *c = sys.argv[1:]; os.dup2(int(r), 3); os.dup2(int(w), 4); os.execv(c[0], c)"

LOWEST_CONTRAST = """(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
    const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = c => [.2126, .7152, .0722].reduce((sum, part, i) => sum + part * linear(c[i] / 255), 0);
    const behind = e => { const c = rgba(getComputedStyle(e).backgroundColor); const a = c[3] / 255;
        if (a === 1 || !e.parentElement) return c;
        const under = behind(e.parentElement); return under.map((v, i) => a * c[i] + (1 - a) * v); };
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    let lowest = [99, ''];
    for (let node; (node = walker.nextNode());) {
        const e = node.parentElement;
        if (!node.data.trim() || e.closest('svg title, svg desc')) continue;
        const style = getComputedStyle(e);
        const above = light(rgba(e.closest('svg') ? style.fill : style.color)), below = light(behind(e));
        const ratio = (Math.max(above, below) + .05) / (Math.min(above, below) + .05);
        if (ratio < lowest[0]) lowest = [ratio, node.data];
    }
    return lowest;
})()"""
"""Returns (ratio, text) of the text that is hardest to read, over whatever lies behind it in HTML. WCAG 2.2, 1.4.3."""


class Browser:
    """One page in a browser of its own, with everything that it said and asked for.

    Args:
        profile: An empty folder.
        wait_s: How long an answer may take.

    Raises:
        ConnectionError: It does not start, as one in a sandbox of its own may not.
    """

    def __init__(self, profile: Path, wait_s: float = 60.0) -> None:
        assert CHROMIUM is not None
        commands, self._to = (fcntl(end, F_DUPFD, 10) for end in os.pipe())
        self._from, answers = (fcntl(end, F_DUPFD, 10) for end in os.pipe())
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        launch = (sys.executable, "-c", _LAUNCH, str(commands), str(answers))
        self._process = subprocess.Popen(
            [*launch, CHROMIUM, *_FLAGS, *sandbox, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        os.set_blocking(self._from, False)
        self._wait_s, self._last, self._buffer, self._session = wait_s, 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers to one command."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def open(self, url: str) -> None:
        """Open a page and wait until it is there."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._read()

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page, which may run no script of its own."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def set_screen(
        self, width: int, *, scheme: str = "light", media: str = "screen", motion: str = "no-preference"
    ) -> None:
        """Show the page as wide as this, in a theme, on a screen or on paper."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=media, features=named)

    def until(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        until = time.monotonic() + self._wait_s
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"{expression} does not become true"
            time.sleep(0.01)

    def press(self, key: str, code: int, **more: Any) -> None:
        """Press a key and let go of it."""
        text = {"text": more.pop("text")} if "text" in more else {}
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            key=key,
            windowsVirtualKeyCode=code,
            **text,
            **more,
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code, **more)

    def said(self, method: str) -> list[dict[str, Any]]:
        """Return what events of one kind said since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        self._process.wait(self._wait_s)
        os.close(self._to)
        os.close(self._from)

    def _read(self) -> dict[str, Any]:
        """Return the next message; events are kept."""
        until = time.monotonic() + self._wait_s
        while b"\0" not in self._buffer:
            if time.monotonic() > until:
                raise ConnectionError("the browser does not answer")
            try:
                chunk = os.read(self._from, 1 << 16)
            except BlockingIOError:
                time.sleep(0.005)
                continue
            if not chunk:
                raise ConnectionError("the browser has ended")
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
