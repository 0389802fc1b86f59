"""What of serving on vLLM needs no vLLM: names and fields become masks, what cannot carry one is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from builders import make_expert, make_world

import flexctl.engine.serve as command
from flexctl.bundle import open_merged, rights_of
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.serve import ServeConfig, serve
from flexctl.errors import FlexctlError, UsageError
from flexctl.options import options
from flexctl.serving.permits import Key, Permits
from flexctl.serving.refusing import Refused
from flexctl.serving.vllm import launch, plugin, refusals, web
from flexctl.serving.vllm.asking import Asked, read_asked
from flexctl.serving.vllm.check import check_masks
from flexctl.serving.vllm.masks import KEY, VARIABLE, Served, is_salted, mask_of, masked, salt, served
from flexctl.serving.vllm.rows import Rows
from flexctl.serving.vllm.web import Masks

ROOT = Path(__file__).parent.parent.parent
NAMES = ("public", "code", "law", "math")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("served")
    world = make_world(root, ("code", "law"))
    math_ = make_expert(root / "math.st", world.anchor, "math", purposes=("research",))
    files = (*world.files(), math_.path)
    made = merge(MergeConfig(experts=files, anchor=world.anchor.path, output=root / "merged"))
    assert made.digest is not None
    return Served(bundle=str(made.path), name="merged", digest=made.digest, num_experts=4)


# Masks and salts.


@pytest.mark.parametrize(("left_out", "mask"), [((), ""), ((3,), "3"), ((10, 2, 10), "2,10")])
def test_masks_are_read_back(left_out: tuple[int, ...], mask: str) -> None:
    assert mask_of(left_out) == mask
    assert masked(mask) == tuple(sorted(set(left_out)))


def test_salts_are_apart_by_model_mask_and_client_and_fit_vllm() -> None:
    said = [(digest, mask, own) for digest in ("a", "b") for mask in ("", "1", "1,2", "12") for own in ("", "x", "y")]
    salts = {salt(*each) for each in said}
    assert len(salts) == len(said)
    assert all(len(found) <= 128 and not set(found) & set("@/\\\0") for found in salts)
    for digest, mask, own in said:
        assert is_salted(salt(digest, mask, own), digest, mask)
        assert not is_salted(salt(digest, mask, own), digest, mask + "3")
    assert not is_salted(None, "a", "")


def test_the_server_is_told_by_one_variable(model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert served() is None
    for name, value in model.environment().items():
        monkeypatch.setenv(name, value)
    assert served() == model


# Rows.


def shown(rows: Rows, count: int) -> list[list[float]]:
    table: torch.Tensor = rows.table(16, 3, torch.device("cpu"))[:count]
    return table.tolist()


NO, OFF = 0.0, -math.inf


def test_each_token_has_its_request_s_row() -> None:
    rows = Rows()
    where = rows.table(16, 3, torch.device("cpu")).data_ptr()
    rows.fill(["1", "", "1,2"], [2, 1, 1])
    assert shown(rows, 4) == [[NO, OFF, NO], [NO, OFF, NO], [NO, NO, NO], [NO, OFF, OFF]]
    rows.fill(["", "2"], [1, 2])
    assert shown(rows, 3) == [[NO, NO, NO], [NO, NO, OFF], [NO, NO, OFF]]
    assert rows.table(16, 3, torch.device("cpu")).data_ptr() == where


def test_a_batch_without_masks_leaves_nothing_behind_for_a_longer_one() -> None:
    rows = Rows()
    rows.table(16, 3, torch.device("cpu"))
    rows.fill(["1"], [9])
    rows.fill([""], [2])
    rows.fill(["", ""], [4, 5])
    assert shown(rows, 16) == [[NO] * 3] * 16


def test_a_mask_without_a_router_to_take_it_is_an_error() -> None:
    rows = Rows()
    rows.fill(["", ""], [3, 4])
    with pytest.raises(RuntimeError, match="no router of this model takes one"):
        rows.fill(["", "1"], [3, 4])


def test_routers_of_different_sizes_are_an_error() -> None:
    rows = Rows()
    rows.table(16, 3, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="of 3 and of 4 experts"):
        rows.table(16, 4, torch.device("cpu"))


# The command line.


def test_flags_are_vllm_s_and_what_is_ours_comes_last(model: Served) -> None:
    line = launch.command_line(model, "127.0.0.1", 8000, "float32", ["--max-model-len", "64"])
    said = dict(zip(line[::2], line[1::2], strict=True))
    assert [*said][:4] == ["--allowed-origins", "--shutdown-timeout", "--max-model-len", "--model"]
    assert said["--model"] == model.bundle
    assert said["--served-model-name"] == "merged"
    assert (said["--host"], said["--port"], said["--dtype"]) == ("127.0.0.1", "8000", "float32")
    assert json.loads(said["--additional-config"]) == {"flexctl": model.digest}


@pytest.mark.parametrize(
    "flag",
    [
        "--model=x",
        "--served-model-name",
        "--host",
        "--port=1",
        "--config",
        "--additional_config.a=1",
        "--api-key",
        "--dtype",
    ],
)
def test_flags_that_are_flexctl_s_to_give_are_refused(flag: str) -> None:
    with pytest.raises(UsageError, match="is flexctl's to give") as caught:
        refusals.refuse_flags(["--max-model-len", "64", flag])
    assert caught.value.field == "engine_flags"


@pytest.mark.parametrize(
    ("now", "plugins"), [({}, None), ({"VLLM_PLUGINS": ""}, "flexctl"), ({"VLLM_PLUGINS": "a,b"}, "a,b,flexctl")]
)
def test_the_plugin_is_let_in_and_nothing_is_sent_home(model: Served, now: dict[str, str], plugins: str | None) -> None:
    said = launch.environment(model, now)
    assert said.get("VLLM_PLUGINS") == plugins
    assert said["VLLM_NO_USAGE_STATS"] == "1"
    assert json.loads(said[VARIABLE])["digest"] == model.digest


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("Engine core initialization failed.\nSee above."), "Engine core initialization failed."),
        (RuntimeError(), "RuntimeError"),
        (
            ValueError(
                "1 validation error for VllmConfig\n  Value error, V2 needs Triton [type=value_error, input=1]\n"
            ),
            "V2 needs Triton",
        ),
    ],
)
def test_why_vllm_failed_is_one_line(error: BaseException, says: str) -> None:
    assert launch.reason(error) == says


@pytest.mark.parametrize("version", ["0.32.0", "0.32.9+cpu"])
def test_releases_that_the_tests_ran_pass(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_installed", lambda: version)
    refusals.refuse_release()


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (None, "vLLM is not installed here"),
        ("0.28.0", "this is vLLM 0.28.0; masks were tested with 0.32 alone"),
        ("0.320.0", "this is vLLM 0.320.0; masks were tested with 0.32 alone"),
        ("1.0", "this is vLLM 1.0; masks were tested with 0.32 alone"),
    ],
)
def test_other_releases_are_refused(version: str | None, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_installed", lambda: version)
    with pytest.raises(UsageError, match="vLLM") as caught:
        refusals.refuse_release()
    assert caught.value.message == f"engine: {says}"
    assert "pip install 'vllm==0.32.*'" in str(caught.value.hint)


def config(**changes: Any) -> SimpleNamespace:
    parallel = {"use_sequence_parallel_moe": False, "use_ubatching": False, "enable_eplb": False}
    parallel |= {"data_parallel_size": 1, **{key: changes.pop(key) for key in list(changes) if key in parallel}}
    parallel |= {key: changes.pop(key) for key in list(changes) if key == "data_parallel_size"}
    rest = dict.fromkeys(("speculative_config", "lora_config", "quant_config", "kv_transfer_config"))
    embeds = changes.pop("enable_prompt_embeds", False)
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        model_config=SimpleNamespace(enable_prompt_embeds=embeds),
        **{**rest, **changes},
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_sequence_parallel_moe": True}, "sequence-parallel experts"),
        ({"use_ubatching": True}, "micro-batches"),
        ({"enable_eplb": True}, "experts that move"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA adapters"),
        ({"quant_config": object()}, "quantised weights"),
        ({"kv_transfer_config": object()}, "caches outside vLLM"),
        ({"enable_prompt_embeds": True}, "prompts of embeddings"),
    ],
)
def test_what_cannot_carry_a_mask_is_refused(changes: dict[str, Any], says: str) -> None:
    refusals.refuse_config(config())
    with pytest.raises(UsageError, match=f"masks of experts do not go with .*{says}"):
        refusals.refuse_config(config(**changes))


def test_beside_flexctl_vllm_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked: the plugin does nothing, and costs neither torch nor vLLM. Nor does flexctl need vLLM."""
    code = (
        "import sys; from flexctl.serving.vllm.plugin import register; register(); "
        "assert not {'torch', 'vllm', 'numpy', 'typer'} & set(sys.modules); "
        "import flexctl.engine.serve; assert not {'torch', 'vllm', 'starlette', 'uvicorn'} & set(sys.modules)"
    )
    monkeypatch.delenv(VARIABLE, raising=False)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asked_for_the_plugin_refuses_another_release(model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, model.environment()[VARIABLE])
    monkeypatch.setattr(refusals, "_installed", lambda: "0.99.0")
    monkeypatch.setattr(plugin, "_registered", False)
    with pytest.raises(UsageError, match=r"this is vLLM 0\.99\.0"):
        plugin.register()


