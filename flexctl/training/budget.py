"""How long and how fast an expert trains: every setting that the user left open, resolved.

The defaults were chosen by measurement on small anchors: docs/results.md, section 2.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MOST_PASSAGES", "Budget", "default_lr", "held_out_tokens", "passages", "resolve_budget", "warmup_steps"]

_MAX_SEQ_LEN = 1024
_MICRO_BATCH_TOKENS = 8192
_WARMUP_SHARE = 0.05
_STEPS = 600
_FEWEST_BATCH_TOKENS = 1024
_MOST_BATCH_TOKENS = 65_536
_LR_AT_WIDTH = (2e-3, 192)
MOST_PASSAGES = 512
_LEAST_LR, _MOST_LR = 5e-5, 2.5e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Resolved settings of a run.

    Attributes:
        own_tokens: The owner's tokens that are asked for.
        seq_len: Targets a sequence.
        batch_size: Sequences a step.
        micro_batch: Sequences that go through the model at once.
        lr: Peak learning rate.
    """

    own_tokens: int
    seq_len: int
    batch_size: int
    micro_batch: int
    lr: float


def resolve_budget(
    *,
    available_tokens: int,
    epochs: float,
    max_tokens: int | None,
    public_mix: float,
    seq_len: int | None,
    batch_tokens: int | None,
    micro_batch: int | None,
    lr: float | None,
    hidden_size: int,
    max_position_embeddings: int | None,
) -> Budget:
    """Return the settings of a run; None among the arguments means the default.

    Args:
        available_tokens: The owner's tokens.
        epochs: Passes over them.
        max_tokens: At most this many of them.
        public_mix: Share of public text on top.
        seq_len: Default 1024, or what the anchor can hold.
        batch_tokens: Default the power of two below a six-hundredth of all tokens, from 1024 to 65,536: small budgets
            gain more from steps than from size.
        micro_batch: Default as many sequences as make 8192 tokens.
        lr: Default 2e-3 at a width of 192, falling with the square of the width, from 2.5e-3 to 5e-5.
        hidden_size: The anchor's width.
        max_position_embeddings: Longest sequence that the anchor can hold, where its config says so.
    """
    length = seq_len or min(_MAX_SEQ_LEN, max_position_embeddings or _MAX_SEQ_LEN)
    own_tokens = epochs * available_tokens
    own_tokens = min(own_tokens, max_tokens or own_tokens)
    tokens = batch_tokens or _batch_tokens(own_tokens / (1 - public_mix))
    return Budget(
        own_tokens=int(own_tokens),
        seq_len=length,
        batch_size=max(1, tokens // length),
        micro_batch=micro_batch or max(1, _MICRO_BATCH_TOKENS // length),
        lr=lr or default_lr(hidden_size),
    )


def warmup_steps(steps: int, asked: int | None) -> int:
    """Return the steps of linear warm-up; by default a twentieth of all, at least one."""
    return max(1, round(steps * _WARMUP_SHARE)) if asked is None else asked


def held_out_tokens(own_tokens: int) -> int:
    """Return how many held-out tokens a run is scored on before and after: a sixteenth of those it trains on.

    At least 4,096 and at most 65,536. The owner's and public ones are scored twice each, so that is a quarter of a
    forward pass over all that is trained on, where a training step costs three.
    """
    return min(max(own_tokens // 16, 4_096), 65_536)


def passages(own_tokens: int) -> int:
    """Return how many passages of some 256 tokens router rows are made from: about half as much text as is trained on.

    At least 128, from which on more hardly make rows better, and at most 512.
    """
    return min(max(own_tokens // 512, 128), MOST_PASSAGES)


def default_lr(hidden_size: int) -> float:
    """Return the peak learning rate of a full expert beside an anchor of a width, where none is given."""
    peak, width = _LR_AT_WIDTH
    return min(max(peak * (width / hidden_size) ** 2, _LEAST_LR), _MOST_LR)


def _batch_tokens(all_tokens: float) -> int:
    wanted = int(all_tokens / _STEPS)
    return min(max(1 << max(0, wanted.bit_length() - 1), _FEWEST_BATCH_TOKENS), _MOST_BATCH_TOKENS)
