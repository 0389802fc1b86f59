"""What is asked of the scheduler, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flexctl.serving.sampling import Sampling, Scored

__all__ = ["Ask", "Busy", "Done", "Event", "Failed", "Job", "Prompt", "Token"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One answer that is asked for.

    Attributes:
        tokens: The prompt's ids, at least one.
        left_out: Indices of the closed experts that may not answer.
        max_new_tokens: Its length at most; 0 scores the prompt alone.
        sampling: How its tokens are chosen.
        stop: Texts at which it stops.
        scores_prompt: Whether the log probabilities of the prompt's tokens are wanted.
    """

    tokens: tuple[int, ...]
    left_out: tuple[int, ...] = ()
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    scores_prompt: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One token of an answer, as soon as its text is final.

    Attributes:
        text: What it adds to the text.
        id: Its id.
        scored: Log probabilities, where they are asked for.
        shares: Each expert's share in it, mean over layers, public first; empty where nobody is told.
    """

    text: str
    id: int
    scored: Scored | None = None
    shares: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """The log probabilities of a prompt's tokens but its first, which nothing predicts."""

    scored: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """An answer's end: why ("stop" or "length"), and how many tokens it took."""

    reason: str
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a job that has no answer: "timeout", "stopping" or "error"."""

    reason: str


Event = Token | Prompt | Done | Failed


class Busy(Exception):
    """There is no place for another job: the queue is full, or the server is stopping."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Job:
    """What one request asks for.

    Attributes:
        asks: One or more answers.
        deadline: When it fails, by ``time.monotonic``.
        deliver: Called with the index of an ask and what happened, from the scheduler's thread. Must not block.
    """

    asks: tuple[Ask, ...]
    deadline: float
    deliver: Callable[[int, Event], None]
