"""A server whose answers are written down, so that its page can be held to them: no model, no waiting."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import uvicorn

from flexctl.bundle.rights import Rights
from flexctl.runtime import SILENT
from flexctl.serving import Account, Job, Metrics, Permits, Service, Token, bind, make_app
from flexctl.serving.jobs import Done
from flexctl.serving.permits import Key

NAMES = ("public", "code", "law", "news")
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
RIGHTS = (
    Rights("code", "Apache-2.0", (), None),
    Rights("law", "CC-BY-NC-4.0", ("research", "teaching"), "2035-12-31"),
    Rights("news", f"{HOSTILE} in writing", (), "2020-01-31"),
)
DIGEST = "sha256:" + hashlib.sha256(b"played").hexdigest()

_PLAYED = [
    (" the", "public"),
    (" defendant", "law"),
    (" had", "public"),
    (" breached", "law"),
    (" the", "public"),
    (" covenant", "law"),
    (" reported", "news"),
    (" in", "public"),
    (" `main.py`", "code"),
    (".", "public"),
]
"""What everybody together answers: each piece, and who leads in it."""


class Played:
    """Stands in for the scheduler: it plays pieces, each led by somebody; who is left out leads in none.

    Args:
        pieces: Text and leader of each; an answer goes round them.
        wait_s: Between two pieces.
        explains: Whether shares come along.

    Attributes:
        asks: All that was asked for.
    """

    is_taking = True
    running = waiting = prompt_tokens = new_tokens = passes = 0

    def __init__(self, pieces: Sequence[tuple[str, str]] = _PLAYED, *, wait_s: float = 0.0, explains: bool) -> None:
        self.asks: list[Any] = []
        self._pieces, self._wait_s, self._explains = tuple(pieces), wait_s, explains
        self._stopped: list[Job] = []
        self._threads: list[threading.Thread] = []

    def submit(self, job: Job) -> None:
        self.asks += job.asks
        thread = threading.Thread(target=self._play, args=(job,))
        self._threads.append(thread)
        thread.start()

    def cancel(self, job: Job) -> None:
        self._stopped.append(job)

    def end(self) -> None:
        """Wait until nothing is played any more."""
        for thread in self._threads:
            thread.join(10)

    def _play(self, job: Job) -> None:
        ask = job.asks[0]
        left_out = [NAMES[index] for index in ask.left_out]
        heard = [("\u2026", "public") if who in left_out else (text, who) for text, who in self._pieces]
        for number in range(ask.max_new_tokens):
            if job in self._stopped:
                return
            time.sleep(self._wait_s)
            text, who = heard[number % len(heard)]
            job.deliver(0, Token(text=text, id=number, shares=self._shares(who, left_out, number)))
        job.deliver(0, Done("length", ask.max_new_tokens))

    def _shares(self, leader: str, left_out: Sequence[str], number: int) -> tuple[float, ...]:
        if not self._explains:
            return ()
        most = 0.5 + 0.4 * (number % 5) / 5
        here = [name for name in NAMES if name not in left_out]
        rest = (1 - most) / max(1, len(here) - 1)
        return tuple(0.0 if name in left_out else most if name == leader else rest for name in NAMES)


@contextmanager
def played(
    batcher: Played,
    *,
    explains: bool = True,
    keys: Sequence[Key] = (),
    has_page: bool = True,
    chat: bool = False,
    rights: Sequence[Rights] = RIGHTS,
) -> Iterator[str]:
    """Serve what is played inside the ``with`` statement; give the address, with a slash at its end."""
    encoder = SimpleNamespace(
        has_template=chat, encode=lambda text: list(text.encode()), frame=lambda _: [1, 2], decode=str
    )
    service = Service(
        batcher=batcher,  # type: ignore[arg-type]
        encoder=encoder,
        permits=Permits("merged", NAMES, rights, keys),
        account=Account(base="merged", digest=DIGEST, explains=explains, word=str),
        metrics=Metrics(),
        context=4096,
        vocab_size=256,
        max_new_tokens=256,
        places=8,
        timeout_s=30,
        reporter=SILENT,
        local_names=("127.0.0.1",),
        has_page=has_page,
    )
    config = uvicorn.Config(make_app(service), ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with bind("127.0.0.1", 0) as found:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([found])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}/"
        finally:
            batcher.end()
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()
