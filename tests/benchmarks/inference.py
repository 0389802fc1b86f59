"""Inference measured: flexctl's routed model against stock Transformers' mixture of the same sizes and top-k."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flexctl.model.building import route
from flexctl.model.norms import fuse_norms
from flexctl.model.routed import Router, routed_layers
from flexctl.model.stacked import stack_experts
from tests.benchmarks.shapes import Shape, dense_model, mixture_model
from tests.benchmarks.steps import free, peak_bytes, reset_peak, wait

EXPERTS, TOP_K = 4, 2
REPEATS, ANSWERS, NEW_TOKENS = 5, 3, 32


def ours(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """flexctl's model with EXPERTS experts, of which TOP_K run on a token."""
    import copy

    model: Any = route(dense_model(shape, device, dtype))
    generator = torch.Generator().manual_seed(0)
    for block in routed_layers(model):
        block.experts.extend(copy.deepcopy(block.experts[0]) for _ in range(EXPERTS - 1))
        block.router = Router(torch.randn(EXPERTS, shape.hidden, generator=generator))
        block.top_k = TOP_K
    return fuse_norms(stack_experts(model.requires_grad_(False), device).to(device), device)


def stock(how: str) -> Callable[..., Any]:
    """Transformers' FlexOlmo with one of its implementations of experts."""
    return lambda shape, device, dtype: mixture_model(
        shape, device, dtype, experts=EXPERTS, top_k=TOP_K, how=how
    ).requires_grad_(False)


MODELS = {"flexctl": ours, "Transformers, grouped": stock("grouped_mm"), "Transformers, eager": stock("eager")}


@torch.no_grad()
def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, models: Mapping[str, Callable[..., Any]] = MODELS
) -> Iterator[dict[str, Any]]:
    """Yield tokens a second of forward passes at batch 1 and 8 and of greedy generation, a row a model and batch."""
    for name, make in models.items():
        try:
            model = make(shape, device, dtype)
        except RuntimeError as error:
            yield {"name": name, "failed": str(error).splitlines()[0][:300]}
            continue
        for batch in (1, 8):
            ids = torch.randint(2, shape.vocab, (batch, shape.seq_len), generator=torch.Generator().manual_seed(batch))
            row: dict[str, Any] = {"name": f"{name}, batch {batch}", "dtype": str(dtype).removeprefix("torch.")}
            try:
                yield row | _figures(model, ids.to(device))
            except RuntimeError as error:
                yield row | {"failed": str(error).splitlines()[0][:300]}
        model = None
        free(device)


def _figures(model: Any, ids: Tensor) -> dict[str, Any]:
    reset_peak(ids.device)
    forward_s = _seconds(lambda: model(ids, use_cache=False, logits_to_keep=1), ids.device, REPEATS)
    peak = peak_bytes(ids.device)
    tokens = min(NEW_TOKENS, ids.shape[1])
    prompt = ids[:, : max(1, ids.shape[1] // 8)]
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    generate_s = _seconds(
        lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings), ids.device, ANSWERS
    )
    return {
        "forward_tokens_per_s": ids.numel() / forward_s,
        "generate_tokens_per_s": len(ids) * tokens / generate_s,
        "peak_bytes": peak,
    }


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of ``work``, after once that does not count; on a CPU its own time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    times = []
    for _ in range(repeats + 1):
        wait(device)
        started = clock()
        work()
        wait(device)
        times.append(clock() - started)
    return statistics.median(times[1:])
