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
