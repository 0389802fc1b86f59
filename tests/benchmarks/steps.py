"""Training steps measured: the pair, full and low-rank, against a masked mixture, the whole dense model, and LoRA.

Every kind goes through flexctl's own loop, with the same batches, attention, chunked loss and fused AdamW, so
what differs is the model: ``measure`` yields a row each.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexctl.heap import reusing_memory
from flexctl.model.attention import register_attention
from flexctl.model.building import route
from flexctl.model.losses import Loss, training_loss
from flexctl.model.norms import fuse_norms
from flexctl.model.recompute import recompute_layers
from flexctl.runtime import SILENT, peak_rss_bytes
from flexctl.training.loop import LoopSettings, Match, ParameterGroup, train, unmatched
from flexctl.training.pair import Pair
from tests.benchmarks.shapes import CPU, DENSE, LORA, MASKED, PAIR, Shape, dense_model, mixture_model, step_flops

RANK = 16
COMPILED = ("Olmo2MLP", "Olmo2RMSNorm", "FusedNorm")


class Trained(NamedTuple):
    """A model in training."""

    model: nn.Module
    groups: list[ParameterGroup]
    match: Match
    autocast: torch.dtype | None


class RandomBatches:
    """Batches of random tokens, the last fourth of the sequences public."""

    def __init__(self, shape: Shape) -> None:
        self.seq_len, self.batch_size, self._vocab = shape.seq_len, shape.batch, shape.vocab

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randint(2, self._vocab, (self.batch_size, self.seq_len + 1), generator=generator)

    def is_public(self, step: int) -> Tensor:
        del step
        return torch.arange(self.batch_size) >= self.batch_size - self.batch_size // 4

    def refuse_change(self) -> None:
        """Nothing changes."""


def pair(shape: Shape, device: torch.device, dtype: torch.dtype, rank: int | None = None) -> Trained:
    """flexctl's own: frozen weights in ``dtype``, trained ones in float32."""
    model = fuse_norms(route(dense_model(shape, device, dtype)).to(device), device)
    rows = 0.02 * torch.randn(shape.layers, shape.hidden, generator=torch.Generator().manual_seed(0))
    made = Pair(model, rows, public_match=1.0, rank=rank)
    return Trained(model, made.groups(), made.match, None if dtype == torch.float32 else dtype)


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Trained:
    """Every weight of the dense model trains, kept in float32."""
    model = dense_model(shape, device, torch.float32).requires_grad_(True)
    autocast = None if dtype == torch.float32 else dtype
    return Trained(model, [ParameterGroup(parameters=list(model.parameters()))], unmatched, autocast)


def masked(shape: Shape, device: torch.device, dtype: torch.dtype, how: str) -> Trained:
    """The release's way: both experts in one mixture, the public one's gradients zeroed. All weights are in ``dtype``,

    which spares this one the casts and half of AdamW's traffic: Transformers' grouped products take no autocast.
    """
    model = mixture_model(shape, device, dtype, experts=2, top_k=2, how=how).requires_grad_(False)
    model.set_attn_implementation(register_attention())
    weights = [value for name, value in model.named_parameters() if ".experts." in name]
    for weight in weights:
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(_zero_public)
    return Trained(model, [ParameterGroup(parameters=weights)], unmatched, None)


def _zero_public(weight: Tensor) -> None:
    assert weight.grad is not None
    weight.grad[0].zero_()


def lora(shape: Shape, device: torch.device, dtype: torch.dtype, rank: int = RANK) -> Trained:
    """peft's LoRA on the feed-forward matrices of the dense model: frozen in ``dtype``, adapters in float32."""
    import peft

    model = dense_model(shape, device, dtype).requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["gate_proj", "up_proj", "down_proj"])
    model = peft.inject_adapter_in_model(config, model)
    weights = []
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()
            weights.append(value.requires_grad_(True))
    autocast = None if dtype == torch.float32 else dtype
    return Trained(model, [ParameterGroup(parameters=weights)], unmatched, autocast)


def recomputed(shape: Shape, device: torch.device, dtype: torch.dtype) -> Trained:
    """The pair with --recompute."""
    made = pair(shape, device, dtype)
    recompute_layers(made.model)
    return made


def compiled(shape: Shape, device: torch.device, dtype: torch.dtype) -> Trained:
    """The pair with every feed-forward network and norm compiled: what torch.compile would bring on top."""
    made = pair(shape, device, dtype)
    compile_parts(made.model)
    return made


