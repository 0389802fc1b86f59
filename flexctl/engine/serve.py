"""Serve a bundle to many, each request with the experts that it may use."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from flexctl import flags, model, serving
from flexctl.bundle.runnable import Runnable
from flexctl.errors import UsageError
from flexctl.options import OUTPUT, SERVER, Config, argument, flag, options, switch
from flexctl.runtime import SILENT, Reporter
from flexctl.serving.vllm.launch import Count, run_vllm
from flexctl.serving.vllm.refusals import merged_of, refuse_flags, require_vllm
from flexctl.steps.answering import Speaker, opened
from flexctl.steps.machine import machine_of

if TYPE_CHECKING:
    from flexctl.serving import Batcher, Permits, Service

__all__ = ["ServeConfig", "ServeResult", "serve"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,95}")


def _refuse_odd_name(value: str, field: str) -> None:
    if not _NAME.fullmatch(value):
        raise UsageError(f"{value!r} must be 1 to 96 letters, digits, '.', '_', '/' and '-'", field=field)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig(Config):
    """What ``serve`` is asked to do.

    The server speaks OpenAI's protocol: /v1/models, /v1/completions and /v1/chat/completions; /health and /metrics too.
    A request says who may answer: by the model's name (merged-without-law), by "without" or "only", by "purpose", and
    by its key. Ctrl-C or SIGTERM finishes what is running; a second one stops at once.

    `engine` vllm starts vLLM's own server instead, on a merged model, with the same names and the same masks; what
    stands behind -- is for it.

    Examples:
        flexctl serve
        flexctl serve merged --port 8080 --api-keys keys.toml
        flexctl serve merged --engine vllm -- --max-model-len 4096
    """

    bundle: flags.Bundle = None
    engine_flags: Annotated[tuple[str, ...], argument("FLAG", "Behind --: flags of vLLM's own.")] = ()
    engine: Annotated[Literal["own", "vllm"], flag("NAME", "own, or vllm, for many GPUs and clients.", SERVER)] = "own"
    host: Annotated[str, flag("ADDRESS", "Where to listen; anything but this machine is warned of.", SERVER)] = (
        "127.0.0.1"
    )
    port: Annotated[int, flag("N", "Port; 0 takes any that is free.", SERVER, at_least=0, below=65536)] = 8000
    name: Annotated[
        str | None,
        flag("NAME", "What clients call the model (default: the bundle's file name).", OUTPUT, check=_refuse_odd_name),
    ] = None
    api_keys: Annotated[
        Path | None, flag("FILE", "Who may ask, a TOML table a key: sha256, and the experts it may use.", SERVER)
    ] = None
    max_batch: Annotated[int, flag("N", "Answers under way at once.", SERVER, above=0)] = 16
    max_queue: Annotated[int, flag("N", "Answers that may wait; past them clients hear 429.", SERVER, at_least=0)] = 64
    max_context: Annotated[
        int | None, flag("N", "Tokens of prompt and answer (default: what the model can hold).", SERVER, above=1)
    ] = None
    max_new_tokens: Annotated[int, flag("N", "Length of an answer at most.", OUTPUT, above=0)] = 1024
    timeout_s: Annotated[float, flag("S", "Seconds that an answer may take.", SERVER, above=0)] = 300.0
    ui: Annotated[bool, switch("Show a page to try it, at the server's own address.", SERVER)] = False
    explain: Annotated[bool, switch("Tell experts' shares, which say something of a text.", OUTPUT)] = False
    anchor: flags.Anchor = None
    top_k: flags.TopK = None
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeResult:
    """What was served.

    Attributes:
        path: The bundle; text for one on the Hub.
        name: What clients called it, with all experts.
        experts: All its experts, the public one first.
        address: Where.
        requests: How many were answered or refused.
        new_tokens: Of all answers.
    """

    path: Path | str
    digest: str
    name: str
    experts: list[str]
    address: str
    requests: int
    new_tokens: int


def serve(config: ServeConfig, reporter: Reporter = SILENT) -> ServeResult:
    """Serve a bundle until it is told to stop.

    Args:
        config: Which bundle, where, to whom.
        reporter: Hears where it listens, warnings, and what breaks; never a text that goes through it.

    Returns:
        What was served.

    Raises:
        UsageError: A setting is wrong, or what serves is not installed.
        BundleError: The bundle is not valid, or does not belong to the anchor.
        FlexctlError: The address is taken.
    """
    _refuse_other_engine_s(config)
    serving.require_server()
    runnable = opened(config, reporter)
    name = config.name or _name_of(runnable)
    everybody = runnable.select()
    # What can be refused is refused before weights are read.
    keys = serving.read_keys(config.api_keys, everybody.experts) if config.api_keys else ()
    permits = serving.Permits(name, everybody.experts, runnable.rights, keys)
    context = _context(config, runnable.weights.dense_config)
    merged = merged_of(runnable.bundles[0], runnable.path) if config.engine == "vllm" else None
    machine = machine_of(config, None if merged else runnable.weights.shared)
    runnable.warn_of_expired(everybody, reporter)
    with serving.bind(config.host, config.port) as found:
        is_local = ipaddress.ip_address(found.getsockname()[0]).is_loopback
        if not is_local:
            whom = "whoever reaches it with a key" if keys else "whoever reaches it, as there are no `api_keys`"
            reporter.warn(f"`host`: {config.host} is open to other machines, without encryption; it answers {whom}")
        address = _address(found)
        if merged is not None:
            done = run_vllm(
                merged,
                name=name,
                api_keys=config.api_keys,
                found=found,
                address=address,
                is_local=is_local,
                dtype=None if config.dtype == "auto" else config.dtype,
                flags=config.engine_flags,
                reporter=reporter,
            )
        else:
            speaker = Speaker(runnable, machine)
            model.set_top_k(speaker.net, runnable.active(config.top_k, everybody, reporter))
            service = _service(config, speaker, permits, context, reporter, serving.LOCAL_NAMES if is_local else ())
            page = f", the playground is at {address}/" if config.ui else ""
            _run(service, found, lambda: reporter.note(f"{name} answers at {address}/v1{page}; Ctrl-C stops it"))
            done = Count(service.metrics.requests, service.batcher.new_tokens)
    return ServeResult(
        path=runnable.path,
        digest=runnable.digest,
        name=name,
        experts=runnable.experts,
        address=address,
        requests=done.requests,
        new_tokens=done.new_tokens,
    )


_INSTEAD = {
    "max_batch": "--max-num-seqs",
    "max_queue": None,
    "max_context": "--max-model-len",
    "max_new_tokens": None,
    "timeout_s": None,
    "ui": None,
    "explain": None,
    "top_k": "--hf-overrides",
    "threads": None,
    "device": None,
}
"""Options of our own server -> what vLLM has instead."""


def _refuse_other_engine_s(config: ServeConfig) -> None:
    """Refuse, before any work, what the chosen engine does not take.

    Raises:
        UsageError: There is such a thing, or vLLM is not here.
    """
    if config.engine == "own":
        if config.engine_flags:
            hint = "say `engine` vllm, or leave it out"
            raise UsageError(f"{config.engine_flags[0]!r} is for vLLM", hint=hint, field="engine_flags")
        return
    if config.bundle is not None and str(config.bundle).startswith("-"):
        raise UsageError(
            f"{config.bundle} is no bundle", hint="name the bundle, then --, then vLLM's flags", field="bundle"
        )
    defaults = {option.field: option.default for option in options(ServeConfig)}
    for field, instead in _INSTEAD.items():
        if getattr(config, field) != defaults[field]:
            hint = f"give vLLM {instead} behind --" if instead else "leave it out"
            raise UsageError("is our own server's, and `engine` is vllm", hint=hint, field=field)
    refuse_flags(config.engine_flags)
    require_vllm()


def _name_of(runnable: Runnable) -> str:
    """Return the last part of the bundle's place, without ending and revision."""
    place = runnable.path
    last = place.resolve().name if isinstance(place, Path) else place.rsplit("/", 1)[-1].partition("@")[0]
    name = last.removesuffix(".st")
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a model's name", hint="give one with `name`", field="bundle")
    return name


