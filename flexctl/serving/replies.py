"""Answers in the form of OpenAI's protocol, whole or piece by piece, each with who took part in it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from flexctl.bundle import model_name
from flexctl.serving.jobs import Done, Token
from flexctl.serving.permits import Grant
from flexctl.serving.protocol import Query
from flexctl.serving.sampling import Scored

__all__ = ["Account", "Reply"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What every answer says of the model behind it.

    Attributes:
        base: The served model's name.
        digest: Of the bundle.
        explains: Whether experts' shares are told.
        word: Returns a token's text for log probabilities.
    """

    base: str
    digest: str
    explains: bool
    word: Callable[[int], str]


class _Choice:
    """One of the answers of a reply, as far as it came."""

    def __init__(self, prompt: tuple[int, ...], prompt_text: str) -> None:
        self.prompt, self.prompt_text = prompt, prompt_text
        self.prompt_scored: tuple[Scored, ...] = ()
        self.tokens: list[Token] = []
        self.done: Done | None = None
        self.before = 0  # characters of the text before its last token

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    def add(self, token: Token) -> None:
        self.before += len(self.tokens[-1].text) if self.tokens else 0
        self.tokens.append(token)


class Reply:
    """The answer to one query.

    Args:
        query: What was asked.
        grant: Who answers.
        account: What it says of the model.
        prompts: Token ids of each answer's prompt, and its text where it is echoed.
        prompt_tokens: Of all prompts, each counted once however many answers it has.

    Attributes:
        choices: The answers; what comes is added to them.
    """

    def __init__(
        self,
        query: Query,
        grant: Grant,
        account: Account,
        prompts: Sequence[tuple[tuple[int, ...], str]],
        prompt_tokens: int,
    ) -> None:
        self.choices = [_Choice(*prompt) for prompt in prompts]
        self._query, self._grant, self._account = query, grant, account
        self._prompt_tokens = prompt_tokens
        kind = ("chatcmpl", "chat.completion") if query.is_chat else ("cmpl", "text_completion")
        self._head = {
            "id": f"{kind[0]}-{secrets.token_hex(12)}",
            "object": f"{kind[1]}.chunk" if query.is_chat and query.stream else kind[1],
            "created": int(time.time()),
            "model": model_name(account.base, grant.selection.without),
        }

    def whole(self) -> dict[str, Any]:
        """Return the answer once all of it has come."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self.choices)]
        return {**self._head, "choices": choices, "usage": self._usage(), "flexctl": self._flexctl()}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the first piece of an answer in a stream; None where there is nothing to say before its first token.

        A conversation begins with the role, an echo with the prompt.
        """
        choice = self.choices[index]
        if self._query.is_chat:
            return self._chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})
        if not self._query.echo:
            return None
        logprobs = self._told(choice, [], 0)
        return self._chunk(index, {"text": choice.prompt_text, "logprobs": logprobs})

    def piece(self, index: int, token: Token) -> dict[str, Any]:
        """Return what a token adds to an answer, in a stream, once it has been added to its choice."""
        choice = self.choices[index]
        said: dict[str, Any]
        if self._query.is_chat:
            said = {"delta": {"content": token.text}, "logprobs": self._chat_told([token])}
        else:
            said = {"text": token.text, "logprobs": self._told(None, [token], choice.before)}
        chunk = self._chunk(index, said)
        return {**chunk, "flexctl": {"shares": self._shares([token])}} if self._account.explains else chunk

    def closing(self, index: int) -> dict[str, Any]:
        """Return the last piece of an answer in a stream; the very last, where usage is not told, has the account."""
        done = self.choices[index].done
        said: dict[str, Any] = {"delta": {}} if self._query.is_chat else {"text": ""}
        chunk = self._chunk(index, {**said, "logprobs": None}, done.reason if done else None)
        is_last = not self._query.tells_usage and all(choice.done for choice in self.choices)
        return {**chunk, "flexctl": self._flexctl()} if is_last else chunk

    def usage(self) -> dict[str, Any]:
        """Return the very last piece of a stream, where it is asked for."""
        return {**self._head, "choices": [], "usage": self._usage(), "flexctl": self._flexctl()}

    def _chunk(self, index: int, said: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        chunk = {**self._head, "choices": [{"index": index, **said, "finish_reason": reason}]}
        return {**chunk, "usage": None} if self._query.tells_usage else chunk

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        reason = choice.done.reason if choice.done else None
        if self._query.is_chat:
            message = {"role": "assistant", "content": choice.text, "refusal": None}
            logprobs = self._chat_told(choice.tokens)
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        echoed = choice.prompt_text if self._query.echo else ""
        logprobs = self._told(choice if self._query.echo else None, choice.tokens, 0)
        return {"index": index, "text": echoed + choice.text, "logprobs": logprobs, "finish_reason": reason}

    def _usage(self) -> dict[str, int]:
        new = sum(choice.done.new_tokens for choice in self.choices if choice.done)
        prompt = self._prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _flexctl(self) -> dict[str, Any]:
        found = self._grant.account(self._account.digest)
        if self._account.explains:
            found["shares"] = self._shares([token for choice in self.choices for token in choice.tokens])
        return found

    def _shares(self, tokens: Sequence[Token]) -> dict[str, float]:
        """Return the experts' shares, mean over tokens; empty where there are none."""
        names = self._grant.selection.experts if tokens else ()
        means = (sum(token.shares[i] for token in tokens) / len(tokens) for i in range(len(names)))
        return dict(zip(names, means, strict=True))

    def _told(self, prompt: _Choice | None, tokens: Sequence[Token], start: int) -> dict[str, Any] | None:
        """Return log probabilities as completions have them.

        Args:
            prompt: Whose prompt is told too.
            tokens: Those of the answer.
            start: Characters of the text before them.
        """
        if self._query.top_logprobs is None:
            return None
        ids = [*(prompt.prompt if prompt else ()), *(token.id for token in tokens)]
        words = [self._account.word(each) for each in ids]
        told: list[Scored | None] = [None, *prompt.prompt_scored] if prompt else []
        told += [token.scored for token in tokens]
        texts = [*words[: len(ids) - len(tokens)], *(token.text for token in tokens)]
        offsets = list(accumulate(map(len, texts), initial=start))[:-1]
        return {
            "tokens": words,
            "token_logprobs": [scored[0] if scored else None for scored in told],
            "top_logprobs": [
                {self._account.word(each): value for each, value in scored[1]} if scored else None for scored in told
            ],
            "text_offset": offsets,
        }

    def _chat_told(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Return log probabilities as conversations have them."""
        if self._query.top_logprobs is None:
            return None
        content = []
        for token in tokens:
            own, top = token.scored or (0.0, ())
            likely = [self._word(each, value) for each, value in top]
            content.append({**self._word(token.id, own), "top_logprobs": likely})
        return {"content": content, "refusal": None}

    def _word(self, token: int, logprob: float) -> dict[str, Any]:
        word = self._account.word(token)
        return {"token": word, "logprob": logprob, "bytes": list(word.encode())}
