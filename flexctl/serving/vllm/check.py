"""The check at start: does a mask leave an expert out, in this server, with these flags, on this machine?

Each expert in turn has the sign of its output turned, in place, in the weights that the server runs on. An answer from
which it is masked must stay as it is; one that it gives alone must change. That holds for any model, needs no second
copy of it, and goes the way of every request: salts, batches, whatever was compiled, captured or loaded from a cache.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexctl.errors import FlexctlError
from flexctl.serving.vllm.masks import KEY, Served, mask_of, salt

__all__ = ["check_masks"]

_PROMPT_TOKENS = 24
_NEW_TOKENS = 3
_FLOOR = 1e-5
"""Differences of a log probability below this are rounding."""

Answer = tuple[float, ...]
"""Log probabilities of the prompt's tokens and of the likeliest next ones, and these tokens."""

_HINT = "serve with our own engine, or take the experts out first: flexctl remove"


async def check_masks(engine: Any, model: Served, names: Sequence[str]) -> None:
    """Refuse to serve where a mask does not do what it must.

    Args:
        engine: vLLM's engine client.
        model: What is served.
        names: Its experts, the public one first.

    Raises:
        FlexctlError: An expert that was left out still has a say, one that is alone has none, rows of a batch are
            mixed up, or a request that says no mask is answered.
    """
    probe = _Probe(engine, model)
    await probe.must_refuse()
    count = model.num_experts
    if count == 1:
        return  # the public expert alone: there is nobody to leave out
    alone = {expert: mask_of(set(range(count)) - {expert}) for expert in range(count)}
    less = {expert: mask_of({expert}) for expert in range(count)}
    masks = ["", *less.values(), *(mask for mask in alone.values() if mask not in less.values())]
    before = await probe.one_by_one(masks)
    noise = _distance(before, await probe.one_by_one(masks))
    together = _distance(before, await probe.together(masks))
    for expert in range(count):
        other = alone[(expert + 1) % count]
        unmoved = [mask for mask in dict.fromkeys((less[expert], alone[0], other)) if mask != alone[expert]]
        await probe.negate(expert)
        after = await probe.one_by_one([*unmoved, alone[expert]])
        await probe.negate(expert)
        moved = _distance(before, after, unmoved)
        if moved > _FLOOR + 2 * noise:
            said = f"with {names[expert]} left out its weights still move the answer by {moved:.3g}"
            raise FlexctlError(f"vLLM does not leave experts out: {said}", hint=_HINT)
        own = _distance(before, after, [alone[expert]])
        if own <= _FLOOR + 2 * together:
            what = f"with all but {names[expert]} left out its weights move the answer by {own:.3g}"
            far = f"and requests of one batch move each other by {together:.3g}"
            raise FlexctlError(f"vLLM does not leave experts out: {what}, {far}", hint=_HINT)


class _Probe:
    """Asks the engine for short answers to one prompt, each with a prefix cache of its own."""

    def __init__(self, engine: Any, model: Served) -> None:
        config = engine.model_config
        tokens = min(_PROMPT_TOKENS, config.max_model_len - _NEW_TOKENS - 1)
        numbers = random.Random(0)
        self._ids = [numbers.randrange(config.get_vocab_size()) for _ in range(tokens)]
        self._engine, self._model = engine, model
        self._numbers = itertools.count()

    async def one_by_one(self, masks: Iterable[str]) -> dict[str, Answer]:
        """Return mask -> answer, asked for one after the other."""
        return {mask: await self._ask(mask) for mask in masks}

    async def together(self, masks: Sequence[str]) -> dict[str, Answer]:
        """Return mask -> answer, asked for at once."""
        return dict(zip(masks, await asyncio.gather(*map(self._ask, masks)), strict=True))

    async def negate(self, expert: int) -> None:
        """Turn the sign of an expert's output in every worker.

        Raises:
            FlexctlError: No worker has it.
        """
        if not sum(await self._engine.collective_rpc("flexctl_negate", args=(expert,))):
            raise FlexctlError(f"vLLM does not leave experts out: no worker holds expert {expert}", hint=_HINT)

    async def must_refuse(self) -> None:
        """Ask without a mask.

        Raises:
            FlexctlError: There was an answer.
        """
        from vllm.exceptions import VLLMValidationError

        try:
            await self._ask(None)
        except VLLMValidationError:
            return
        raise FlexctlError("vLLM answers a request that does not say who may answer", hint=_HINT)

    async def _ask(self, mask: str | None) -> Answer:
        from vllm import SamplingParams

        number = f"flexctl-check-{next(self._numbers)}"
        params = SamplingParams(
            temperature=0,
            max_tokens=_NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0,
            extra_args=None if mask is None else {KEY: mask},
        )
        prompt = {"prompt_token_ids": self._ids, "cache_salt": salt(self._model.digest, mask or "", number)}
        last = [output async for output in self._engine.generate(prompt, params, number)][-1]
        (answer,) = last.outputs
        steps = [*last.prompt_logprobs[1:], *answer.logprobs]
        ids = [*self._ids[1:], *answer.token_ids]
        return (*(step[token].logprob for step, token in zip(steps, ids, strict=True)), *map(float, answer.token_ids))


def _distance(before: Mapping[str, Answer], after: Mapping[str, Answer], masks: Iterable[str] | None = None) -> float:
    """Return the greatest difference between two answers to the same mask; infinite where one is no number."""
    pairs = [(before[mask], after[mask]) for mask in (after if masks is None else masks)]
    differences = [abs(a - b) for old, new in pairs for a, b in zip(old, new, strict=True)]
    return max((d if d == d else float("inf") for d in differences), default=0.0)
