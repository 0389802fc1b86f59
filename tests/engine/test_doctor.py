"""doctor: what this machine offers, and what is missing."""

from __future__ import annotations

import http.server
import json
import os
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from conftest import Texts

import flexctl.engine.doctor as module
from flexctl.cli.app import main
from flexctl.engine.doctor import DoctorConfig, doctor
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.hub.reach import reach
from flexctl.runtime import SilentReporter, busy_cores, note_busy_cores

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def load(monkeypatch: pytest.MonkeyPatch, processes: float, cores: int) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (processes, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_a_machine_that_has_all(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(monkeypatch, 0.5, 2)
    caches = in_empty_folder / "caches"
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(caches / "hub"))
    (caches / "hub/blobs").mkdir(parents=True)
    (caches / "hub/blobs/one").write_bytes(b"x" * 700)
    (caches / "hub/link").symlink_to(caches / "nowhere")
    listener = Listener()
    found = doctor(DoctorConfig(), listener)
    assert (found.missing, found.exit_code, listener.warnings) == ([], 0, [])
    assert found.versions["torch"] == metadata.version("torch")
    assert {"python", "flexctl", "transformers", "tokenizers", "safetensors", "huggingface-hub"} <= set(found.versions)
    assert set(found.extras) == set(metadata.metadata("flexctl").get_all("Provides-Extra") or []) - {"dev"}
    assert found.devices[0] == "cpu"
    assert set(found.matmul_gflops_per_s) == {"float32", "bfloat16"}
    assert all(speed > 0 for speed in found.matmul_gflops_per_s.values())
    assert (found.cpus, found.load, found.threads) == (2, 0.5, torch.get_num_threads())
    assert 0 < (found.memory_available_bytes or 1) <= found.memory_bytes
    assert found.disk_free_bytes > 0
    assert found.hub_state == "not asked, as HF_HUB_OFFLINE is set"
    sizes = {each.name: (each.path, each.size_bytes) for each in found.caches}
    assert sizes["hub"][0] == caches / "hub"
    assert sizes["hub"][1] == 700 + len(str(caches / "nowhere"))
    assert found.auto_dtype in ("float32", "bfloat16")
    assert sizes["flexctl"][1] > 0  # which of them, measured once


def test_what_is_missing_is_said_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = metadata.version

    def version(package: str) -> str:
        if package in ("safetensors", "matplotlib"):
            raise metadata.PackageNotFoundError(package)
        return here(package)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor", "--json", "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["missing"] == ["safetensors"]
    assert found["versions"]["safetensors"] is None
    assert found["extras"]["report"] == ["matplotlib"]
    assert (found["matmul_gflops_per_s"], err) == ({}, "")
    assert main(["doctor", "--threads", "1"]) == 1
    assert "missing: pip install safetensors" in capsys.readouterr().out.splitlines()


def test_requirements_are_read_from_the_package_s_own() -> None:
    lines = [
        "torch>=2.6",
        "typer<0.30,>=0.29",
        'tomli>=2; python_version < "3.11"',
        'lm-eval<0.5,>=0.4.13; extra == "eval"',
        'pytest>=8; extra == "dev"',
    ]
    assert module._requirements(lines) == (["torch", "typer"], {"eval": ["lm-eval"]})


def test_people_read_which_precision_is_faster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speeds = {"float32": 10.0, "bfloat16": 35.0}
    monkeypatch.setattr(module, "matmul_gflops_per_s", lambda: speeds)
    load(monkeypatch, 3.5, 2)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "bfloat16 is 3.5 times as fast as float32 (35.000 GFLOP/s)" in out
    assert err == ("warning: the load is 3.5 on 2 cores, where torch's threads wait for each other: use --threads 1\n")


@pytest.mark.parametrize(
    ("processes", "cores", "threads", "is_busy"),
    [(2.1, 2, None, True), (2.0, 2, None, False), (9.0, 2, 1, False), (9.0, 1, None, False)],
)
def test_busy_cores_are_noticed_where_threads_are_left_open(
    monkeypatch: pytest.MonkeyPatch, processes: float, cores: int, threads: int | None, is_busy: bool
) -> None:
    load(monkeypatch, processes, cores)
    listener = Listener()
    note_busy_cores(threads, listener)
    assert bool(busy_cores(threads)) == is_busy
    assert len(listener.notes) == is_busy
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert busy_cores(threads) is None


def test_training_says_once_that_the_cores_are_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anchor: Path, checkpoint: Path, texts: Texts
) -> None:
    load(monkeypatch, 9.0, 2)

    def said(threads: int | None) -> list[str]:
        listener = Listener()
        trained = tmp_path / f"{threads}.st"
        train_expert(
            TrainExpertConfig(data=(texts.code,), anchor=anchor, output=trained, max_steps=1, threads=threads), listener
        )
        made = tmp_path / f"{threads}"
        source: dict[str, Any] = {"source": str(checkpoint), "sample_tokens": 2000}
        init_anchor(InitAnchorConfig(data=(texts.public,), output=made, threads=threads, **source), listener)
        return [note for note in listener.notes if "the load is" in note]

    assert len(said(None)) == 2
    assert said(1) == []


class _Answer(http.server.BaseHTTPRequestHandler):
    code = 200

    def do_HEAD(self) -> None:
        self.send_response(self.code)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    found = http.server.HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{found.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield found
    found.shutdown()
    thread.join()
    found.server_close()


@pytest.mark.parametrize(("code", "says"), [(200, "reachable"), (405, "reachable"), (503, "not well: HTTP 503")])
def test_the_hub_answers(server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, code: int, says: str) -> None:
    assert server.server_port
    monkeypatch.setattr(_Answer, "code", code)
    assert reach() == says


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "nonsense"])
def test_a_hub_that_does_not_answer_is_a_line(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    assert reach().startswith("not reachable: ")
    assert "\n" not in reach()
