"""Starting vLLM's own server on a merged model, in this process, with masks by name."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from flexctl.bundle import PUBLIC, Merged
from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import Reporter
from flexctl.serving.vllm.check import check_masks
from flexctl.serving.vllm.masks import Served
from flexctl.serving.vllm.refusals import PLUGIN, refuse_config

__all__ = ["Count", "command_line", "environment", "reason", "run_vllm"]


def environment(model: Served, now: Mapping[str, str]) -> dict[str, str]:
    """Return what the environment of vLLM's processes has beside what is there now.

    vLLM tells its makers of each start unless told not to; flexctl sends nothing anywhere.
    """
    plugins = now.get("VLLM_PLUGINS")
    chosen = {} if plugins is None else {"VLLM_PLUGINS": ",".join([*filter(None, plugins.split(",")), PLUGIN])}
    return {**model.environment(), **chosen, "VLLM_NO_USAGE_STATS": "1"}


def command_line(model: Served, host: str, port: int, dtype: str, flags: Sequence[str]) -> list[str]:
    """Return the arguments of vLLM's server.

    The digest is part of the name under which vLLM keeps compiled graphs: those of a server without masks are
    not loaded.

    Args:
        model: What is served.
        host: Address to listen at.
        port: Likewise.
        dtype: In which it computes. Left to itself, vLLM serves a float32 model in bfloat16.
        flags: vLLM's own, as the user gave them.
    """
    additional = f'{{"flexctl": "{model.digest}"}}'
    ours = {
        "--model": model.bundle,
        "--served-model-name": model.name,
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--additional-config": additional,
        "--worker-extension-cls": "flexctl.serving.vllm.worker.Negation",
        "--middleware": "flexctl.serving.vllm.web.Masks",
    }
    return [*_pairs(_DEFAULTS), *flags, *_pairs(ours)]


def _pairs(flags: Mapping[str, str]) -> list[str]:
    return [part for pair in flags.items() for part in pair]


_DEFAULTS = {"--allowed-origins": "[]", "--shutdown-timeout": "30"}
"""The user's own win over these. vLLM's would let any site's pages read answers, and stop without finishing them."""


class Count(NamedTuple):
    """What was done: requests answered or refused, and tokens of all answers."""

    requests: int
    new_tokens: int


def run_vllm(
    merged: Merged,
    *,
    name: str,
    api_keys: Path | None,
    found: socket.socket,
    address: str,
    is_local: bool,
    dtype: str | None,
    flags: Sequence[str],
    reporter: Reporter,
) -> Count:
    """Serve a merged model until the process is told to stop.

    Args:
        merged: The model.
        name: What clients call it when all experts answer.
        api_keys: File of the keys that may ask; None lets anybody.
        found: Where to listen.
        address: The same, as clients write it.
        is_local: Whether that is this machine alone.
        dtype: In which it computes; None is the model's own.
        flags: vLLM's own.
        reporter: Hears that the masks hold, and where it listens.

    Returns:
        What was done.

    Raises:
        UsageError: vLLM was given what cannot carry a mask.
        FlexctlError: It did not start, or its masks do not hold.
    """
    experts = [PUBLIC, *merged.names]
    model = Served(
        bundle=str(merged.path.resolve()),
        name=name,
        digest=merged.digest,
        num_experts=len(experts),
        api_keys=None if api_keys is None else str(api_keys.resolve()),
        is_local=is_local,
    )
    host, port = found.getsockname()[:2]
    arguments = command_line(model, host, port, dtype or str(merged.config["dtype"]), flags)
    os.environ.update(environment(model, os.environ))
    with _stdout_is_stderr():
        import uvloop

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until vLLM is up and has its own
        try:
            new_tokens = uvloop.run(_serve(arguments, model, experts, found, address, reporter))
        except (RuntimeError, ValueError) as error:
            raise FlexctlError(f"vLLM failed: {reason(error)}", hint="what it said itself is above") from error
    from flexctl.serving.vllm.web import Masks

    return Count(Masks.requests, new_tokens)


def reason(error: BaseException) -> str:
    """Return in one line why vLLM failed: an error's first, or what pydantic's count of errors is about."""
    text = str(error).strip()
    inside = re.search(r"^ *(?:Value error, )?(.+?)(?: \[type=.*)?$", text.partition("\n")[2], re.MULTILINE)
    if re.match(r"\d+ validation error", text) and inside:
        return inside[1]
    return (text.splitlines() or [type(error).__name__])[0]


@contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Lead what vLLM's processes print to stderr: stdout is for a command's result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


async def _serve(
    arguments: Sequence[str],
    model: Served,
    experts: Sequence[str],
    found: socket.socket,
    address: str,
    reporter: Reporter,
) -> int:
    """Check the masks, then serve; return how many tokens were made for clients."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.entry import build_and_serve, build_async_engine_client_from_engine_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise UsageError(f"vLLM: {message}", field="engine_flags")

    class Checked(AsyncEngineArgs):  # type: ignore[misc]
        def create_engine_config(self, *args: Any, **kwargs: Any) -> Any:
            config = super().create_engine_config(*args, **kwargs)
            refuse_config(config)
            return config

    cli_env_setup()
    args = make_arg_parser(Parser()).parse_args(arguments)
    validate_parsed_serve_args(args)
    async with build_async_engine_client_from_engine_args(Checked.from_cli_args(args)) as engine:
        started = time.monotonic()
        await check_masks(engine, model, experts)
        took = time.monotonic() - started
        reporter.note(f"each of {len(experts)} experts was left out and was alone, as it must ({took:.1f} s)")
        before = _new_tokens()
        ending = await build_and_serve(engine, address, found, args)
        reporter.note(f"{model.name} answers at {address}/v1; Ctrl-C stops it")
    await ending
    return _new_tokens() - before


def _new_tokens() -> int:
    from vllm.v1.metrics.reader import get_metrics_snapshot

    return sum(int(metric.value) for metric in get_metrics_snapshot() if metric.name == "vllm:generation_tokens")
