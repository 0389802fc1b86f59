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
from importlib import metadata
from typing import Any, NamedTuple, NoReturn

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import Reporter
from flexctl.serving.vllm.check import check_masks
from flexctl.serving.vllm.masks import Served

__all__ = ["RELEASES", "Count", "command_line", "environment", "refuse_config", "refuse_release", "require_vllm", "run"]

RELEASES = ("0.32",)
"""Minor releases of vLLM that the tests ran."""

PLUGIN = "flexctl"
"""Name of the entry point."""

_OURS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--config",
    "--dtype",
    "--additional-config",
    "--worker-extension-cls",
    "--api-key",
)
"""Flags that flexctl gives, or that would give them from elsewhere."""


def refuse_release() -> None:
    """Refuse where no vLLM is installed, or one that the tests did not run.

    Raises:
        UsageError: So it is.
    """
    hint = f"pip install 'vllm=={RELEASES[-1]}.*' beside flexctl, or leave out `engine`"
    found = _installed()
    if found is None:
        raise UsageError("vLLM is not installed here", hint=hint, field="engine")
    if not found.startswith(tuple(f"{release}." for release in RELEASES)):
        said = f"this is vLLM {found}; masks were tested with {', '.join(RELEASES)} alone"
        raise UsageError(said, hint=hint, field="engine")


def _installed() -> str | None:
    """Return vLLM's version; builds for other machines have other package names."""
    packages = metadata.packages_distributions().get("vllm", [])
    return metadata.version(packages[0]) if packages else None


def require_vllm() -> None:
    """Refuse where vLLM cannot serve with masks.

    Raises:
        UsageError: It is not installed, is another release, or its processes would not find the plugin.
    """
    refuse_release()
    if not metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
        said = "vLLM does not find flexctl's plugin, as flexctl runs from a folder and is not installed"
        raise UsageError(said, hint="pip install flexctl beside vLLM", field="engine")


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

    Raises:
        UsageError: One of them is flexctl's to give.
    """
    for flag in flags:
        name = re.split("[=.]", flag, maxsplit=1)[0].replace("_", "-")
        if name in _OURS:
            raise UsageError(f"{name} is flexctl's to give to vLLM", hint="leave it out", field="engine_flags")
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
    return [*flags, *(part for pair in ours.items() for part in pair)]


class Count(NamedTuple):
    """What was done: requests answered or refused, and tokens of all answers."""

    requests: int
    new_tokens: int


def run(
    model: Served, experts: Sequence[str], found: socket.socket, dtype: str, flags: Sequence[str], reporter: Reporter
) -> Count:
    """Serve a merged model until the process is told to stop.

    Args:
        model: What is served.
        experts: Its experts, the public one first.
        found: Where to listen.
        dtype: In which it computes.
        flags: vLLM's own.
        reporter: Hears that the masks hold, and where it listens.

    Returns:
        What was done.

    Raises:
        UsageError: vLLM was given what cannot carry a mask.
        FlexctlError: It did not start, or its masks do not hold.
    """
    host, port = found.getsockname()[:2]
    arguments = command_line(model, host, port, dtype, flags)
    os.environ.update(environment(model, os.environ))
    with _stdout_is_stderr():
        import uvloop

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until vLLM is up and has its own
        try:
            new_tokens = uvloop.run(_serve(arguments, model, experts, found, reporter))
        except (RuntimeError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise FlexctlError(f"vLLM failed: {first}", hint="what it said itself is above") from error
    from flexctl.serving.vllm.web import Masks

    return Count(Masks.requests, new_tokens)


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
    arguments: Sequence[str], model: Served, experts: Sequence[str], found: socket.socket, reporter: Reporter
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
    address = f"http://{args.host}:{args.port}"
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


def refuse_config(config: Any) -> None:
    """Refuse what cannot carry a mask, or was not tried with one.

    Args:
        config: vLLM's resolved configuration.

    Raises:
        UsageError: It asks for such a thing.
    """
    parallel = config.parallel_config
    untried = {
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        "experts that move (--enable-eplb)": parallel.enable_eplb,
        "data parallelism": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "quantised weights": config.quant_config is not None,
        "key-value caches outside vLLM": config.kv_transfer_config is not None,
        "prompts of embeddings": config.model_config.enable_prompt_embeds,
    }
    for what, asked in untried.items():
        if asked:
            raise UsageError(f"masks of experts do not go with {what}", hint="leave that out", field="engine_flags")
