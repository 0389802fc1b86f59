"""What clients of OpenAI's protocol see, by the official client against a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from serving.running import Server

from flexctl.engine.remove import RemoveConfig, remove
from flexctl.model.building import load_tokenizer

PROMPT = "def value_total(self"
ASK = {"model": "merged", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
TALK = [{"role": "user", "content": "12 + 5"}]


def complete(client: openai.OpenAI, **changes: Any) -> Any:
    return client.completions.create(**(ASK | changes))


def talk(client: openai.OpenAI, **changes: Any) -> Any:
    given = {"model": "merged", "messages": TALK, "max_tokens": 6, "temperature": 0}
    return client.chat.completions.create(**(given | changes))


def stock_answer(directory: Path, text: str, new_tokens: int) -> tuple[str, list[float]]:
    """What stock software goes on with, greedily, and the log probabilities of all tokens but the first."""
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        for _ in range(new_tokens):
            rows = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
            ids = [*ids, int(rows[-1].argmax())]
        rows = loaded(torch.tensor([ids])).logits[0].log_softmax(-1)
    return tokenizer.decode(ids), [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]


def test_models_are_listed_with_each_removal(client: openai.OpenAI) -> None:
    listed = {model.id: model.flexctl for model in client.models.list()}  # type: ignore[attr-defined]
    assert list(listed) == ["merged", "merged-without-code", "merged-without-old", "merged-without-sums"]
    assert listed["merged-without-old"]["experts"] == ["public", "code", "sums"]
    assert listed["merged"]["form"] == "merged-without-A+B leaves out A and B"
    assert listed["merged"]["rights"]["code"]["purposes"] == ["research"]
    two = client.models.retrieve("merged-without-sums+code")
    assert (two.id, two.flexctl["without"]) == ("merged-without-code+sums", ["code", "sums"])  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError, match="'nobody' is no expert of it"):
        client.models.retrieve("merged-without-nobody")


@pytest.mark.parametrize(
    ("changes", "without"),
    [
        ({}, ()),
        ({"model": "merged-without-code"}, ("code",)),
        ({"extra_body": {"without": ["sums"]}}, ("sums",)),
        ({"extra_body": {"only": ["sums"]}}, ("code", "old")),
        ({"model": "merged-without-old", "extra_body": {"without": ["code"]}}, ("code", "old")),
    ],
)
def test_an_answer_is_that_of_the_removed_checkpoint(
    client: openai.OpenAI, chatty: Path, tmp_path: Path, changes: dict[str, Any], without: tuple[str, ...]
) -> None:
    """On disk and in stock software: flexctl remove, then Transformers."""
    directory = chatty
    if without:
        directory = tmp_path / "removed"
        remove(RemoveConfig(names=without, source=chatty, output=directory))
    answer = complete(client, logprobs=1, echo=True, **changes)
    text, scores = stock_answer(directory, PROMPT, 6)
    assert answer.choices[0].text == text
    assert answer.choices[0].logprobs.token_logprobs == [None, *(pytest.approx(score, abs=1e-5) for score in scores)]
    assert answer.flexctl["without"] == list(without)


def test_an_answer_says_who_took_part(client: openai.OpenAI, chatty: Path) -> None:
    answer = complete(client, model="merged-without-sums", extra_body={"purpose": "Commercial"})
    digest = json.loads((chatty / "flexctl.json").read_text())["digest"]
    shares = answer.flexctl.pop("shares")
    assert answer.model == "merged-without-code+old+sums"
    assert answer.flexctl == {
        "digest": digest,
        "experts": ["public"],
        "without": ["code", "old", "sums"],
        "reasons": {
            "code": "it is for research, not for 'Commercial'",
            "old": "its rights ended on 2020-01-31",
            "sums": "the request leaves it out",
        },
    }
    assert shares == {"public": pytest.approx(1), "code": 0, "old": 0, "sums": 0}
    research = complete(client, extra_body={"purpose": "research"})
    assert research.flexctl["without"] == ["old"]
    assert sum(research.flexctl["shares"].values()) == pytest.approx(1)


def test_a_stream_has_the_same_text_and_its_account_last(client: openai.OpenAI) -> None:
    whole = complete(client, extra_body={"without": ["code"]})
    chunks = list(complete(client, stream=True, extra_body={"without": ["code"]}))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].flexctl == whole.flexctl
    assert chunks[-1].choices[0].finish_reason == "length"
    assert [set(chunk.flexctl) for chunk in chunks[:-1]] == [{"shares"}] * 6
    *_, last, usage = complete(client, stream=True, stream_options={"include_usage": True})
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)
    assert usage.flexctl["without"] == []
    assert not hasattr(last, "flexctl")


def test_conversations(client: openai.OpenAI) -> None:
    whole = talk(client, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert len(choice.logprobs.content) == 6
    for token in choice.logprobs.content:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert bytes(token.bytes).decode() == token.token
    chunks = list(talk(client, stream=True, model="merged-without-old"))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = talk(client, model="merged-without-old").choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    parts = [{"role": "user", "content": [{"type": "text", "text": "12 "}, {"type": "text", "text": "+ 5"}]}]
    assert talk(client, messages=parts).choices[0].message.content == choice.message.content
    assert talk(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_several_prompts_and_several_answers(client: openai.OpenAI) -> None:
    tokens = [5, 6, 7]
    both = complete(client, prompt=[PROMPT, "12 + "], n=2, temperature=1.0, seed=3, logprobs=0)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    again = complete(client, prompt="12 + ", n=2, temperature=1.0, seed=3)
    assert [choice.text for choice in both.choices[2:]] == [choice.text for choice in again.choices]
    assert again.choices[0].text != again.choices[1].text
    ids = complete(client, prompt=tokens, echo=True, max_tokens=0)
    assert (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (3, 0)
    assert both.choices[0].logprobs.top_logprobs[0] == {}
    streamed = list(complete(client, prompt=[PROMPT, "12 + "], n=2, temperature=1.0, seed=3, stream=True))
    for choice in both.choices:
        pieces = [chunk.choices[0] for chunk in streamed if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
    assert [hasattr(chunk, "flexctl") and "digest" in chunk.flexctl for chunk in streamed].count(True) == 1


def test_seeds_stops_and_temperatures(client: openai.OpenAI) -> None:
    hot = {"temperature": 1.5, "max_tokens": 20}
    first, again, other = (complete(client, seed=seed, **hot).choices[0].text for seed in (1, 1, 2))
    assert first == again != other
    assert len({complete(client, **hot).choices[0].text for _ in range(3)}) > 1
    assert (
        complete(client, seed=1, **(hot | {"top_p": 1e-9})).choices[0].text
        == complete(client, max_tokens=20).choices[0].text
    )
    stopped = complete(client, seed=1, stop=[first[4:6], "never"], **hot).choices[0]
    assert (stopped.text, stopped.finish_reason) == (first[: first.index(first[4:6])], "stop")
    streamed = complete(client, seed=1, stop=first[4:6], stream=True, **hot)
    assert "".join(chunk.choices[0].text for chunk in streamed) == stopped.text


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"without": ["nobody"]}, "without", "without: 'nobody' is not in merged, which holds public, code, old, sums"),
        ({"without": ["public"]}, "without", "without: the public expert cannot be left out"),
        ({"without": []}, "without", "without is empty; name closed experts, or leave the field out"),
        ({"without": "code"}, "without", "without is 'code'; it must be a list of experts' names"),
        ({"only": ["public"]}, "only", "only: the public expert always answers"),
        ({"only": []}, "only", "only is empty; name closed experts, or leave the field out"),
        ({"purpose": ""}, "purpose", "purpose is ''; it must be text"),
        ({"witout": ["code"]}, "witout", "'witout' is not a field that this server knows"),
        ({"\ud800": 1}, "\\ud800", "'\\ud800' is not a field that this server knows"),
        ({"x" * 5000: 1}, "x" * 76 + "..", "'xxx"),
        ({"n": 0}, "n", "n is 0; it must be a whole number from 1 to 128"),
        ({"n": 100}, "n", "100 answers are more than the 80 that this server holds"),
        ({"prompt": ["a"] * 81}, "n", "81 answers are more than the 80 that this server holds"),
        ({"temperature": -1}, "temperature", "temperature is -1; it must be a number from 0 to 100"),
        ({"top_p": 1.5}, "top_p", "top_p is 1.5; it must be a number from 0 to 1"),
        ({"stop": [""]}, "stop", "stop must be text, or a list of at most 16 texts, none empty"),
        ({"seed": True}, "seed", "seed is True; it must be a whole number from"),
        ({"logit_bias": {"5": 10}}, "logit_bias", "logit_bias is {'5': 10}, which this server does not support"),
        ({"max_tokens": 65}, "max_tokens", "max_tokens is 65; this server gives at most 64"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0, which only goes with echo"),
        ({"prompt": ""}, "prompt", "prompt: has no token"),
        ({"prompt": [-1]}, "prompt", "prompt has a token beyond 0 to 319"),
        ({"prompt": [[1], 2]}, "prompt", "prompt must be text, a list of token ids, or a list of either"),
        ({"prompt": [5] * 125}, "prompt", "prompt: 125 tokens, and 6 for the answer, are more than the 128 that"),
        ({"prompt": "\ud800"}, "prompt", "prompt has half a surrogate pair, which is no text"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream: true"),
        ({"messages": TALK}, "messages", "'messages' is not a field that this server knows"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(server: Server, changes: dict[str, Any], param: str, says: str) -> None:
    status, body = server.post("/v1/completions", json.dumps(ASK | changes).encode())
    assert status == 400
    assert body["error"]["message"].startswith(says)
    assert "\n" not in body["error"]["message"]
    assert (body["error"]["param"], body["error"]["type"]) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"messages": []}, "messages must be a list of messages, each with role and content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content must be text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content has a part that is"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]}, "messages.0 has 'tool_calls'"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
        ({"tools": [{"type": "function"}]}, "tools is [{'type': 'function'}], which this server does not support"),
    ],
)
def test_what_is_wrong_in_a_conversation(server: Server, changes: dict[str, Any], says: str) -> None:
    given = {"model": "merged", "messages": TALK, "max_tokens": 2}
    status, body = server.post("/v1/chat/completions", json.dumps(given | changes).encode())
    assert (status, body["error"]["message"][: len(says)]) == (400, says)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}', b'{"n": 1, "n": 2}', b"9" * 5000],
)
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    status, answer = server.post("/v1/completions", body)
    assert status == 400
    assert answer["error"]["message"].startswith("the body ")


@pytest.mark.parametrize(
    "model", ["", "gpt-4", "../merged", "merged/../../etc/passwd", "merged-without-", "merged-without-../x", "m" * 5000]
)
def test_a_model_that_is_not_there_is_not_found(server: Server, model: str) -> None:
    status, body = server.post("/v1/completions", json.dumps(ASK | {"model": model}).encode())
    assert status == (404 if model else 400)
    assert len(body["error"]["message"]) < 300
    if model:
        assert body["error"]["code"] == "model_not_found"
        assert "merged-without-A+B leaves out A and B, of code, old, sums" in body["error"]["message"]


def test_a_model_must_be_named(server: Server) -> None:
    status, body = server.post("/v1/completions", b'{"prompt": "a"}')
    assert (status, body["error"]["message"]) == (400, "model is missing; GET /v1/models lists what is served")


def test_other_addresses_methods_and_kinds(server: Server) -> None:
    assert server.get("/v1/nothing")[0] == server.get("/")[0] == server.get("/v1/models/../../etc/passwd")[0] == 404
    assert server.get("/v1/completions")[0] == 405
    status, body = server.post("/v1/completions", json.dumps(ASK).encode(), Content_Type="text/plain")
    assert (status, body["error"]["message"]) == (415, "send the header Content-Type: application/json")


def test_who_is_named_outside_the_body_is_not_ignored(server: Server) -> None:
    status, body = server.post("/v1/completions?without=code", json.dumps(ASK).encode())
    assert (status, body["error"]["message"]) == (400, "this address reads nothing behind '?'; say it in the body")


def test_an_address_with_a_slash_behind_it_leads_nowhere(server: Server) -> None:
    status, body = server.post("/v1/completions/", json.dumps(ASK).encode())
    assert (status, body["error"]["message"]) == (404, "there is no such address here")


def test_a_seed_and_its_negative_are_two(client: openai.OpenAI) -> None:
    texts = [choice.text for choice in complete(client, n=3, seed=-1, temperature=1, max_tokens=20).choices]
    assert len(set(texts)) == 3


def test_health_and_metrics(server: Server, client: openai.OpenAI) -> None:
    assert server.get("/health") == (200, b'{"status":"ok"}')
    before = figures(server)
    complete(client, model="merged-without-code")
    complete(client, prompt=[5, 6], stream=False)
    after = figures(server)
    moved = {name: after[name] - before.get(name, 0) for name in after}
    assert moved["flexctl_new_tokens_total"] == 12
    assert moved['flexctl_requests_total{endpoint="/v1/completions",status="200"}'] == 2
    assert moved['flexctl_left_out_total{expert="code"}'] == 1
    assert moved["flexctl_time_to_first_token_seconds_count"] == 2
    assert moved['flexctl_request_seconds_bucket{le="+Inf"}'] >= 2
    assert after["flexctl_running"] == after["flexctl_waiting"] == 0


def figures(server: Server) -> dict[str, float]:
    lines = server.get("/metrics")[1].decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_a_page_of_another_site_is_not_answered(server: Server) -> None:
    """Its name may lead here, but its requests bear it."""
    assert server.get("/health", host="evil.example")[0] == 403
    assert server.get("/health", host="evil.example:8000")[0] == 403
    assert server.get("/health", host="127.0.0.1:8000")[0] == server.get("/health", host="[::1]:80")[0] == 200
