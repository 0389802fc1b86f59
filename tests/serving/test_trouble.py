"""Clients that hang up, are too many, too slow or hostile; keys; stopping."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apart
import openai
import pytest
from apart import Apart
from serving.running import Server, a_server, read_all, status_of

from flexctl.serving import Batcher

ASK = {"model": "merged", "prompt": "def value", "temperature": 0}


def until(holds: Callable[[], bool], timeout: float = 20) -> None:
    ends = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.fixture
def slow_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward pass takes a twentieth of a second more."""
    make = Batcher._pass

    def late(batcher: Batcher) -> None:
        time.sleep(0.05)
        make(batcher)

    monkeypatch.setattr(Batcher, "_pass", late)


def request(body: dict[str, Any], **headers: str) -> bytes:
    content = json.dumps(body).encode()
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}{''.join(lines)}Content-Length: {len(content)}\r\n\r\n".encode() + content


@pytest.mark.usefixtures("slow_passes")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_place(chatty: Path, stream: bool) -> None:
    with a_server(chatty, max_batch=1, max_queue=1) as server:
        with server.connect() as leaving:
            leaving.sendall(request(ASK | {"max_tokens": 100, "stream": stream}))
            until(lambda: server.batcher.running == 1)
        until(lambda: server.batcher.running == 0)
        assert server.batcher.new_tokens < 50
        with server.client() as client:
            assert client.completions.create(**ASK, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.usefixtures("slow_passes")
def test_past_the_queue_clients_are_told_to_come_again(chatty: Path) -> None:
    with a_server(chatty, max_batch=1, max_queue=1) as server, server.client() as client:
        taken = [client.completions.create(**ASK, max_tokens=40, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**ASK, max_tokens=2)
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.body["code"] == "queue_full"  # type: ignore[index]
        for stream in taken:
            stream.close()
        with server.client(max_retries=10) as patient:
            assert patient.completions.create(**ASK, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.usefixtures("slow_passes")
def test_an_answer_that_takes_too_long_ends_with_an_error(chatty: Path) -> None:
    with a_server(chatty, timeout_s=0.5) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match="longer than this server allows") as caught:
            client.completions.create(**ASK, max_tokens=100)
        assert caught.value.status_code == 504
        chunks = iter(client.completions.create(**ASK, max_tokens=100, stream=True))
        assert len([next(chunks) for _ in range(3)]) == 3
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(chunks)
        assert server.batcher.running == 0


def test_keys_decide_who_may_ask_and_who_answers(chatty: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    secrets = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("sk-all", "sk-some")}
    file.write_text(
        f'[all]\nsha256 = "{secrets["sk-all"]}"\n[some]\nsha256 = "{secrets["sk-some"]}"\nexperts = ["sums", "old"]\n'
    )
    with a_server(chatty, api_keys=file) as server:
        for key in ("sk-wrong", "sk-al", secrets["sk-all"]):
            for ask in (lambda c: c.completions.create(**ASK), lambda c: c.models.list()):
                with server.client(key) as client, pytest.raises(openai.AuthenticationError):
                    ask(client)
        with server.client("sk-all") as client:
            assert client.completions.create(**ASK, max_tokens=1).flexctl["without"] == []  # type: ignore[attr-defined]
        with server.client("sk-some") as client:
            answer = client.completions.create(**ASK, max_tokens=1)
            assert answer.flexctl["reasons"] == {"code": "this key may not use it"}  # type: ignore[attr-defined]
            assert answer.model == "merged-without-code"
            with pytest.raises(openai.PermissionDeniedError, match="this key may not use 'code'"):
                client.completions.create(**ASK, extra_body={"only": ["code"]})
        assert server.get("/health")[0] == 200
        assert server.post("/v1/completions", b"{}")[0] == 401


def test_a_body_that_is_too_large(server: Server) -> None:
    status, body = server.post("/v1/completions", b" " * ((4 << 20) + 1))
    assert (status, body["error"]["message"]) == (413, "the body has more than 4194304 bytes")


def test_a_flood_of_headers(server: Server) -> None:
    flood = b"".join(b"X-Header-%d: %s\r\n" % (i, b"a" * 1000) for i in range(100))
    answer = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood)
    assert status_of(answer) == 400
    assert b"Traceback" not in answer
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\r\n b\x00c\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /health\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
    ],
)
def test_what_is_no_request(server: Server, head: bytes) -> None:
    with server.connect() as found:
        found.settimeout(5)
        found.sendall(head)
        found.shutdown(1)
        answer = read_all(found)
    assert b"Traceback" not in answer
    assert not answer or status_of(answer) in (400, 415)
    assert not answer or json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"
    assert server.get("/health")[0] == 200