def _context(config: ServeConfig, dense_config: Mapping[str, Any]) -> int:
    """Return the most tokens that prompt and answer may have: within them positions are those of any other company.

    Longer ones than longrope's first stage would turn the positions of everybody in the same pass.
    """
    held = int(dense_config.get("max_position_embeddings") or 2048)
    rope = dense_config.get("rope_parameters") or dense_config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) == "longrope":
        held = int(rope.get("original_max_position_embeddings") or held)
    if config.max_context is not None and config.max_context > held:
        raise UsageError(f"{config.max_context} is more than the {held} that the model can hold", field="max_context")
    return config.max_context or held


class _Encoder:
    """A speaker's tokenizer, as the server asks it. Used from several threads: it is only read."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self.has_template = speaker.has_template
        # The first text settles what the tokenizer keeps between texts; after it nothing in it changes.
        self.encode("a")

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._speaker.encode(text)[0].tolist()]

    def frame(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            return [int(token) for token in self._speaker.frame(messages)[0].tolist()]
        except UsageError as error:
            said = (str(error.__cause__).splitlines() or [""])[0]
            raise UsageError(f"the model's chat template refuses them: {said}", field="messages") from error

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._speaker.tokenizer.decode(list(tokens)))

    def word(self, token: int) -> str:
        """Return one token's text; where it is part of a letter alone, the tokenizer's own name for it."""
        text = self.decode([token])
        return text if "\ufffd" not in text else str(self._speaker.tokenizer.convert_ids_to_tokens(token))


def _service(
    config: ServeConfig, speaker: Speaker, permits: Permits, context: int, reporter: Reporter, names: tuple[str, ...]
) -> Service:
    encoder = _Encoder(speaker)
    batcher = serving.Batcher(
        speaker.net,
        speaker.tokenizer,
        slots=config.max_batch,
        queue=config.max_queue,
        context=context,
        ends=speaker.ends,
        explains=config.explain,
    )
    digest, word = speaker.runnable.digest, encoder.word
    return serving.Service(
        batcher=batcher,
        encoder=encoder,
        permits=permits,
        account=serving.Account(base=permits.name, digest=digest, explains=config.explain, word=word),
        metrics=serving.Metrics(),
        context=context,
        vocab_size=speaker.net.config.vocab_size,
        max_new_tokens=min(config.max_new_tokens, context - 1),
        places=config.max_batch + config.max_queue,
        timeout_s=config.timeout_s,
        reporter=reporter,
        local_names=names,
        has_page=config.ui,
    )


def _address(found: socket.socket) -> str:
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _run(service: Service, found: socket.socket, on_ready: Any) -> None:
    """Serve until a signal, or until the scheduler fails; then what it failed with is raised."""
    batcher = service.batcher
    listener = serving.listener(serving.make_app(service), on_ready, batcher.drain)
    with ThreadPoolExecutor(1, thread_name_prefix="scheduler") as threads:
        scheduling = threads.submit(batcher.run)
        scheduling.add_done_callback(listener.leave)
        try:
            asyncio.run(_until_both_end(listener, found, batcher, scheduling))
        finally:
            batcher.stop()
    scheduling.result()


async def _until_both_end(listener: Any, found: socket.socket, batcher: Batcher, scheduling: Future[None]) -> None:
    await listener.serve([found])
    # The scheduler tells what it does in this loop, so it ends first.
    batcher.stop()
    await asyncio.wait([asyncio.wrap_future(scheduling)])
