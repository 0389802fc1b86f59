"""Rotary embeddings in fewer passes than Transformers', in plain torch: the same numbers, bit for bit, and their time.

``python -m tests.benchmarks.rotary`` compares both on one CPU thread, forward and back, in all families.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

FAMILIES = ("olmo2", "llama", "mistral", "qwen3")
SEQUENCES, POSITIONS, HEADS, KEY_HEADS, HEAD_DIM = 4, 256, 16, 4, 64
REPEATS = 9


def rotate(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
    """What ``apply_rotary_pos_emb`` of Transformers returns."""
    found: tuple[Tensor, Tensor] = _Rotate.apply(queries, keys, cosines, sines)
    return found


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        return _turned(queries, cosines, sines), _turned(keys, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, at_queries: Tensor, at_keys: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return _turned_back(at_queries, *ctx.saved_tensors), _turned_back(at_keys, *ctx.saved_tensors), None, None


def _turned(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half, turned = states.shape[-1] // 2, torch.empty_like(states)
    first, second = states[..., :half], states[..., half:]
    cos, sin = cosines[:, None, :, :half], sines[:, None, :, :half]
    torch.sub(first * cos, second * sin, out=turned[..., :half])
    torch.add(second * cos, first * sin, out=turned[..., half:])
    return turned


def _turned_back(slopes: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    # Autograd gives each factor its gradient in its own dtype, and then adds: so it rounds before the sum.
    half, back, kind = slopes.shape[-1] // 2, torch.empty_like(slopes), slopes.dtype
    first, second = slopes[..., :half], slopes[..., half:]
    cos, sin = cosines[:, None, :, :half], sines[:, None, :, :half]
    torch.add((first * cos).to(kind), (second * sin).to(kind), out=back[..., :half])
    torch.sub((second * cos).to(kind), (first * sin).to(kind), out=back[..., half:])
    return back


def stock(family: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what a family's class in Transformers calls."""
    module: Any = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    found: Callable[..., tuple[Tensor, Tensor]] = module.apply_rotary_pos_emb
    return found


def given(family: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return flat queries and keys, and cosines and sines in the dtype that the family has them in."""
    drawn = torch.Generator().manual_seed(0)
    flat = [
        torch.randn(SEQUENCES, POSITIONS, heads * HEAD_DIM, generator=drawn).to(dtype).requires_grad_(True)
        for heads in (HEADS, KEY_HEADS)
    ]
    angles = torch.arange(POSITIONS)[:, None] * torch.rand(HEAD_DIM // 2, generator=drawn)
    both = torch.cat((angles, angles), dim=-1)[None]
    return flat, [one if family == "olmo2" else one.to(dtype) for one in (both.cos(), both.sin())]


def there_and_back(
    way: Callable[..., tuple[Tensor, Tensor]], flat: list[Tensor], table: list[Tensor]
) -> tuple[Tensor, ...]:
    """Return turned queries and keys, and the gradients at what came in."""
    heads = [one.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for one in flat]
    turned = way(*heads, *table)
    slopes = [torch.sin(7 * one.detach()) for one in turned]
    return (*(one.detach() for one in turned), *torch.autograd.grad(turned, flat, slopes))


def main() -> None:
    """Print milliseconds of both ways, and whether their numbers are the same."""
    torch.set_num_threads(1)
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            flat, table = given(family, dtype)
            ways = (stock(family), rotate)
            pairs = zip(*(there_and_back(way, flat, table) for way in ways), strict=True)
            same = all(torch.equal(one, other) for one, other in pairs)
            theirs, ours = (_fastest_ms(partial(there_and_back, way, flat, table)) for way in ways)
            print(f"{family} {dtype}: {theirs:.2f} ms, {ours:.2f} ms, same numbers: {same}")


def _fastest_ms(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(REPEATS):
        started = time.thread_time()
        work()
        best = min(best, time.thread_time() - started)
    return 1e3 * best


if __name__ == "__main__":
    main()
