"""A flexctl model as lm-evaluation-harness drives it: log-likelihoods of answers, and greedy generation.

Tokens, truncation and sums are those of the harness's own Transformers model, so that figures compare.

Shapes: B sequences, S positions, V vocab_size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor, nn
from torch.nn import functional as F

from flexctl.errors import UsageError
from flexctl.heap import reusing_memory
from flexctl.model.batching import of_like_length
from flexctl.model.losses import LOGIT_BUDGET
from flexctl.runtime import Progress, Reporter

__all__ = ["HarnessModel"]

Encoded = tuple[tuple[str, str], list[int], list[int]]
_LONGEST = 2048
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cut:
    """What of one request goes through the model at once; the last ``targets`` of ``tokens`` are scored."""

    request: int
    tokens: list[int]
    targets: int


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model of ``model.building.build_model`` behind the harness's interface.

    Args:
        model: In evaluation mode; experts that are left out and top-k are as they were set.
        tokenizer: Its Transformers tokenizer.
        batch_tokens: Positions that go through the model at once.
        reporter: Hears of progress.

    Raises:
        UsageError: The tokenizer has no end-of-text token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_tokens: int, reporter: Reporter) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UsageError(
                "the tokenizer has no end-of-text token (eos_token)", hint="set it in the anchor's tokenizer"
            )
        self.tokenizer = tokenizer
        self.title = "tasks"
        self._model, self._batch_tokens, self._reporter = model, batch_tokens, reporter
        self._device = next(model.parameters()).device
        self._longest = int(getattr(model.config, "max_position_embeddings", None) or _LONGEST)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the begin token where there is one."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return a text's tokens, with the special ones that the tokenizer adds by itself unless told otherwise."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        ids = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation in nats, whether it is what greedy decoding gives) of each."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each whole text, in nats."""
        texts = [request.args[0] for request in requests]
        encoded = [((text, ""), [self.prefix_token_id], self.tok_encode(text)) for text in texts]
        return [total for total, _ in self._loglikelihood_tokens(encoded)]

    @reusing_memory()
    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[tuple[float, bool]]:
        pieces = list(self._pieces(requests))
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        with self._reporter.progress(self.title, sum(len(piece.tokens) for piece in pieces), "tokens") as bar:
            for batch in self._batches(pieces):
                for piece, (total, hit) in zip(batch, self._score(batch), strict=True):
                    totals[piece.request] += total
                    greedy[piece.request] &= hit
                bar.advance(sum(len(piece.tokens) for piece in batch))
        return list(zip(totals, greedy, strict=True))

    def _pieces(self, requests: Sequence[Encoded]) -> Iterator[_Cut]:
        """Yield each request cut to what the model can hold: from the left, and long answers in several pieces."""
        for index, ((prompt, _), context, answer) in enumerate(requests):
            if not answer:
                raise UsageError(f"{self.title}: the answer adds no token to {prompt[-40:]!r}")
            for start in range(0, len(answer), self._longest):
                targets = answer[start : start + self._longest]
                tokens = [*context, *answer[: start + len(targets)]][-(self._longest + 1) :]
                yield _Cut(request=index, tokens=tokens, targets=len(targets))

    def _batches(self, pieces: Sequence[_Cut], new: int = 0) -> Iterator[list[_Cut]]:
        """Yield pieces of like length together, each to grow by ``new`` tokens."""
        for numbers in of_like_length([len(piece.tokens) + new for piece in pieces], self._batch_tokens):
            yield [pieces[number] for number in numbers]

    @torch.no_grad()
    def _score(self, batch: Sequence[_Cut]) -> list[tuple[float, bool]]:
        longest = max(len(piece.tokens) for piece in batch)
        ids = np.zeros((len(batch), longest), dtype=np.int64)
        wanted = np.zeros((len(batch), longest - 1), dtype=bool)
        for row, piece in enumerate(batch):
            ids[row, : len(piece.tokens)] = piece.tokens
            wanted[row, len(piece.tokens) - 1 - piece.targets : len(piece.tokens) - 1] = True
        tokens, mask = torch.from_numpy(ids).to(self._device), torch.from_numpy(wanted).to(self._device)
        losses, hits = self._score_targets(tokens[:, :-1], tokens[:, 1:][mask], mask)
        sizes = [piece.targets for piece in batch]
        return [
            (-float(loss.double().sum()), bool(hit.all()))
            for loss, hit in zip(losses.split(sizes), hits.split(sizes), strict=True)
        ]

    def _score_targets(self, inputs: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each target in nats and whether it is the likeliest token.

        Args:
            inputs: Token ids, (B, S).
            targets: The ids that follow where ``mask`` is true, (T,).
            mask: (B, S), bool.
        """
        states = self._model.base_model(inputs, use_cache=False).last_hidden_state[mask]  # type: ignore[operator]
        head = self._model.get_output_embeddings()  # type: ignore[operator]
        size = max(1, LOGIT_BUDGET // head.out_features)
        losses, hits = [], []
        for chunk, wanted in zip(states.split(size), targets.split(size), strict=True):
            logits = head(chunk).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            hits.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(losses), torch.cat(hits)

    @reusing_memory()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the greedy continuation of each prompt, cut before the first text that ends an answer."""
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        answers = [""] * len(requests)
        with self._reporter.progress(self.title, len(requests), "answers") as bar:
            for indices in alike.values():
                prompts = [requests[index].args[0] for index in indices]
                for position, answer in self._answer(prompts, requests[indices[0]].args[1], bar):
                    answers[indices[position]] = answer
        return answers

    def _answer(self, prompts: Sequence[str], settings: dict[str, Any], bar: Progress) -> Iterator[tuple[int, str]]:
        settings = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        until = handle_stop_sequences(settings["until"], eos=self.tokenizer.decode([self.eot_token_id]))
        new = min(settings["max_gen_toks"], max(1, self._longest // 2))
        room = self._longest - new
        pieces = [
            _Cut(request=index, tokens=self.tok_encode(prompt)[-room:] or [self.prefix_token_id], targets=0)
            for index, prompt in enumerate(prompts)
        ]
        for batch in self._batches(pieces, new):
            for piece, text in zip(batch, self._continue(batch, new, until), strict=True):
                yield piece.request, postprocess_generated_text(text, until, None)
            bar.advance(len(batch))

    @torch.no_grad()
    def _continue(self, batch: Sequence[_Cut], new: int, until: Sequence[str]) -> list[str]:
        longest = max(len(piece.tokens) for piece in batch)
        ids = np.full((len(batch), longest), self.eot_token_id, dtype=np.int64)
        real = np.zeros((len(batch), longest), dtype=np.int64)
        for row, piece in enumerate(batch):
            ids[row, longest - len(piece.tokens) :] = piece.tokens
            real[row, longest - len(piece.tokens) :] = 1
        out = self._model.generate(  # type: ignore[operator]
            torch.from_numpy(ids).to(self._device),
            attention_mask=torch.from_numpy(real).to(self._device),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            stopping_criteria=[_Until(self.tokenizer, longest, until)],
        )
        texts: list[str] = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        return texts


class _Until(transformers.StoppingCriteria):  # type: ignore[misc]
    """Stops each sequence by itself once its new text holds one of ``until``."""

    def __init__(self, tokenizer: Any, start: int, until: Sequence[str]) -> None:
        self._tokenizer, self._start, self._until = tokenizer, start, until

    def __call__(self, input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :])
        return torch.tensor([any(end in text for end in self._until) for text in texts], device=input_ids.device)
