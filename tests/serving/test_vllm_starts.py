"""vLLM with masks: what starts, what does not, and vLLM beside flexctl when nobody asks for masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers
from merged_models import MASKS, Continued, continued, make_merged, make_prompts, removed
from vllm_server import ROOT, Server, run

from flexctl.bundle import model_name

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("one_thread")]

NEW_TOKENS = 12
CLOSE = 1e-5


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_merged(tmp_path_factory.mktemp("llama"), "llama")


def flexctl(bundle: Path, *settings: str) -> tuple[str, ...]:
    return ("-m", "flexctl", "serve", str(bundle), "--engine", "vllm", *settings)


def ask(server: Server, mask: tuple[str, ...], prompt: list[int]) -> Any:
    answer = server.client().completions.create(
        model=model_name("merged", mask),
        prompt=prompt,
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=1,
        echo=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    return answer.choices[0]


def right(merged: Path, mask: tuple[str, ...], prompts: list[list[int]]) -> list[Continued]:
    model = transformers.AutoModelForCausalLM.from_pretrained(removed(merged, mask), dtype="float32").eval()
    return [continued(model, prompt, NEW_TOKENS) for prompt in prompts]


def answers(server: Server, merged: Path, mask: tuple[str, ...]) -> list[tuple[float, bool]]:
    """For each prompt: how far log probabilities are from the removed checkpoint's, and whether tokens are its own."""
    prompts, found = make_prompts(3), []
    for prompt, expected in zip(prompts, right(merged, mask, prompts), strict=True):
        choice = ask(server, mask, prompt)
        pairs = zip(choice.logprobs.token_logprobs[1:], [*expected.prompt, *expected.output], strict=True)
        found.append((max(abs(a - b) for a, b in pairs), choice.token_ids == expected.tokens))
    return found


def must_hold(server: Server, merged: Path) -> None:
    for mask in MASKS:
        for far, is_same in answers(server, merged, mask):
            assert far < CLOSE, mask
            assert is_same, mask


def test_compiled_beside_a_stock_server_s_compiled_graphs(merged: Path, tmp_path: Path) -> None:
    """A stock server starts first and leaves its graphs in the cache: they hold no masks, and are not loaded.

    It has flexctl installed, and is as it was: it answers, by all experts, and knows no masked name.
    """
    variables = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    command = ("-m", "vllm.entrypoints.openai.api_server", "--model", str(merged), "--dtype", "float32")
    with Server(tmp_path / "stock.log", command, ("--served-model-name", "merged"), variables) as stock:
        assert all(far < CLOSE and is_same for far, is_same in answers(stock, merged, ()))
        with pytest.raises(openai.NotFoundError):
            answers(stock, merged, ("law",))
    with Server(tmp_path / "masks.log", flexctl(merged), variables=variables) as server:
        must_hold(server, merged)
        status, said = server.stop()
    assert status == 0
    assert "each of 4 experts was left out and was alone" in server.log.read_text()
    assert f"new tokens  {len(MASKS) * 3 * NEW_TOKENS}\n" in said


def test_two_workers_share_the_masks(merged: Path, tmp_path: Path) -> None:
    flags = ("--", "--tensor-parallel-size", "2", "--enforce-eager")
    with Server(tmp_path / "log", flexctl(merged), flags, {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}) as server:
        must_hold(server, merged)


def test_in_bfloat16_masks_hold_within_rounding(merged: Path, tmp_path: Path) -> None:
    """Rounding turns near ties of routers around, so it is the mean that is near: that to all experts is far."""
    prompts = make_prompts(3, shortest=80)
    full = [each.prompt for each in right(merged, (), prompts)]
    with Server(tmp_path / "log", flexctl(merged, "--dtype", "bfloat16"), ("--", "--enforce-eager")) as server:
        for mask in MASKS[1:]:
            less = [each.prompt for each in right(merged, mask, prompts)]
            said = [ask(server, mask, prompt).logprobs.token_logprobs[1 : len(prompt)] for prompt in prompts]
            near, far = mean_distance(said, less), mean_distance(full, less)
            assert near < far / 3, (mask, near, far)