def compile_parts(model: nn.Module) -> list[nn.Module]:
    """Compile the feed-forward networks and norms of a model, each class once; return them."""
    known: dict[type, Callable[..., Any]] = {}
    parts = [module for module in model.modules() if type(module).__name__ in COMPILED]
    for part in parts:
        kind = type(part)
        if kind not in known:
            known[kind] = torch.compile(kind.forward, dynamic=False)
        part.forward = partial(known[kind], part)
    return parts


KINDS: dict[str, tuple[str, int | None, Callable[..., Trained]]] = {
    "pair": (PAIR, None, pair),
    f"pair, rank {RANK}": (PAIR, RANK, lambda *where: pair(*where, rank=RANK)),
    "dense, every weight": (DENSE, None, dense),
    "masked 2 experts, grouped": (MASKED, None, lambda *where: masked(*where, how="grouped_mm")),
    "masked 2 experts, eager": (MASKED, None, lambda *where: masked(*where, how="eager")),
    f"LoRA of peft, rank {RANK}": (LORA, RANK, lora),
    "pair, recomputed": (PAIR, None, recomputed),
    "pair, compiled": (PAIR, None, compiled),
}
"""Name -> kind, rank, maker."""

USUAL = tuple(KINDS)[:-1]
"""Without what is compiled, which takes minutes on a CPU."""


def measure(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    steps: int,
    rounds: int = 1,
    names: tuple[str, ...] = USUAL,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every kind of step: tokens a second, operations a second, peak memory; or why there is none.

    ``warm_up_s`` is what making the model and its first two steps took, compiling included.

    Args:
        shape: Of the anchor and of a step.
        device: Where.
        dtype: Of frozen weights and of matrix products.
        steps: That are timed, after two that are not.
        rounds: The fastest of so many counts.
        names: Which kinds.
    """
    for name in names:
        kind, rank, make = KINDS[name]
        row: dict[str, Any] = {"name": name, "dtype": str(dtype).removeprefix("torch.")}
        if kind == LORA and find_spec("peft") is None:
            yield row | {"skipped": "peft is not installed"}
            continue
        flops = step_flops(shape, kind, rank)
        started = time.monotonic()
        try:
            made = make(shape, device, dtype)
            run(made, shape, 2)
            row["warm_up_s"] = time.monotonic() - started
            reset_peak(device)
            rate, loss = max(run(made, shape, steps) for _ in range(rounds))
        except Exception as error:  # out of memory among them, and whatever a compiler says
            row |= {"failed": str(error).splitlines()[0][:300]}
        else:
            row |= {
                "tokens_per_s": rate,
                "step_s": shape.tokens / rate,
                "flops_per_step": flops,
                "flops_per_s": flops * rate / shape.tokens,
                "peak_bytes": peak_bytes(device),
                "loss": loss,
            }
        made = None  # type: ignore[assignment]
        free(device)
        yield row


def run(made: Trained, shape: Shape, steps: int, loss: Loss = training_loss) -> tuple[float, float]:
    """Train for ``steps`` and return (tokens a second, last losses' mean); on a CPU by its own time."""
    settings = LoopSettings(steps=steps, lr=1e-4, warmup_steps=1, micro_batch=shape.batch, autocast=made.autocast)
    started = time.process_time()
    outcome = train(
        made.model, made.groups, RandomBatches(shape), settings, reporter=SILENT, match=made.match, loss=loss
    )
    worked_s = time.process_time() - started
    on_card = made.groups[0].parameters[0].is_cuda
    rate = outcome.tokens_per_s if on_card else steps * shape.tokens / worked_s
    assert rate is not None
    return rate, outcome.final_loss


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begin to look for the most memory in use."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use on the card since ``reset_peak``; on a CPU, this process's peak resident size."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes()


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 10) -> float:
    """Return the rate of a product of square matrices of random numbers, the best of ``repeats``."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = 0.0
    for _ in range(repeats + 2):
        wait(device)
        started = clock()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * size**3 / (clock() - started))
    return best


def wait(device: torch.device) -> None:
    """Wait until a card has done what it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Print one kind's row on this CPU, or the measured rate, as JSON: in a process of its own its peak is its own."""
    name, dtype = sys.argv[1], getattr(torch, sys.argv[2])
    device = torch.device("cpu")
    if name == "rate":
        print(json.dumps(matmul_flops_per_s(device, dtype, 2048, repeats=5)))
        return
    with reusing_memory():  # rounds are then steps of one run
        [row] = measure(CPU, device, dtype, steps=2, rounds=4, names=(name,))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
