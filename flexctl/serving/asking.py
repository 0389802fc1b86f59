"""From a query to what the scheduler is asked: who answers, token ids, lengths, seeds."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.serving.batching import Batcher
from flexctl.serving.jobs import Ask
from flexctl.serving.metrics import Metrics
from flexctl.serving.permits import Grant, Permits
from flexctl.serving.protocol import Query
from flexctl.serving.refusing import Refused, refused
from flexctl.serving.replies import Account, Reply
from flexctl.serving.sampling import Sampling

__all__ = ["Encoder", "Service", "prepare"]


class Encoder(Protocol):
    """Turns texts and conversations into token ids and back."""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""

    def encode(self, text: str) -> Sequence[int]:
        """Return a text's token ids."""

    def frame(self, messages: Sequence[Any]) -> Sequence[int]:
        """Return a conversation's token ids, up to the next answer."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What is served, and within which bounds.

    Attributes:
        batcher: Answers.
        encoder: Of the model.
        permits: Who may ask, and who answers.
        account: What every answer says of the model.
        metrics: Counts.
        context: The most tokens that prompt and answer may have.
        vocab_size: Of the model.
        max_new_tokens: Length of an answer at most.
        places: How many answers run or wait at most.
        timeout_s: How long an answer may take.
        reporter: Hears of what broke.
        local_names: Names in the Host header that are answered; empty is any.
        has_page: Whether the playground is at the server's own address.
    """

    batcher: Batcher
    encoder: Encoder
    permits: Permits
    account: Account
    metrics: Metrics
    context: int
    vocab_size: int
    max_new_tokens: int
    places: int
    timeout_s: float
    reporter: Reporter
    local_names: tuple[str, ...] = ()
    has_page: bool = False


def prepare(service: Service, query: Query, grant: Grant) -> tuple[Reply, tuple[Ask, ...]]:
    """Return an empty reply to a query, and what to ask of the scheduler for it. Cuts texts into tokens.

    Args:
        service: What is served.
        query: What is asked.
        grant: Who answers.

    Raises:
        Refused: There is no chat template, a prompt is none, or it is too long.
    """
    # A conversation is one prompt. All are counted before the first is cut into tokens, which takes its time.
    answers = max(len(query.prompts), 1) * query.n
    if answers > service.places:
        raise Refused(400, f"{answers} answers are more than the {service.places} that this server holds", param="n")
    prompts = _prompts(service, query)
    first_seed = secrets.randbits(48) if query.seed is None else query.seed
    asks = tuple(
        Ask(
            tokens=tokens,
            left_out=grant.selection.left_out,
            max_new_tokens=_length(service, query, len(tokens)),
            sampling=Sampling(
                temperature=query.temperature,
                top_p=query.top_p,
                seed=first_seed + choice,
                top_logprobs=query.top_logprobs,
            ),
            stop=query.stop,
            scores_prompt=query.echo and query.top_logprobs is not None,
        )
        for tokens, _ in prompts
        for choice in range(query.n)
    )
    each = [prompt for prompt in prompts for _ in range(query.n)]
    return Reply(query, grant, service.account, each, sum(len(tokens) for tokens, _ in prompts)), asks


def _prompts(service: Service, query: Query) -> list[tuple[tuple[int, ...], str]]:
    """Return each prompt's token ids, and its text where it is echoed."""
    encoder = service.encoder
    if query.is_chat:
        if not encoder.has_template:
            message = "this model has no chat template, so it holds no conversations; use /v1/completions"
            raise Refused(400, message, code="no_chat_template")
        try:
            return [(tuple(encoder.frame(query.messages)), "")]
        except UsageError as error:
            raise refused(error) from error
    found = []
    for prompt in query.prompts:
        tokens = tuple(encoder.encode(prompt)) if isinstance(prompt, str) else prompt
        if any(not 0 <= token < service.vocab_size for token in tokens):
            raise Refused(400, f"prompt has a token beyond 0 to {service.vocab_size - 1}", param="prompt")
        text = prompt if isinstance(prompt, str) else encoder.decode(tokens) if query.echo else ""
        found.append((tokens, text))
    return found


def _length(service: Service, query: Query, prompt_tokens: int) -> int:
    """Return how long an answer to a prompt may become.

    Raises:
        Refused: The prompt has no token, or leaves no room for what is asked.
    """
    param = "messages" if query.is_chat else "prompt"
    if not prompt_tokens:
        raise Refused(400, f"{param}: has no token", param=param)
    wanted, room = query.max_new_tokens, service.context - prompt_tokens
    if wanted is not None and wanted > service.max_new_tokens:
        message = f"max_tokens is {wanted}; this server gives at most {service.max_new_tokens}"
        raise Refused(400, message, param="max_tokens")
    if room < (1 if wanted is None else wanted):
        message = (
            f"{param}: {prompt_tokens} tokens, and {1 if wanted is None else wanted} for the answer, are more than the "
            f"{service.context} that this server takes"
        )
        raise Refused(400, message, param=param, code="context_length_exceeded")
    return min(room, service.max_new_tokens) if wanted is None else wanted
