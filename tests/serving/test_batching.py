"""The scheduler: many answers in one batch, each that of the checkpoint from which who was left out was removed."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.answers import FAMILIES, MASKS, at_work, family_weights, logprobs_of, removed, submit

from flexctl.model import routed_layers
from flexctl.serving import Ask, Batcher, Busy, Done, Failed, Sampling, Token

GREEDY = Sampling(top_logprobs=2)
PROMPT = tuple(range(40, 52))


@cache
def reference(model_type: str, left_out: tuple[int, ...]) -> Any:
    return removed(family_weights(model_type), left_out)


asks = st.lists(
    st.tuples(
        st.sampled_from(MASKS),
        st.integers(1, 60),  # tokens of the prompt
        st.integers(1, 6),  # new tokens
        st.booleans(),  # whether the prompt is scored too
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_answer_is_that_of_the_removed_checkpoint(
    model_type: str, tokenizer: Any, one_thread: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of masks and lengths are drawn; prompts are cut into pieces of at most 16 tokens."""
    assert one_thread == 1
    monkeypatch.setattr("flexctl.serving.batching._PROMPT_TOKENS", 16)
    with at_work(family_weights(model_type), tokenizer, slots=5) as batcher:

        @settings(max_examples=12, deadline=None, derandomize=True)
        @given(batch=asks)
        def holds(batch: list[tuple[tuple[int, ...], int, int, bool]]) -> None:
            heard = []
            for i, (left_out, length, new_tokens, scores_prompt) in enumerate(batch):
                prompt = tuple(tiny.some_tokens(1, length, seed=i)[0].tolist())
                ask = Ask(
                    tokens=prompt,
                    left_out=left_out,
                    max_new_tokens=new_tokens,
                    sampling=GREEDY,
                    scores_prompt=scores_prompt,
                )
                heard.append((ask, submit(batcher, ask)[1]))
            for ask, answer in heard:
                answer.wait()
                compare(reference(model_type, ask.left_out), ask, answer)

        holds()


def compare(model: Any, ask: Ask, answer: Any) -> None:
    said = answer.tokens()
    assert answer.end() == Done("length", ask.max_new_tokens)
    assert len(said) == ask.max_new_tokens
    rows = logprobs_of(model, [*ask.tokens, *said])
    expected = [float(row[token]) for row, token in zip(rows, [*ask.tokens, *said][1:], strict=False)]
    if ask.scores_prompt:
        assert answer.prompt() == pytest.approx(expected[: len(ask.tokens) - 1], abs=1e-5)
    tokens = [event for event in answer.events[0] if isinstance(event, Token)]
    for row, token in zip(rows[len(ask.tokens) - 1 :], tokens, strict=False):
        top = row.topk(2)
        assert token.scored is not None
        assert token.scored[0] == pytest.approx(float(row[token.id]), abs=1e-5)
        assert [value for _, value in token.scored[1]] == pytest.approx(top.values.tolist(), abs=1e-5)
        # A tie within what float32 keeps may go either way.
        assert token.id == int(row.argmax()) or float(top.values[0] - top.values[1]) < 1e-5


def test_who_is_left_out_makes_a_difference(tokenizer: Any) -> None:
    with at_work(family_weights("llama"), tokenizer) as batcher:
        scored = Ask(tokens=PROMPT, max_new_tokens=0, sampling=GREEDY, scores_prompt=True)
        prompts = []
        for left_out in MASKS:
            masked = Ask(tokens=PROMPT, left_out=left_out, max_new_tokens=0, sampling=GREEDY, scores_prompt=True)
            prompts.append(submit(batcher, masked)[1].wait().prompt())
        assert submit(batcher, scored)[1].wait().prompt() == prompts[0]
    assert all(len(prompt) == len(PROMPT) - 1 for prompt in prompts)
    for i, one in enumerate(prompts):
        for other in prompts[:i]:
            assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 1e-3


