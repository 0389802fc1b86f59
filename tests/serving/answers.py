"""A scheduler at work on tiny models, and what the checkpoint without the experts left out answers."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import tiny
import torch

from flexctl.serving import Ask, Batcher, Done, Event, Failed, Job, Prompt, Token

NAMES = ("public", "a", "b", "c")
FAMILIES = ("olmo2", "llama", "mistral", "qwen3")
MASKS = ((), (1,), (2,), (3,), (1, 3), (1, 2, 3))


def family_weights(model_type: str, top_k: int | None = None) -> SimpleNamespace:
    """Four experts that differ; mistral with a window shorter than most texts."""
    changes: dict[str, Any] = {"eos_token_id": None}
    if model_type == "mistral":
        changes["sliding_window"] = 8
    return tiny.make_weights(tiny.dense_config(model_type, **changes), NAMES, top_k=top_k)


def removed(weights: SimpleNamespace, left_out: Sequence[int]) -> Any:
    """The model of the checkpoint from which these experts were removed."""
    for index in left_out:
        weights = tiny.without(weights, NAMES[index], weights.num_experts_per_tok)
    return tiny.build(weights)


@torch.no_grad()
def logprobs_of(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Log probabilities behind each token of a text, (T, V), as the model computes the whole of it alone."""
    logits: torch.Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits.log_softmax(-1)


class Heard:
    """What came of one job."""

    def __init__(self, count: int) -> None:
        self.events: list[list[Event]] = [[] for _ in range(count)]
        self._queue: queue.Queue[tuple[int, Event]] = queue.Queue()
        self._open = count

    def deliver(self, index: int, event: Event) -> None:
        self._queue.put((index, event))

    def next(self, timeout: float = 30) -> tuple[int, Event]:
        index, event = self._queue.get(timeout=timeout)
        self.events[index].append(event)
        self._open -= isinstance(event, Done | Failed)
        return index, event

    def wait(self, timeout: float = 30) -> Heard:
        while self._open:
            self.next(timeout)
        return self

    def tokens(self, index: int = 0) -> list[int]:
        return [event.id for event in self.events[index] if isinstance(event, Token)]

    def text(self, index: int = 0) -> str:
        return "".join(event.text for event in self.events[index] if isinstance(event, Token))

    def end(self, index: int = 0) -> Event:
        return self.events[index][-1]

    def prompt(self, index: int = 0) -> list[float]:
        return [scored[0] for event in self.events[index] if isinstance(event, Prompt) for scored in event.scored]


def submit(batcher: Batcher, *asks: Ask, timeout: float = 60) -> tuple[Job, Heard]:
    heard = Heard(len(asks))
    job = Job(asks=asks, deadline=time.monotonic() + timeout, deliver=heard.deliver)
    batcher.submit(job)
    return job, heard


@contextmanager
def at_work(weights: SimpleNamespace, tokenizer: Any, **settings: Any) -> Iterator[Batcher]:
    """A scheduler in a thread of its own, stopped at the end."""
    given = {"slots": 8, "queue": 64, "context": tiny.CONTEXT, "ends": ()} | settings
    batcher = Batcher(tiny.build(weights), tokenizer, **given)
    thread = threading.Thread(target=batcher.run)
    thread.start()
    try:
        yield batcher
    finally:
        batcher.stop()
        thread.join(30)
        assert not thread.is_alive()
