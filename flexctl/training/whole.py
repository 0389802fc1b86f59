"""Training every weight of a dense model on public text: from scratch, or annealing."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flexctl.runtime import Reporter
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, ParameterGroup, train
from flexctl.training.tokens import Mixture, TokenStream

__all__ = ["WholeSettings", "train_whole"]

_WARMUP_SHARE = 0.05
_CHECKPOINT_STEPS = 200
_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeSettings:
    """How a whole model is trained.

    Attributes:
        max_tokens: Training tokens; text is gone over as often as that takes.
        weight_decay: On every weight.
    """

    max_tokens: int
    seq_len: int
    batch_tokens: int
    lr: float
    seed: int
    weight_decay: float = 0.1


def train_whole(
    model: Any,
    stream: TokenStream,
    settings: WholeSettings,
    *,
    work: Path,
    resume: bool,
    autocast: torch.dtype | None,
    reporter: Reporter,
) -> tuple[int, float]:
    """Train all of ``model`` in place and return (tokens, mean loss of the last steps in nats a token).

    Args:
        model: A dense Transformers model in float32.
        stream: Public text.
        settings: How.
        work: Folder for checkpoints.
        resume: Whether to go on from the newest of them.
        autocast: Dtype of matrix products, or None.
        reporter: Hears of progress.
    """
    batch_size = max(1, settings.batch_tokens // settings.seq_len)
    data = Mixture(stream, None, seq_len=settings.seq_len, batch_size=batch_size, public_share=0.0, seed=settings.seed)
    steps = data.steps_for(settings.max_tokens)
    loop = LoopSettings(
        steps=steps,
        lr=settings.lr,
        warmup_steps=max(1, round(steps * _WARMUP_SHARE)),
        micro_batch=max(1, _MICRO_BATCH_TOKENS // settings.seq_len),
        weight_decay=settings.weight_decay,
        autocast=autocast,
    )
    identity = {**asdict(settings), "stream_tokens": len(stream), "parameters": model.num_parameters()}
    checkpoints = Checkpoints(
        work / "checkpoints", identity, every_steps=_CHECKPOINT_STEPS, resume=resume, reporter=reporter
    )
    model.requires_grad_(True).train()
    outcome = train(
        model,
        [ParameterGroup(parameters=list(model.parameters()))],
        data,
        loop,
        reporter=reporter,
        checkpoints=checkpoints,
    )
    recent = outcome.losses[-20:]
    return data.own_tokens(steps), sum(recent) / len(recent)