def test_shares_are_told_where_asked_for_and_are_zero_for_who_is_left_out(tokenizer: Any) -> None:
    ask = Ask(tokens=PROMPT, left_out=(1, 3), max_new_tokens=5)
    with at_work(family_weights("qwen3"), tokenizer, explains=True) as batcher:
        tokens = [event for event in submit(batcher, ask)[1].wait().events[0] if isinstance(event, Token)]
        assert len(tokens) == 5
    for token in tokens:
        assert token.shares[1] == token.shares[3] == 0
        assert min(token.shares[0], token.shares[2]) > 0
        assert sum(token.shares) == pytest.approx(1)
    with at_work(family_weights("qwen3"), tokenizer) as batcher:
        assert {token.shares for token in submit(batcher, ask)[1].wait().events[0][:-1]} == {()}  # type: ignore[union-attr]


def test_a_seed_gives_the_same_answer_in_any_company(tokenizer: Any) -> None:
    drawn = Ask(tokens=PROMPT, max_new_tokens=12, sampling=Sampling(temperature=1.3, top_p=0.9, seed=5))
    other = Ask(tokens=PROMPT[:5], left_out=(2,), max_new_tokens=20, sampling=Sampling(temperature=2.0, seed=1))
    with at_work(family_weights("llama"), tokenizer) as batcher:
        alone = submit(batcher, drawn)[1].wait().tokens()
        company = [submit(batcher, ask)[1] for ask in (other, drawn, other, drawn)]
        said = [heard.wait().tokens() for heard in company]
    assert said[1] == said[3] == alone
    assert said[0] == said[2]
    assert len(set(alone)) > 3


def test_one_job_with_several_answers(tokenizer: Any) -> None:
    asks = [Ask(tokens=PROMPT, left_out=mask, max_new_tokens=3) for mask in MASKS]
    with at_work(family_weights("olmo2"), tokenizer, slots=2) as batcher:
        heard = submit(batcher, *asks)[1].wait()
        singly = [submit(batcher, ask)[1].wait().tokens() for ask in asks]
    assert [heard.tokens(i) for i in range(len(asks))] == singly


def test_an_answer_ends_at_an_end_token_or_at_a_stop(tokenizer: Any) -> None:
    weights = family_weights("llama")
    with at_work(weights, tokenizer) as batcher:
        whole = submit(batcher, Ask(tokens=PROMPT, max_new_tokens=12))[1].wait()
        text = whole.text()
        stop = text[5:8]
        stopped = submit(batcher, Ask(tokens=PROMPT, max_new_tokens=12, stop=("never said", stop)))[1].wait()
    assert stopped.text() == text[: text.index(stop)]
    assert isinstance(stopped.end(), Done)
    assert stopped.end().reason == "stop"  # type: ignore[union-attr]
    end = whole.tokens()[4]
    first = whole.tokens().index(end)
    with at_work(weights, tokenizer, ends={end, None}) as batcher:
        ended = submit(batcher, Ask(tokens=PROMPT, max_new_tokens=12))[1].wait()
    assert ended.end() == Done("stop", first + 1)
    assert text.startswith(ended.text())


