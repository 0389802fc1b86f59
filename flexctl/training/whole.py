"""Training every weight of a model: an anchor on public text, or what experts are compared with."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexctl.model.sharding import whole
from flexctl.model.tensors import to_bytes
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.text.tokens import TokenStream
from flexctl.training.batches import Mixture
from flexctl.training.budget import warmup_steps
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, Match, ParameterGroup, train, unmatched
from flexctl.training.track import UNTRACKED, Track

__all__ = ["WholeSettings", "train_whole"]

_MICRO_BATCH_TOKENS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeSettings:
    """How a whole model is trained.

    Attributes:
        max_tokens: Training tokens; text is gone over as often as that takes.
        weight_decay: On every weight.
        public_share: Share of public text in each step, on top of ``max_tokens``.
    """

    max_tokens: int
    seq_len: int
    batch_tokens: int
    lr: float
    seed: int
    weight_decay: float = 0.1
    public_share: float = 0.0


def train_whole(
    model: Any,
    stream: TokenStream,
    settings: WholeSettings,
    *,
    work: Path,
    resume: bool,
    checkpoint_steps: int | None = None,
    autocast: torch.dtype | None,
    reporter: Reporter,
    track: Track = UNTRACKED,
    world: World = ALONE,
    public: TokenStream | None = None,
    match: Match = unmatched,
) -> tuple[int, float]:
    """Train all of ``model`` in place and return (tokens, mean loss of the last steps in nats a token).

    Args:
        model: A Transformers model in float32, as from ``model.dense.build_dense`` where processes share it.
        stream: Text.
        settings: How.
        work: Folder for checkpoints.
        resume: Whether to go on from the newest of them.
        checkpoint_steps: How often one is written; None for by time.
        autocast: Dtype of matrix products, or None.
        reporter: Hears of progress.
        track: As ``loop.train`` takes it.
        world: The processes that train; each has the model or its part of it.
        public: Public text for ``public_share``.
        match: A penalty, as ``loop.train`` takes it.
    """
    batch_size = max(1, settings.batch_tokens // settings.seq_len)
    data = Mixture(
        stream,
        public,
        seq_len=settings.seq_len,
        batch_size=batch_size,
        public_share=settings.public_share,
        seed=settings.seed,
    )
    steps = data.steps_for(settings.max_tokens)
    loop = LoopSettings(
        steps=steps,
        lr=settings.lr,
        warmup_steps=warmup_steps(steps, None),
        micro_batch=max(1, _MICRO_BATCH_TOKENS // settings.seq_len) * world.size,
        weight_decay=settings.weight_decay,
        autocast=autocast,
    )
    identity = {**asdict(settings), "text": stream.digest, "weights": _digest(model)}
    checkpoints = Checkpoints(
        work / "checkpoints",
        identity,
        every_steps=checkpoint_steps,
        resume=resume,
        reporter=reporter,
        world=world,
    )
    model.requires_grad_(True).train()
    # Of dropout, where the model has some. All processes draw alike, so a checkpoint's state is that of each.
    torch.manual_seed(settings.seed % 2**63)
    outcome = train(
        model,
        [ParameterGroup(parameters=list(model.parameters()))],
        data,
        loop,
        reporter=reporter,
        match=match,
        checkpoints=checkpoints,
        track=track,
        world=world,
    )
    return data.own_tokens(steps), outcome.final_loss


def _digest(model: nn.Module) -> str:
    """Return a digest of the weights that training starts from."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(to_bytes(whole(parameter.detach()))[2].data)
    return digest.hexdigest()