def mean_distance(some: list[list[float]], others: list[list[float]]) -> float:
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a, b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def test_who_asks_is_heard_as_by_our_own_server_and_what_is_under_way_is_finished(merged: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "log", flexctl(merged, "--name", "m"), ("--", "--enforce-eager")) as server:
        client = server.client()

        def say(model: str = "m", **extra: Any) -> Any:
            return client.completions.create(model=model, prompt="a", max_tokens=2, extra_body=extra)

        assert say("m-without-law").model == "m-without-law"
        for name in ("merged", "m-without-nobody", "m-without-public", "m-without-"):
            with pytest.raises(openai.NotFoundError, match="m"):
                say(name)
        refused: list[Mapping[str, Any]] = [
            {"without": ["nobody"]},
            {"without": ["public"]},
            {"without": []},
            {"only": []},
            {"witout": ["law"]},
            {"vllm_xargs": {"flexctl_mask": ""}},
            {"vllm_xargs": {"witout": ["law"]}},
            {"use_beam_search": True},
        ]
        for extra in refused:
            with pytest.raises(openai.BadRequestError):
                say(**extra)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="m", input="a")
        assert say().choices[0].text is not None
        stream = client.completions.create(
            model="m-without-law", prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(server.stop)
            *_, last = stream
            assert last.flexctl["without"] == ["law"]
            assert stopping.result()[0] == 0


def refused(command: tuple[str, ...], **variables: str) -> tuple[int, str]:
    """Run a server that does not start; return its exit code and the message of its error.

    vLLM has its say on stderr too, before it and as its processes end.
    """
    done = run(command, **variables)
    (error,) = [json.loads(line)["error"] for line in done.stderr.splitlines() if line.startswith('{"error"')]
    assert done.stdout == ""
    return done.returncode, error["message"]


@pytest.mark.parametrize(
    ("settings", "status", "says"),
    [
        (("--", "--enable-lora"), 2, "FLAG: masks of experts do not go with LoRA adapters"),
        (("--", "--no-such-flag"), 2, "FLAG: vLLM: unrecognized arguments: --no-such-flag"),
        (("--", "--model", "x"), 2, "FLAG: --model is flexctl's to give to vLLM"),
        (("--top-k", "1"), 2, "--top-k: is our own server's"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(
    settings: tuple[str, ...], status: int, says: str, merged: Path
) -> None:
    before = settings if "--" not in settings else ()
    behind = settings if "--" in settings else ()
    found, said = refused((*flexctl(merged, "--port", "0", "--json", *before), *behind))
    assert found == status
    assert said.startswith(says)


@pytest.mark.parametrize("what", ["anchor", "expert"])
def test_what_is_not_merged_is_refused(what: str, merged: Path) -> None:
    bundle = merged.parent / ("anchor" if what == "anchor" else "law.st")
    status, said = refused(flexctl(bundle, "--anchor", str(merged.parent / "anchor"), "--port", "0", "--json"))
    assert status == 2
    assert f"is an {what}, and vLLM serves merged models" in said


PLANT = """
def register():
    import os
    from flexctl.serving.vllm.rows import Rows
    if os.environ.get("FLEXCTL_SERVED_BY_VLLM"):
        Rows.fill = lambda self, masks, counts: None
"""


def test_the_check_at_start_catches_a_plugin_that_masks_nothing(merged: Path, tmp_path: Path) -> None:
    info = tmp_path / "planted-1.dist-info"
    info.mkdir()
    (tmp_path / "planted.py").write_text(PLANT)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nplanted = planted:register\n")
    command = (*flexctl(merged, "--port", "0", "--json"), "--", "--enforce-eager")
    status, said = refused(command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert status == 1
    assert said.startswith("vLLM does not leave experts out: with public left out its weights still move the answer")