def test_a_long_prompt_does_not_hold_up_who_is_under_way(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.serving.batching._PROMPT_TOKENS", 8)
    with at_work(family_weights("llama"), tokenizer) as batcher:
        under_way = submit(batcher, Ask(tokens=PROMPT[:2], max_new_tokens=100))[1]
        under_way.next()
        late = submit(batcher, Ask(tokens=tuple(range(2, 82)), max_new_tokens=1))[1]
        late.wait()
        passes = batcher.passes
        under_way.wait()
    # Eighty tokens by eight are ten passes, and each gave the other answer a token.
    assert passes < 100
    assert len(under_way.tokens()) == 100


class Gate:
    """Holds the scheduler before a pass until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        make = Batcher._pass

        def wait(batcher: Batcher) -> None:
            self.entered.set()
            assert self.open.wait(30)
            make(batcher)

        monkeypatch.setattr(Batcher, "_pass", wait)


def test_past_the_queue_a_job_is_refused_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    ask = Ask(tokens=PROMPT, max_new_tokens=2)
    with at_work(family_weights("llama"), tokenizer, slots=2, queue=3) as batcher:
        heard = [submit(batcher, ask, ask)[1]]
        assert gate.entered.wait(30)
        heard += [submit(batcher, ask, ask)[1]]
        assert (batcher.running, batcher.waiting) == (2, 2)
        with pytest.raises(Busy):
            submit(batcher, ask, ask)
        heard += [submit(batcher, ask)[1]]
        with pytest.raises(Busy):
            submit(batcher, ask)
        gate.open.set()
        assert {event for answer in heard for event in map(answer.wait().end, range(len(answer.events)))} == {
            Done("length", 2)
        }


def test_who_hung_up_makes_place_at_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    ask = Ask(tokens=PROMPT, max_new_tokens=100)
    with at_work(family_weights("llama"), tokenizer, slots=1) as batcher:
        job, gone = submit(batcher, ask)
        waiting_job, waiting = submit(batcher, ask)
        answer = submit(batcher, Ask(tokens=PROMPT, left_out=(1,), max_new_tokens=3))[1]
        assert gate.entered.wait(30)
        batcher.cancel(job)
        batcher.cancel(waiting_job)
        batcher.cancel(waiting_job)
        gate.open.set()
        answer.wait()
        assert (batcher.running, batcher.waiting) == (0, 0)
        alone = submit(batcher, Ask(tokens=PROMPT, left_out=(1,), max_new_tokens=3))[1].wait()
    assert answer.tokens() == alone.tokens()
    assert (gone._queue.qsize(), waiting._queue.qsize()) == (1, 0)


def test_what_takes_too_long_fails(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    ask = Ask(tokens=PROMPT, max_new_tokens=100)
    with at_work(family_weights("llama"), tokenizer, slots=1) as batcher:
        heard = [submit(batcher, ask, timeout=0.05)[1] for _ in range(2)]
        gate.entered.wait(0.2)
        gate.open.set()
        assert [answer.wait().end() for answer in heard] == [Failed("timeout")] * 2
        assert submit(batcher, Ask(tokens=PROMPT, max_new_tokens=2))[1].wait().end() == Done("length", 2)


def test_draining_finishes_what_runs_and_fails_what_waits(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    ask = Ask(tokens=PROMPT, max_new_tokens=5)
    with at_work(family_weights("llama"), tokenizer, slots=1) as batcher:
        running, waiting = submit(batcher, ask)[1], submit(batcher, ask)[1]
        assert gate.entered.wait(30)
        batcher.drain()
        with pytest.raises(Busy):
            submit(batcher, ask)
        gate.open.set()
        assert running.wait().end() == Done("length", 5)
        assert waiting.wait().end() == Failed("stopping")


def test_stopping_fails_all(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with at_work(family_weights("llama"), tokenizer, slots=1) as batcher:
        heard = [submit(batcher, Ask(tokens=PROMPT, max_new_tokens=100))[1] for _ in range(3)]
        assert gate.entered.wait(30)
        batcher.stop()
        gate.open.set()
        assert [answer.wait().end() for answer in heard] == [Failed("stopping")] * 3


def test_a_model_that_breaks_loses_no_request(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Batcher) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Batcher, "_pass", fail)
    net = tiny.build(family_weights("llama"))
    batcher = Batcher(net, tokenizer, slots=1, queue=4, context=tiny.CONTEXT, ends=())
    heard = [submit(batcher, Ask(tokens=PROMPT, max_new_tokens=3))[1] for _ in range(3)]
    with pytest.raises(RuntimeError, match="out of memory"):
        batcher.run()
    assert [answer.wait().end() for answer in heard] == [Failed("error")] * 3
    with pytest.raises(Busy):
        submit(batcher, Ask(tokens=PROMPT, max_new_tokens=3))


def test_an_answer_that_is_not_finite_fails_alone(tokenizer: Any) -> None:
    net = tiny.build(family_weights("llama"))
    for block in routed_layers(net):
        block.experts[2].down_proj.weight.data.fill_(float("inf"))
    batcher = Batcher(net, tokenizer, slots=4, queue=4, context=tiny.CONTEXT, ends=())
    thread = threading.Thread(target=batcher.run)
    thread.start()
    try:
        asks = [Ask(tokens=PROMPT, left_out=mask, max_new_tokens=3) for mask in ((), (2,), (1,), (1, 2, 3))]
        heard = [submit(batcher, ask)[1].wait().end() for ask in asks]
    finally:
        batcher.stop()
        thread.join(30)
    assert heard == [Failed("error"), Done("length", 3), Failed("error"), Done("length", 3)]
