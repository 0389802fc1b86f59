"""vLLM with masks: every answer is that of the checkpoint from which those experts were removed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from merged_models import MASKS, NAMES, TOP_K, Continued, continued, make_merged, make_prompts, removed
from vllm_server import Server

from flexctl.bundle import model_name, open_merged

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

NEW_TOKENS = 40
CLOSE = 1e-5

# Steps of 64 tokens cut prefills into chunks; 12 blocks of 32 tokens are too few for eight requests at once.
SMALL = ("--enforce-eager", "--max-num-batched-tokens", "64", "--max-num-seqs", "8")
CROWDED = (*SMALL, "--block-size", "32", "--num-gpu-blocks-override", "12")


def flexctl(bundle: Path) -> tuple[str, ...]:
    return ("-m", "flexctl", "serve", str(bundle), "--engine", "vllm")


class World(NamedTuple):
    merged: Path
    server: Server
    client: Any

    def ask(self, mask: Sequence[str], prompt: Sequence[int], echo: bool = False, **more: Any) -> Any:
        extra = {"return_token_ids": True, "ignore_eos": True, **more.pop("extra_body", {})}
        return self.client.completions.create(
            model=model_name("merged", mask),
            prompt=list(prompt),
            max_tokens=NEW_TOKENS,
            temperature=0,
            logprobs=1,
            echo=echo,
            extra_body=extra,
            **more,
        )


@pytest.fixture(scope="module", params=TOP_K)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp(request.param)
    merged = make_merged(root, request.param)
    with Server(root / "server.log", flexctl(merged), ("--", *CROWDED)) as server:
        yield World(merged, server, server.client())


@cache
def stock(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


@cache
def expected(merged: Path, mask: tuple[str, ...], prompt: tuple[int, ...]) -> Continued:
    return continued(stock(removed(merged, mask)), prompt, NEW_TOKENS)


def distance(found: Sequence[float], right: Sequence[float]) -> float:
    assert len(found) == len(right)
    return max(abs(a - b) for a, b in zip(found, right, strict=True))


def hold(merged: Path, mask: tuple[str, ...], prompt: Sequence[int], answer: Any, echo: bool) -> None:
    right = expected(merged, mask, tuple(prompt))
    (choice,) = answer.choices
    found = choice.logprobs.token_logprobs
    assert choice.token_ids == right.tokens, mask
    assert distance(found[-NEW_TOKENS:], right.output) < CLOSE, mask
    if echo:
        assert distance(found[1 : len(prompt)], right.prompt) < CLOSE, mask
    assert answer.model == model_name("merged", mask)
    assert answer.flexctl["without"] == sorted(mask)
    assert answer.flexctl["digest"] == open_merged(merged).digest


def test_each_mask_is_the_removed_checkpoint_mixed_in_one_batch(world: World) -> None:
    asked = [(mask, prompt) for prompt in make_prompts(5) for mask in MASKS]
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda pair: world.ask(*pair, echo=True), asked))
    for (mask, prompt), answer in zip(asked, answers, strict=True):
        hold(world.merged, mask, prompt, answer, echo=True)
    assert world.server.count("num_preemptions_total") > 0


def test_masks_matter(world: World) -> None:
    """Else the comparison above would hold for a server that leaves nobody out."""
    (prompt,) = make_prompts(1)
    full = expected(world.merged, (), tuple(prompt)).prompt
    assert all(distance(expected(world.merged, mask, tuple(prompt)).prompt, full) > 100 * CLOSE for mask in MASKS[1:])


def test_the_prefix_cache_is_kept_apart_by_mask(world: World) -> None:
    prompts = make_prompts(2, seed=1, shortest=70)
    asked = [(mask, prompt) for prompt in prompts for mask in MASKS] * 2
    before = world.server.count("prefix_cache_hits_total")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda pair: world.ask(*pair), asked))
    for (mask, prompt), answer in zip(asked, answers, strict=True):
        hold(world.merged, mask, prompt, answer, echo=False)
    for mask, prompt in asked[:2]:
        hold(world.merged, mask, prompt, world.ask(mask, prompt), echo=False)
        hold(world.merged, mask, prompt, world.ask(mask, prompt), echo=False)
    assert world.server.count("prefix_cache_hits_total") > before


def test_clients_that_hang_up_take_nothing_with_them(world: World) -> None:
    prompts = make_prompts(6, seed=2)

    def leave(pair: tuple[tuple[str, ...], list[int]]) -> None:
        mask, prompt = pair
        with world.ask(mask, prompt, stream=True) as stream:
            assert next(iter(stream)).model == model_name("merged", mask)

    asked = list(zip(MASKS, prompts, strict=True))
    with ThreadPoolExecutor(12) as pool:
        for done in [pool.submit(leave, pair) for pair in asked]:
            done.result()
        answers = list(pool.map(lambda pair: world.ask(*pair), asked))
    for (mask, prompt), answer in zip(asked, answers, strict=True):
        hold(world.merged, mask, prompt, answer, echo=False)
    assert world.server.count("num_requests_running") == 0


def test_a_streamed_answer_is_the_whole_one(world: World) -> None:
    (prompt,) = make_prompts(1, seed=3)
    stream = list(world.ask(("law",), prompt, stream=True))
    assert "".join(part.choices[0].text for part in stream) == world.ask(("law",), prompt).choices[0].text
    assert {part.model for part in stream} == {"merged-without-law"}
    assert stream[-1].flexctl["without"] == ["law"]


def test_several_answers_to_several_prompts_have_the_mask(world: World) -> None:
    prompts = make_prompts(2, seed=4)
    answer = world.client.completions.create(
        model="merged-without-code+math",
        prompt=prompts,
        n=2,
        max_tokens=NEW_TOKENS,
        extra_body={"return_token_ids": True, "ignore_eos": True, "top_k": 1},
    )
    found = [choice.token_ids for choice in answer.choices]
    right = [expected(world.merged, ("code", "math"), tuple(prompt)).tokens for prompt in prompts for _ in range(2)]
    assert found == right


@pytest.mark.parametrize(
    ("said", "mask"),
    [
        ({"without": ["law"]}, ("law",)),
        ({"without": ["law", "code", "law"]}, ("code", "law")),
        ({"only": ["law"]}, ("code", "math")),
        ({"purpose": "commercial"}, ("law",)),
        ({"purpose": "research"}, ()),
        ({"vllm_xargs": {"without": ["math"]}}, ("math",)),
        ({"vllm_xargs": {"only": ["math", "code"]}}, ("law",)),
        ({"without": ["code"], "vllm_xargs": {"purpose": "sale"}}, ("code", "law")),
    ],
)
def test_masks_by_field_are_those_by_name(world: World, said: Mapping[str, Any], mask: tuple[str, ...]) -> None:
    (prompt,) = make_prompts(1, seed=5)
    right = expected(world.merged, mask, tuple(prompt)).tokens
    answer = world.ask((), prompt, extra_body=said)
    assert answer.choices[0].token_ids == right
    assert answer.flexctl["without"] == list(mask)


def test_a_conversation_has_the_mask(world: World) -> None:
    def say(mask: Sequence[str]) -> Any:
        return world.client.chat.completions.create(
            model=model_name("merged", mask),
            messages=[{"role": "user", "content": "def value"}],
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )

    for mask in MASKS:
        answer = say(mask)
        prompt = tuple(answer.prompt_token_ids)
        assert answer.choices[0].token_ids == expected(world.merged, mask, prompt).tokens
        assert answer.flexctl["without"] == sorted(mask)


def test_every_single_removal_is_listed(world: World) -> None:
    names = [model.id for model in world.client.models.list()]
    assert names == ["merged", *(f"merged-without-{name}" for name in NAMES)]
