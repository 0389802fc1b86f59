"""The scheduler: one thread owns the model and answers many requests at once.

Every pass takes one token of each answer under way and a bounded piece of the prompts that are waiting for theirs, so a
long prompt does not hold up the others. Who may answer is a row of the pass. Nothing is kept of a sequence that ended.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flexctl import model
from flexctl.evaluation.explaining import ShareCollector, TextStream
from flexctl.serving.jobs import Busy, Done, Event, Failed, Job, Prompt, Token
from flexctl.serving.sampling import Sampling, Scored, choose, score
from flexctl.serving.stopping import Stops

__all__ = ["Batcher"]

_PROMPT_TOKENS = 256
"""Tokens of prompts in one pass."""


class _Sequence:
    """An answer under way."""

    def __init__(self, job: Job, index: int, tokenizer: Any) -> None:
        self.job, self.index = job, index
        self.ask = job.asks[index]
        self.slot = -1
        self.held = 0  # tokens whose keys and values are in the slot
        self.tokens = list(self.ask.tokens)
        self.prompt_scored: list[Scored] = []
        self.text = TextStream(tokenizer)
        self.stops: Stops[Token] = Stops(self.ask.stop)
        # Python's generator takes a seed and its negative for the same.
        self.random = random.Random(self.ask.sampling.seed % 2**64)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - len(self.ask.tokens)

    def deliver(self, event: Event) -> None:
        self.job.deliver(self.index, event)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one pass computes of one sequence."""

    sequence: _Sequence
    span: model.Span

    @property
    def is_prompt(self) -> bool:
        return self.span.start < len(self.sequence.ask.tokens)

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.span.start : self.span.end]

    @property
    def wanted(self) -> int:
        """How many tokens' logits are looked at, the last of the part."""
        return self.span.length if self.is_prompt and self.sequence.ask.scores_prompt else 1