def test_a_body_that_breaks_off_behind_its_answer(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with server.connect() as found:
        found.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        answer = found.recv(65536)
        assert status_of(answer) == 415
        found.sendall(b"no length\r\n")
        assert b"HTTP/1.1" not in read_all(found)
    assert server.get("/health")[0] == 200
    assert not [record for record in caplog.records if record.name == "asyncio"]


def is_let_go(found: socket.socket) -> bool:
    try:
        return not found.recv(1)
    except ConnectionResetError:
        return True


def test_slow_clients_are_let_go(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.serving.listening._HEAD_S", 0.3)
    monkeypatch.setattr("flexctl.serving.exchange._BODY_S", 0.3)
    with a_server(chatty) as server:
        for begin in (b"", b"GET /health HT"):
            with server.connect() as silent:
                silent.sendall(begin)
                assert is_let_go(silent)
        with server.connect() as late:
            late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while b"ok" not in answer:
                answer += late.recv(65536)
            late.sendall(b"GET /hea")
            assert is_let_go(late)
        head = request(ASK).replace(b"Content-Length: ", b"Content-Length: 9")
        answer = server.raw(head)
        assert status_of(answer) == 408
        assert b"the body did not come within" in answer


@pytest.mark.usefixtures("slow_passes")
def test_a_slow_answer_is_not_a_slow_client(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.serving.listening._HEAD_S", 0.2)
    with a_server(chatty) as server, server.client() as client:
        assert client.completions.create(**ASK, max_tokens=12).usage.completion_tokens == 12


def test_a_server_that_breaks_tells_no_text(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("my secret text")

    with a_server(chatty) as server:
        monkeypatch.setattr("flexctl.serving.app.prepare", fail)
        status, body = server.post("/v1/completions", json.dumps(ASK).encode())
        monkeypatch.undo()
        assert (status, body["error"]["message"]) == (500, "the server failed at this request")
        assert server.post("/v1/completions", json.dumps(ASK).encode())[0] == 200
        (said,) = [line for line in server.said if "unexpected" in line]
    assert re.fullmatch(r"warning: /v1/completions: unexpected KeyError at .*:\d+", said)
    assert "secret" not in "".join(capfd.readouterr()) + "".join(server.said)


def test_a_model_that_breaks_stops_the_server(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Batcher) -> None:
        raise RuntimeError("out of memory")

    def serve_once() -> None:
        with a_server(chatty) as server:
            monkeypatch.setattr(Batcher, "_pass", fail)
            status, body = server.post("/v1/completions", json.dumps(ASK).encode())
            assert (status, body["error"]["code"]) == (500, "model_error")

    with pytest.raises(RuntimeError, match="out of memory"):
        serve_once()


def test_where_it_listens_and_what_it_warns_of(chatty: Path) -> None:
    with a_server(chatty, name="acme/all") as server, server.client() as client:
        host, port = server.address
        expired, listening = server.said
        assert expired.startswith(f"warning: {chatty}: the rights in old ended on 2020-01-31")
        assert listening == f"acme/all answers at http://{host}:{port}/v1; Ctrl-C stops it"
        assert client.completions.create(**(ASK | {"model": "acme/all-without-old"}), max_tokens=3).usage
    assert server.result is not None
    assert (server.result.name, server.result.requests, server.result.new_tokens) == ("acme/all", 1, 3)
    with a_server(chatty, host="127.0.0.2") as server:
        assert server.address[0] == "127.0.0.2"
        assert server.get("/health", host=f"127.0.0.2:{server.address[1]}")[0] == 200
        status, body = server.get("/health", host="flexctl.example")
        assert status == 403
        assert b"ask for it as 127.0.0.2" in body
    with a_server(chatty, host="0.0.0.0") as server:
        assert server.said[1].startswith("warning: `host`: 0.0.0.0 is open to other machines, without encryption")
        assert server.get("/health", host="flexctl.example")[0] == 200


@pytest.mark.usefixtures("slow_passes")
def test_a_first_word_to_stop_refuses_new_requests_and_a_second_stops_at_once(chatty: Path) -> None:
    with a_server(chatty, max_batch=1) as server, server.client() as client:
        running = client.completions.create(**ASK, max_tokens=100, stream=True)
        next(iter(running))
        with server.connect() as waiting:
            waiting.sendall(request(ASK))
            until(lambda: server.batcher.waiting == 1)
            server.listener.finish()
            answer = read_all(waiting)
        assert (status_of(answer), b'"code":"stopping"' in answer) == (503, True)
        assert server.batcher.running == 1
        server.listener.finish()
        until(lambda: server.result is not None)
        running.close()
    assert server.result is not None
    assert 0 < server.result.new_tokens < 60


def address_of(server: Apart) -> str:
    until(lambda: re.search(r"http://\S+/v1;", server.err) is not None)
    return re.findall(r"(http://\S+/v1);", server.err)[0]


def test_sigterm_finishes_what_runs_and_then_says_what_was_served(chatty: Path, tmp_path: Path) -> None:
    words = ("serve", chatty, "--port", 0, "--threads", 1)
    with apart.running("from flexctl.cli.app import run; run()", *words, said=tmp_path / "said") as server:
        client = openai.OpenAI(base_url=address_of(server), api_key="none", max_retries=0)
        stream = client.completions.create(model="merged", prompt="def", max_tokens=100, temperature=0, stream=True)
        first = next(iter(stream))
        server.process.terminate()
        text = first.choices[0].text + "".join(chunk.choices[0].text for chunk in stream)
        client.close()
        server.process.join(30)
        code, out, err = server.process.exitcode, server.out, server.err
    assert len(text) > 50
    assert code == 0
    assert re.search(r"^requests\s+1$", out, re.MULTILINE)
    assert re.search(r"^new tokens\s+100$", out, re.MULTILINE)
    assert "def" not in err
    assert "Traceback" not in err