# What requests ask for.

KNOWN = frozenset(("model", "prompt", "messages", "vllm_xargs", "cache_salt", "use_beam_search", "kv_transfer_params"))


def read(model: Served, body: Mapping[str, Any], key: Key | None = None) -> Asked:
    merged = open_merged(Path(model.bundle))
    permits = Permits("merged", NAMES, rights_of(merged), () if key is None else (key,))
    return read_asked(json.dumps(body).encode(), KNOWN, model, permits, key)


@pytest.mark.parametrize(
    ("body", "mask"),
    [
        ({"model": "merged"}, ""),
        ({"model": "merged-without-law"}, "2"),
        ({"model": "merged-without-math+code"}, "1,3"),
        ({"model": "merged", "without": ["law"]}, "2"),
        ({"model": "merged-without-code", "without": ["law", "law"]}, "1,2"),
        ({"model": "merged", "only": ["law"]}, "1,3"),
        ({"model": "merged", "without": None, "only": None, "purpose": None, "vllm_xargs": None}, ""),
        ({"model": "merged", "purpose": "sale"}, "3"),
        ({"model": "merged", "purpose": "sale", "only": ["law", "math"]}, "1,3"),
        ({"model": "merged", "vllm_xargs": {"without": ["law"]}}, "2"),
        ({"model": "merged", "vllm_xargs": {"purpose": "sale"}, "without": ["law"]}, "2,3"),
    ],
)
def test_requests_become_masks(model: Served, body: dict[str, Any], mask: str) -> None:
    asked = read(model, {**body, "prompt": "x", "cache_salt": "mine", "user": "me"})
    told = json.loads(asked.body)
    assert told == {
        "model": "merged",
        "prompt": "x",
        "user": "me",
        "vllm_xargs": {KEY: mask},
        "cache_salt": salt(model.digest, mask, "mine"),
    }
    without = sorted(NAMES[index] for index in masked(mask))
    account = asked.account(model)
    assert account["without"] == without == sorted(account["reasons"])
    assert account["experts"] == [name for name in NAMES if name not in without]
    assert account["digest"] == model.digest
    assert asked.model(model) == ("merged-without-" + "+".join(without) if without else "merged")