class Batcher:
    """Answers jobs until it is stopped. ``run`` is the body of the thread that owns the model.

    Args:
        net: As from ``model.build_model``; nobody else may use it from here on.
        tokenizer: Turns its tokens into text; it is only read.
        slots: Answers under way at once.
        queue: Answers that may wait.
        context: The most tokens that prompt and answer may have.
        ends: Tokens that end an answer.
        explains: Whether each token is told with the experts' shares.

    Attributes:
        prompt_tokens: Tokens of prompts computed so far.
        new_tokens: Tokens of answers so far.
        passes: Forward passes so far.
    """

    def __init__(
        self,
        net: Any,
        tokenizer: Any,
        *,
        slots: int,
        queue: int,
        context: int,
        ends: Collection[int | None],
        explains: bool = False,
    ) -> None:
        self.prompt_tokens = self.new_tokens = self.passes = 0
        self._net, self._tokenizer = net, tokenizer
        self._cache = model.SlotCache(net, slots, context)
        self._blocks = model.routed_layers(net)
        self._ends = ends
        self._explains = explains
        self._free = list(reversed(range(slots)))
        self._queue = queue
        self._running: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._cancelled: set[Job] = set()
        self._state = threading.Condition()
        self._is_draining = self._is_stopped = False

    @property
    def running(self) -> int:
        """How many answers are under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many answers wait for a place."""
        return len(self._waiting)

    @property
    def is_taking(self) -> bool:
        """Whether it takes jobs."""
        return not self._is_draining

    def submit(self, job: Job) -> None:
        """Take a job; its events come by ``job.deliver``.

        Raises:
            Busy: There is no place for all its answers.
        """
        with self._state:
            room = len(self._free) + self._queue - len(self._waiting)
            if self._is_draining or len(job.asks) > room:
                raise Busy
            self._waiting += [_Sequence(job, index, self._tokenizer) for index in range(len(job.asks))]
            self._state.notify()

    def cancel(self, job: Job) -> None:
        """Drop a job, whether it waits, runs or has ended; no event of it is of use any more."""
        with self._state:
            if any(sequence.job is job for sequence in (*self._running, *self._waiting)):
                self._cancelled.add(job)
            self._state.notify()

    def drain(self) -> None:
        """Take no more jobs: what waits fails, what runs is finished, and then ``run`` returns."""
        with self._state:
            self._is_draining = True
            self._state.notify()

    def stop(self) -> None:
        """Let ``run`` return after the pass that is under way; whatever is not done fails."""
        with self._state:
            self._is_draining = self._is_stopped = True
            self._state.notify()

    def run(self) -> None:
        """Answer jobs until there is nothing left to do after ``drain``, or ``stop``."""
        reason = "error"
        try:
            while self._has_work():
                self._pass()
            reason = "stopping"
        finally:
            # Also where the model failed: whoever waits hears of it.
            self.stop()
            with self._state:
                for sequence in (*self._running, *self._waiting):
                    sequence.deliver(Failed(reason))
                self._running, self._waiting = [], deque()

    def _has_work(self) -> bool:
        """Wait for work, give free slots to those who wait, and return whether there is a pass to make."""
        with self._state:
            while True:
                self._drop()
                while self._waiting and self._free:
                    sequence = self._waiting.popleft()
                    sequence.slot = self._free.pop()
                    self._running.append(sequence)
                if self._is_stopped:
                    return False
                if self._running:
                    return True
                if self._is_draining:
                    return False
                self._state.wait()

    def _drop(self) -> None:
        """End what nobody waits for any more, and what is too late."""
        now = time.monotonic()
        for sequence in (*self._running, *self._waiting):
            if sequence.job in self._cancelled:
                self._end(sequence)
            elif sequence.job.deadline <= now:
                self._end(sequence, Failed("timeout"))
            elif self._is_draining and sequence.slot < 0:
                self._end(sequence, Failed("stopping"))
        self._cancelled.clear()

    def _end(self, sequence: _Sequence, event: Event | None = None) -> None:
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._running.remove(sequence)
            self._cache.wipe(sequence.slot)
            # The lowest free slot is taken next, so that those in use lie together.
            self._free = sorted([*self._free, sequence.slot], reverse=True)
        if event is not None:
            sequence.deliver(event)

    def _pass(self) -> None:
        """Compute one token of each answer, and a piece of the prompts that are not done."""
        parts = self._parts()
        logits, shares = self._forward(parts)
        self.passes += 1
        ready = []
        for part, rows, share in zip(parts, logits.split([part.wanted for part in parts]), shares, strict=True):
            sequence = part.sequence
            if part.is_prompt:
                self.prompt_tokens += part.span.length
                self._score_prompt(part, rows)
            sequence.held = part.span.end
            if sequence.held == len(sequence.tokens):
                ready.append((sequence, rows[-1], share))
        if ready:
            self._go_on(*zip(*ready, strict=True))

    def _parts(self) -> list[_Part]:
        """Return what the pass computes: a token of each answer, then prompts as far as there is room."""
        left = _PROMPT_TOKENS
        parts = []
        for sequence in self._running:
            length = len(sequence.tokens) - sequence.held
            if sequence.held < len(sequence.ask.tokens):
                length = min(length, left)
                left -= length
            if length:
                parts.append(_Part(sequence, model.Span(sequence.slot, sequence.held, length)))
        return sorted(parts, key=lambda part: part.span.length > 1)

    def _forward(self, parts: Sequence[_Part]) -> tuple[Tensor, list[tuple[float, ...]]]:
        """Return the logits that are wanted, part by part, and the experts' shares at each part's last token."""
        spans = [part.span for part in parts]
        ends = list(accumulate(span.length for span in spans))
        rows = [torch.arange(end - part.wanted, end) for part, end in zip(parts, ends, strict=True)]
        ids = [token for part in parts for token in part.tokens]
        device = self._net.device
        left_out = [(part.sequence.ask.left_out, part.span.length) for part in parts]
        mask = model.token_mask(left_out, len(self._blocks[0].experts), device)
        shares = ShareCollector(len(self._blocks))
        watched = model.observing(self._net, shares) if self._explains else nullcontext()
        self._cache.reserve(max(span.end for span in spans))
        with model.masking(self._blocks, mask), watched:
            tokens, wanted = torch.tensor(ids).to(device), torch.cat(rows).to(device)
            logits = model.forward(self._net, self._cache, spans, tokens, wanted)
        return logits, [tuple(shares.rows[end - 1]) if self._explains else () for end in ends]

    def _score_prompt(self, part: _Part, logits: Tensor) -> None:
        """Score the tokens of the prompt that a part of it predicts; tell them all once the prompt is done."""
        sequence, ask = part.sequence, part.sequence.ask
        if not ask.scores_prompt:
            return
        following = list(ask.tokens[part.span.start + 1 : part.span.end + 1])
        sequence.prompt_scored += score(logits[: len(following)], following, ask.sampling.top_logprobs or 0)
        if part.span.end == len(ask.tokens):
            sequence.deliver(Prompt(tuple(sequence.prompt_scored)))

    def _go_on(
        self, sequences: Sequence[_Sequence], rows: Sequence[Tensor], shares: Sequence[tuple[float, ...]]
    ) -> None:
        """Choose the next token of each sequence whose tokens are all computed, and tell it.

        Args:
            sequences: Those.
            rows: The logits of their last tokens, (V,) each.
            shares: The experts' shares at these.
        """
        logits = torch.stack(list(rows))
        are_sound = logits.logsumexp(-1).isfinite()
        samplings = [sequence.ask.sampling for sequence in sequences]
        tokens = choose(logits, samplings, [sequence.random.random() for sequence in sequences])
        is_sound = are_sound.tolist()
        scored = self._scored(logits, samplings, tokens)
        for i, sequence in enumerate(sequences):
            if not is_sound[i]:
                self._end(sequence, Failed("error"))
            elif not sequence.ask.max_new_tokens:
                self._end(sequence, Done("length", 0))
            else:
                self._accept(sequence, tokens[i], scored[i], shares[i])

    def _scored(self, logits: Tensor, samplings: Sequence[Sampling], tokens: Sequence[int]) -> list[Scored | None]:
        told = [i for i, way in enumerate(samplings) if way.top_logprobs is not None]
        scored: list[Scored | None] = [None] * len(tokens)
        if told:
            most = max(samplings[i].top_logprobs or 0 for i in told)
            for i, found in zip(told, score(logits[told], [tokens[i] for i in told], most), strict=True):
                scored[i] = (found[0], found[1][: samplings[i].top_logprobs])
        return scored

    def _accept(self, sequence: _Sequence, token: int, scored: Scored | None, shares: tuple[float, ...]) -> None:
        """Add a token to a sequence, tell what is final, and end the sequence where it ends."""
        self.new_tokens += 1
        sequence.tokens.append(token)
        is_end = token in self._ends
        is_last = is_end or sequence.new_tokens == sequence.ask.max_new_tokens
        text = sequence.text.add(token, is_last=is_last)
        said = (
            sequence.stops.add(Token(text=text, id=token, scored=scored, shares=shares)) if text or not is_end else []
        )
        if is_last and not sequence.stops.found:
            said += sequence.stops.rest()
        for piece in said:
            sequence.deliver(piece)
        if is_last or sequence.stops.found:
            reason = "stop" if is_end or sequence.stops.found else "length"
            self._end(sequence, Done(reason, sequence.new_tokens))
