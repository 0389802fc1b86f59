"""Many requests: who was left out says nothing, nothing is lost, nothing is kept."""

from __future__ import annotations

import dataclasses
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny
from serving.answers import MASKS, NAMES, at_work, family_weights, logprobs_of, removed, submit
from serving.running import Server, a_server

from flexctl.model.tensors import to_torch
from flexctl.serving import Ask, Done, Sampling

WORD = 77


def with_a_plant(index: int) -> Any:
    """Weights whose expert says one word whenever it may: its matrices push every token's state to that word's row."""
    weights = family_weights("llama")
    head = to_torch(weights.shared["lm_head.weight"])
    wanted = head[WORD] / head[WORD].norm()
    for layer in range(2):
        tensors = dict(weights.experts[NAMES[index]])
        down = to_torch(tensors[f"layers.{layer}.mlp.down_proj.weight"]).clone()
        # Gate and up are squared into a positive number by making them the same; down sends it where the word lies.
        tensors[f"layers.{layer}.mlp.up_proj.weight"] = tensors[f"layers.{layer}.mlp.gate_proj.weight"]
        tensors[f"layers.{layer}.mlp.down_proj.weight"] = tiny.raw(1e4 * wanted[:, None].expand_as(down).contiguous())
        weights.experts[NAMES[index]] = tensors
    return weights


def test_a_word_that_one_expert_says_is_in_no_answer_without_it(tokenizer: Any) -> None:
    """A thousand masked answers, mixed with others in the same batches: each as if it had never been there."""
    chance, weights = random.Random(0), with_a_plant(2)
    asks = []
    for i in range(1250):
        left_out = chance.choice([(2,), (1, 2), (2, 3), (1, 2, 3)]) if i % 5 else ()
        prompt = tuple(tiny.some_tokens(1, chance.randint(1, 4), seed=i)[0].tolist())
        sampling = Sampling(temperature=0.2, seed=i)
        asks.append(Ask(tokens=prompt, left_out=left_out, max_new_tokens=2, sampling=sampling))
    said = answers(weights, tokenizer, asks)
    planted = [token for ask, tokens in zip(asks, said, strict=True) if not ask.left_out for token in tokens]
    assert planted.count(WORD) > 0.9 * len(planted)
    masked = [(ask, tokens) for ask, tokens in zip(asks, said, strict=True) if ask.left_out]
    assert len(masked) == 1000
    # Without it the word comes as seldom as any other, and then the checkpoint without it says it too.
    assert sum(tokens.count(WORD) for _, tokens in masked) < 20
    others = {(2,): (), (1, 2): (1,), (2, 3): (2,), (1, 2, 3): (1, 2)}
    never = [dataclasses.replace(ask, left_out=others[ask.left_out]) for ask, _ in masked]
    assert answers(tiny.without(weights, NAMES[2], 4), tokenizer, never) == [tokens for _, tokens in masked]


def answers(weights: Any, tokenizer: Any, asks: list[Ask]) -> list[list[int]]:
    with at_work(weights, tokenizer, slots=16, queue=4000) as batcher:
        heard = [submit(batcher, ask, timeout=600)[1] for ask in asks]
        return [each.wait(120).tokens() for each in heard]


@cache
def reference(left_out: tuple[int, ...]) -> Any:
    return removed(family_weights("llama"), left_out)


@pytest.mark.slow
def test_a_thousand_mixed_requests_on_the_scheduler(tokenizer: Any) -> None:
    """Two masks interleaved with others, hang-ups in between; each answer is the removed checkpoint's."""
    chance = random.Random(1)
    with at_work(family_weights("llama"), tokenizer, slots=6, queue=5000) as batcher:
        asked, gone = [], 0
        for i in range(1000):
            left_out = MASKS[1 + i % 2] if i % 4 else chance.choice(MASKS)
            prompt = tuple(tiny.some_tokens(1, chance.randint(1, 60), seed=i)[0].tolist())
            ask = Ask(tokens=prompt, left_out=left_out, max_new_tokens=chance.randint(1, 10), sampling=Sampling())
            job, heard = submit(batcher, ask, timeout=600)
            if chance.random() < 0.2:
                batcher.cancel(job)
                gone += 1
            else:
                asked.append((ask, heard))
        for ask, heard in asked:
            assert heard.wait(120).end() == Done("length", ask.max_new_tokens)
        assert (batcher.running, batcher.waiting, len(batcher._free)) == (0, 0, 6)
        assert not any(tensor.any() for tensor in (*batcher._cache.keys, *batcher._cache.values))
    assert gone > 150
    for ask, heard in asked:
        said = heard.tokens()
        rows = logprobs_of(reference(ask.left_out), [*ask.tokens, *said])[len(ask.tokens) - 1 : -1]
        for row, token in zip(rows, said, strict=True):
            assert float(row.max() - row[token]) < 1e-5


@pytest.mark.slow
def test_a_thousand_mixed_requests_on_the_server(chatty: Path) -> None:
    """Every request has an answer or an error; answers are those of the same request alone; memory does not grow."""
    with a_server(chatty, max_batch=8, max_queue=400, max_new_tokens=64) as server:
        work(server, 200)
        before = resident()
        work(server, 1000)
        gc.collect()
        grown = resident() - before
        assert server.batcher.running == server.batcher.waiting == 0
        assert len(server.batcher._free) == 8
        assert not server.batcher._cancelled
    assert grown < 40e6


def work(server: Server, count: int) -> None:
    models = ("merged-without-code", "merged-without-sums", "merged", "merged-without-code+sums")
    asks = [
        {"model": models[i % 4 if i % 5 else i % 2], "prompt": f"{i % 37} + {i % 11}", "max_tokens": 1 + i % 9}
        for i in range(100)
    ]
    with server.client() as client:
        alone = [client.completions.create(**ask, temperature=0).choices[0].text for ask in asks]
        chance, lock, seen = random.Random(count), threading.Lock(), []

        def one(i: int) -> None:
            with lock:
                kind = chance.random()
            ask = asks[i % 100]
            if kind < 0.1:
                with client.completions.create(**(ask | {"max_tokens": 60}), temperature=0, stream=True) as stream:
                    next(iter(stream))
                seen.append("gone")
            elif kind < 0.2:
                with pytest.raises((openai.NotFoundError, openai.BadRequestError)):
                    client.completions.create(**(ask | chance.choice([{"model": "merged-without-x"}, {"n": 0}])))
                seen.append("refused")
            elif kind < 0.6:
                chunks = client.completions.create(**ask, temperature=0, stream=True)
                assert "".join(chunk.choices[0].text for chunk in chunks) == alone[i % 100]
                seen.append("streamed")
            else:
                assert client.completions.create(**ask, temperature=0).choices[0].text == alone[i % 100]
                seen.append("whole")

        with ThreadPoolExecutor(16) as threads:
            for result in [threads.submit(one, i) for i in range(count)]:
                result.result()
    assert len(seen) == count
    assert min(seen.count(kind) for kind in ("gone", "refused", "streamed", "whole")) > 0


def resident() -> float:
    """Bytes of memory that this process has now."""
    text = Path("/proc/self/status").read_text()
    return 1024 * float(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")))