def test_a_key_leaves_out_what_it_may_not_use(model: Served) -> None:
    key = Key(name="school", sha256="0" * 64, experts=("law",))
    asked = read(model, {"model": "merged-without-law"}, key)
    assert json.loads(asked.body)["vllm_xargs"] == {KEY: "1,2,3"}
    assert asked.account(model)["reasons"]["code"] == "this key may not use it"


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({}, 400, "model", "model is missing"),
        ({"model": ["merged"]}, 400, "model", "it must be text"),
        ({"model": "other"}, 404, "model", "'other' is not served here"),
        ({"model": "merged-without-nobody"}, 404, "model", "'nobody' is no expert of it"),
        ({"model": "merged-without-public"}, 404, "model", "the public expert cannot be left out"),
        ({"model": "merged", "without": ["nobody"]}, 400, "without", "'nobody' is not in merged"),
        ({"model": "merged", "without": ["public"]}, 400, "without", "the public expert cannot be left out"),
        ({"model": "merged", "without": []}, 400, "without", "without is empty"),
        ({"model": "merged", "without": "law"}, 400, "without", "it must be a list of experts' names"),
        ({"model": "merged", "only": []}, 400, "only", "only is empty"),
        ({"model": "merged", "purpose": ["sale"]}, 400, "purpose", "it must be text"),
        ({"model": "merged", "witout": ["law"]}, 400, "witout", "'witout' is not a field that this server knows"),
        ({"model": "merged", KEY: ""}, 400, KEY, "is not a field that this server knows"),
        ({"model": "merged", "vllm_xargs": {KEY: ""}}, 400, "vllm_xargs", "without, only, purpose alone"),
        ({"model": "merged", "vllm_xargs": {"witout": ["law"]}}, 400, "vllm_xargs", "without, only, purpose alone"),
        ({"model": "merged", "vllm_xargs": []}, 400, "vllm_xargs", "must be an object"),
        ({"model": "merged", "vllm_xargs": {"without": "law"}}, 400, "without", "it must be a list of experts' names"),
        ({"model": "merged", "without": ["law"], "vllm_xargs": {"without": ["code"]}}, 400, "without", "twice"),
        ({"model": "merged", "use_beam_search": True}, 400, "use_beam_search", "cannot carry a mask"),
        ({"model": "merged", "kv_transfer_params": {"a": 1}}, 400, "kv_transfer_params", "cannot carry a mask"),
        ({"model": "merged", "cache_salt": 3}, 400, "cache_salt", "must be text that is not empty"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(
    model: Served, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    with pytest.raises(Refused) as caught:
        read(model, body)
    assert (caught.value.status, caught.value.param) == (status, param)
    assert says in caught.value.message


# Before vLLM's application.

STREAM = [
    b'data: {"id":"1","model":"merged","choices":[{"text":"data: {\\"model\\":\\"merged\\""'
    b',"finish_reason":null}]}\n\n',
    b'data: {"id":"1","model":"merged","choices":[{"text":"\\"finish_reason\\":null","finish_reason":"stop"}]}\n\n',
    b'data: {"id":"1","model":"merged","choices":[]}\n\ndata: [DONE]\n\n',
]


def application(heard: list[Any], parts: Sequence[bytes], kind: bytes, status: int = 200) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        heard.append((scope, (await receive())["body"] if scope["method"] == "POST" else b""))
        headers = [(b"content-type", kind), (b"content-length", str(sum(map(len, parts))).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for number, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": number + 1 < len(parts)})

    return app


def ask(
    app: Any,
    path: str,
    body: bytes | Mapping[str, Any] = b"",
    method: str = "POST",
    headers: Mapping[bytes, bytes] | None = None,
) -> tuple[int, dict[bytes, bytes], bytes]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent: list[Any] = []
    halves = [content[: len(content) // 2], content[len(content) // 2 :]]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": halves.pop(0), "more_body": bool(halves)}

    async def send(message: Any) -> None:
        sent.append(message)

    said = {
        b"content-length": b"1",
        b"content-type": b"application/json",
        b"host": b"localhost:8000",
        **(headers or {}),
    }
    scope = {"type": "http", "method": method, "path": path, "headers": [*said.items()]}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(message["body"] for message in sent[1:])


@pytest.fixture
def asked_for(model: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv(VARIABLE, model.environment()[VARIABLE])
    monkeypatch.setattr(web, "_known", lambda _: KNOWN)
    return model


@pytest.mark.usefixtures("asked_for")
def test_an_answer_has_the_name_of_who_gave_it() -> None:
    heard: list[Any] = []
    whole = b'{"id":"1","model":"merged","choices":[{"text":"\\"model\\":\\"merged\\""}]}'
    app = Masks(application(heard, [whole[:9], whole[9:]], b"application/json"))
    status, headers, body = ask(app, "/v1/completions", {"model": "merged-without-law", "prompt": "x"})
    said = json.loads(body)
    assert status == 200
    assert headers[b"content-length"] == str(len(body)).encode()
    assert (said["model"], said["flexctl"]["without"]) == ("merged-without-law", ["law"])
    assert said["choices"] == json.loads(whole)["choices"]
    scope, told = heard[0]
    assert json.loads(told)["vllm_xargs"] == {KEY: "2"}
    assert dict(scope["headers"])[b"content-length"] == str(len(told)).encode()
    assert len(scope["headers"]) == 3


@pytest.mark.usefixtures("asked_for")
def test_so_has_every_piece_of_a_stream() -> None:
    app = Masks(application([], STREAM, b"text/event-stream; charset=utf-8"))
    _, _, body = ask(app, "/v1/chat/completions", {"model": "merged-without-code+law", "messages": []})
    *pieces, last, _ = body.split(b"\n\n")
    assert last == b"data: [DONE]"
    said = [json.loads(piece.removeprefix(b"data: ")) for piece in pieces]
    assert [piece["model"] for piece in said] == ["merged-without-code+law"] * 3
    assert "flexctl" not in said[0]
    assert [piece["flexctl"]["without"] for piece in said[1:]] == [["code", "law"]] * 2
    assert said[0]["choices"][0]["text"] == 'data: {"model":"merged"'


@pytest.mark.usefixtures("asked_for")
def test_what_vllm_refuses_is_sent_on_as_it_is() -> None:
    app = Masks(application([], [b'{"error":{"message":"no"}}'], b"application/json", status=400))
    assert ask(app, "/v1/completions", {"model": "merged"})[::2] == (400, b'{"error":{"message":"no"}}')


@pytest.mark.usefixtures("asked_for")
@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", {"model": "merged-without-nobody"}, 404, "'nobody' is no expert"),
        ("/v1/completions", {"model": "merged", "without": ["nobody"]}, 400, "holds public, code, law, math"),
        ("/v1/completions", b"[]", 400, "must be a JSON object"),
        ("/v1/completions", b"[" * 100_000, 400, "nested too deeply"),
        ("/v1/completions", b'{"model": "merged", "model": "merged"}', 400, "stands there twice"),
        ("/v1/completions", b" " * (5 * 2**20), 413, "more than"),
        ("/v1/responses", {"model": "merged"}, 404, "there is no such address here"),
        ("/inference/v1/generate", {}, 404, "there is no such address here"),
        ("/invocations", {}, 404, "there is no such address here"),
        ("/v1/completions/", {"model": "merged"}, 404, "there is no such address here"),
        ("/health", {}, 404, "there is no such address here"),
    ],
)
def test_refusals_never_reach_vllm(path: str, body: Any, status: int, says: str) -> None:
    heard: list[Any] = []
    got, _, content = ask(Masks(application(heard, [b"{}"], b"application/json")), path, body)
    assert got == status
    assert says in json.loads(content)["error"]["message"]
    assert not heard


def test_a_server_of_this_machine_answers_to_its_names_alone(
    asked_for: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Any] = []
    app = Masks(application(heard, [b"{}"], b"application/json"))
    assert ask(app, "/health", method="GET", headers={b"host": b"evil.example"})[0] == 403
    assert not heard
    monkeypatch.setenv(VARIABLE, dataclasses.replace(asked_for, is_local=False).environment()[VARIABLE])
    app = Masks(application(heard, [b"{}"], b"application/json"))
    assert ask(app, "/health", method="GET", headers={b"host": b"models.example"})[0] == 200


def test_keys_are_asked_for_before_anything_is_told(
    asked_for: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"open sesame").hexdigest()
    (tmp_path / "keys.toml").write_text(f'[school]\nsha256 = "{digest}"\nexperts = ["law"]\n')
    keyed = dataclasses.replace(asked_for, api_keys=str(tmp_path / "keys.toml"))
    monkeypatch.setenv(VARIABLE, keyed.environment()[VARIABLE])
    heard: list[Any] = []
    app = Masks(application(heard, [b'{"id":"1","model":"merged"}'], b"application/json"))
    for path, method in (("/v1/models", "GET"), ("/v1/completions", "POST"), ("/tokenize", "POST"), ("/docs", "GET")):
        assert ask(app, path, {"model": "merged"}, method)[0] == 401
    assert not heard
    assert ask(app, "/metrics", method="GET")[0] == ask(app, "/v1/completions", method="OPTIONS")[0] == 200
    mine = {b"authorization": b"Bearer open sesame"}
    _, _, body = ask(app, "/v1/completions", {"model": "merged"}, headers=mine)
    assert json.loads(body)["model"] == "merged-without-code+math"


def test_models_are_listed_with_each_single_removal(asked_for: Served) -> None:
    app = Masks(application([], [b"{}"], b"application/json"))
    _, _, body = ask(app, "/v1/models", method="GET")
    found = {row["id"]: row["flexctl"]["without"] for row in json.loads(body)["data"]}
    assert found == {"merged": []} | {f"merged-without-{name}": [name] for name in NAMES[1:]}
    status, _, body = ask(app, "/v1/models/merged-without-law+code", method="GET")
    assert (status, json.loads(body)["flexctl"]["experts"]) == (200, ["public", "math"])
    assert ask(app, "/v1/models/other", method="GET")[0] == 404
    assert asked_for.digest == json.loads(body)["flexctl"]["digest"]


def test_nobody_else_may_put_it_before_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(UsageError, match="only `flexctl serve` puts"):
        Masks(application([], [], b""))


# The check at start.


class Invalid(Exception):
    """Stands for vLLM's own."""


class Engine:
    """As vLLM's engine client: experts whose shares and words are numbers, and what may be wrong with their masks."""

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.words = [0.5, -0.3, 0.8, 0.1]
        self.running = 0
        self.model_config = SimpleNamespace(max_model_len=64, get_vocab_size=lambda: 100)

    async def collective_rpc(self, method: str, args: tuple[int]) -> list[int]:
        assert method == "flexctl_negate"
        if self.wrong == "nobody has it":
            return [0, 0]
        self.words[args[0]] *= -1
        return [1, 1]

    async def generate(self, prompt: Any, params: Any, _number: str) -> Any:
        if params.extra_args is None and self.wrong != "answers without":
            raise Invalid
        mask = (params.extra_args or {}).get(KEY, "")
        assert is_salted(prompt["cache_salt"], "sha256:1", mask)
        self.running += 1
        await asyncio.sleep(0)
        out = set(masked(mask))
        if self.wrong == "masks nothing":
            out = set()
        if self.wrong == "forgets law":
            out -= {2}
        if self.wrong == "off by one":
            out = {(index + 1) % 4 for index in out}
        if self.wrong == "rows of a batch" and self.running > 1:
            out = {0, 1, 2}
        scores = [0 if index in out else 1 / (2 + index) for index in range(4)]
        if self.wrong == "leaks a little":
            scores = [score or 1e-3 for score in scores]
        value = sum(score * word for score, word in zip(scores, self.words, strict=True)) / sum(scores)
        self.running -= 1
        ids = prompt["prompt_token_ids"]
        rows = [{token: SimpleNamespace(logprob=value - place)} for place, token in enumerate(ids)]
        new = SimpleNamespace(token_ids=[5], logprobs=[{5: SimpleNamespace(logprob=value)}])
        yield SimpleNamespace(prompt_logprobs=[None, *rows[1:]], outputs=[new])


@pytest.fixture
def vllm_names(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = ModuleType("vllm.exceptions")
    exceptions.VLLMValidationError = Invalid  # type: ignore[attr-defined]
    package = ModuleType("vllm")
    package.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)


SMALL = Served(bundle="merged", name="merged", digest="sha256:1", num_experts=4)


@pytest.mark.usefixtures("vllm_names")
def test_masks_that_hold_pass_and_weights_are_as_they_were() -> None:
    engine = Engine()
    asyncio.run(check_masks(engine, SMALL, NAMES))
    assert engine.words == [0.5, -0.3, 0.8, 0.1]


@pytest.mark.usefixtures("vllm_names")
def test_the_public_expert_alone_has_nobody_to_leave_out() -> None:
    asyncio.run(check_masks(Engine("nobody has it"), dataclasses.replace(SMALL, num_experts=1), NAMES[:1]))


@pytest.mark.usefixtures("vllm_names")
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("masks nothing", "weights still move the answer"),
        ("forgets law", "with law left out its weights still move the answer"),
        ("off by one", "move the answer"),
        ("leaks a little", "weights still move the answer"),
        ("rows of a batch", "requests of one batch move each other"),
        ("answers without", "does not say who may answer"),
        ("nobody has it", "no worker holds expert 0"),
    ],
)
def test_masks_that_do_not_hold_are_refused(wrong: str, says: str) -> None:
    with pytest.raises(FlexctlError, match=says):
        asyncio.run(check_masks(Engine(wrong), SMALL, NAMES))


# The command.


@pytest.fixture
def vllm_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "require_vllm", lambda: None)


@pytest.mark.usefixtures("in_empty_folder", "vllm_is_here")
@pytest.mark.parametrize(
    ("settings", "field", "hint"),
    [
        ({"max_batch": 3}, "max_batch", "give vLLM --max-num-seqs behind --"),
        ({"max_context": 32}, "max_context", "give vLLM --max-model-len behind --"),
        ({"explain": True}, "explain", "leave it out"),
        ({"threads": 1}, "threads", "leave it out"),
        ({"engine_flags": ("--port", "1")}, "engine_flags", "leave it out"),
        ({"bundle": Path("--enforce-eager")}, "bundle", "name the bundle, then --, then vLLM's flags"),
        ({"engine": "own", "engine_flags": ("--enforce-eager",)}, "engine_flags", "say `engine` vllm, or leave it out"),
    ],
)
def test_what_the_other_engine_takes_is_refused(model: Served, settings: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        serve(ServeConfig(**{"bundle": Path(model.bundle), "engine": "vllm", "port": 0, **settings}))
    assert (caught.value.field, caught.value.hint) == (field, hint)


@pytest.mark.usefixtures("in_empty_folder", "vllm_is_here")
@pytest.mark.parametrize(("what", "says"), [("anchor", "is an anchor"), ("experts/law.st", "is an expert")])
def test_what_is_not_merged_is_refused(model: Served, what: str, says: str) -> None:
    root = Path(model.bundle).parent
    with pytest.raises(UsageError, match=f"{says}, and vLLM serves merged models") as caught:
        serve(ServeConfig(bundle=root / what, anchor=root / "anchor", engine="vllm", port=0))
    assert "flexctl merge" in str(caught.value.hint)


@pytest.mark.usefixtures("in_empty_folder")
def test_without_vllm_the_engine_is_refused(model: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_installed", lambda: None)
    with pytest.raises(UsageError, match="vLLM is not installed here"):
        serve(ServeConfig(bundle=Path(model.bundle), engine="vllm", port=0))


def test_every_option_is_both_engines_or_refused_by_one() -> None:
    """Whoever adds one to our own server says what vLLM does about it."""
    both = {"bundle", "engine_flags", "engine", "host", "port", "name", "api_keys", "anchor", "dtype"}
    assert both | command._INSTEAD.keys() == {option.field for option in options(ServeConfig)}
    assert not both & command._INSTEAD.keys()


def test_flexctl_that_is_not_installed_is_not_seen_by_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_installed", lambda: "0.32.0")
    monkeypatch.setattr(refusals.metadata, "entry_points", lambda **_: ())
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(UsageError, match="runs from a folder and is not installed"):
        refusals.require_vllm()


def test_a_key_of_vllm_s_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_installed", lambda: "0.32.0")
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(UsageError, match="VLLM_API_KEY is vLLM's own"):
        refusals.require_vllm()


def test_the_entry_point_is_the_plugin() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    assert f'{refusals.PLUGIN} = "{plugin.__name__}:{plugin.register.__name__}"' in declared
