"""What an anchor carries for its owners to come: a public sample, and the router inputs that a model has on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexctl import model, routing, text
from flexctl.bundle import RawTensor
from flexctl.errors import UsageError
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.steps.machine import Machine

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Calibration", "calibrate", "read_kind"]

_TOKENS_A_DIMENSION, _FEWEST_TOKENS, _MOST_TOKENS = 256, 32_768, 262_144
"""Half of them are enough for rows, at a width where that was measured: docs/results.md, section 10."""

_BATCH = 8
_SEQ_LEN = 256
_KIND_PASSAGES = 128
_DRESSED_PASSAGES = 64
"""Of public text as code; 48 and 128 part owners' text the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured on a dense model.

    Attributes:
        num_parameters: Of the model.
        sample: Tensors of the public text that owners mix into training.
        space: Tensors of the statistics of router inputs on it.
        spread: Standard deviation of u . x on public text in each layer; its mean is 1.
    """

    num_parameters: int
    sample: Mapping[str, RawTensor]
    space: Mapping[str, RawTensor]
    spread: list[float]


def read_kind(path: Path, text_field: str, seed: int) -> list[str]:
    """Return passages of a kind of text that is measured only.

    Args:
        path: File, folder or ``hf://datasets/...``.
        text_field: Column or .jsonl field that holds it.
        seed: Of the choice.

    Raises:
        UsageError: It cannot be read, or is too little to measure.
    """
    passages = text.sample_passages(text.read_documents([path], text_field), _KIND_PASSAGES, seed)
    if len(passages) < 2:
        raise UsageError(
            f"{path} has too little text to measure how it varies",
            hint="give two documents at least, or a longer one",
            field="calibrate",
        )
    return passages


def calibrate(
    checkpoint: Path,
    *,
    sample: text.PublicSample,
    kinds: Sequence[tuple[str, Sequence[str]]] = (),
    special_as_text: bool,
    seed: int,
    machine: Machine,
    reporter: Reporter,
    world: World = ALONE,
) -> Calibration:
    """Measure a dense model's router inputs on a public sample.

    Args:
        checkpoint: Directory of the model.
        sample: Public text.
        kinds: What to call each other kind of text, and its passages, two at least. Public text in the dress of code
            is always one more.
        special_as_text: Whether special tokens that stand in text are plain text.
        seed: Of the passages.
        machine: What the model runs on.
        reporter: Hears of progress.
        world: The processes that share the work.
    """
    tokenizer = model.load_tokenizer(checkpoint, special_as_text=special_as_text)
    dense = model.load_dense(checkpoint)
    num_parameters = dense.num_parameters()
    routed = model.route(dense.to(machine.dtype)).to(machine.device)
    statistics = _measure(routed, sample, reporter, world)
    dressed = ("public text as code", _dressed(sample.texts(tokenizer), seed))
    found = [
        _within(name, text.frame_passages(tokenizer, passages), routed, reporter, world)
        for name, passages in (dressed, *kinds)
    ]
    space = routing.fit_space(statistics, found)
    return Calibration(
        num_parameters=num_parameters,
        sample=_raw(sample.to_tensors()),
        space=_raw(space.to_tensors()),
        spread=[float(std) for std in routing.constant_spread(space, statistics)],
    )


def _raw(tensors: Mapping[str, Tensor]) -> dict[str, RawTensor]:
    return {name: RawTensor(*model.to_bytes(tensor)) for name, tensor in tensors.items()}


def _measure(routed: Any, sample: text.PublicSample, reporter: Reporter, world: World) -> routing.InputStatistics:
    def batches() -> Iterator[Tensor]:
        import torch

        stream = sample.stream()
        seq_len = min(_SEQ_LEN, len(stream) - 1)
        count = min(stream.num_sequences(seq_len), _tokens(routed.config.hidden_size) // seq_len)
        with reporter.progress("measuring router inputs", count * seq_len, "tokens") as bar:
            for start in range(0, count, _BATCH * world.size):
                several = range(start, min(count, start + _BATCH * world.size))
                rows = [stream.sequence(i, seq_len)[:-1] for i in several]
                yield torch.stack([torch.from_numpy(row) for row in rows])
                bar.advance(len(rows) * seq_len)

    return routing.measure_inputs(routed, batches(), world)


def _tokens(hidden_size: int) -> int:
    """Return how many public tokens router inputs are measured on: a covariance of wider ones needs more."""
    return min(max(_TOKENS_A_DIMENSION * hidden_size, _FEWEST_TOKENS), _MOST_TOKENS)


def _dressed(public: Iterator[str], seed: int) -> list[str]:
    """Return public passages as code; at least two, as of fewer nothing can be measured."""
    passages = text.sample_passages(public, _DRESSED_PASSAGES, seed) or [""]
    passages = passages if len(passages) > 1 else 2 * passages
    return [text.as_code(passage, number) for number, passage in enumerate(passages)]


def _within(name: str, passages: Sequence[Tensor], routed: Any, reporter: Reporter, world: World) -> Tensor:
    """Return how router inputs vary inside passages of another kind of text, (L, H, H)."""
    with reporter.progress(f"measuring {name}", len(passages), "passages") as bar:
        return routing.measure_passages(routed, passages, bar.advance, world).within.cpu()
