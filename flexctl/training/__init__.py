"""The one training loop, what it trains, its batches and its checkpoints."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "batches": ("EqualShares", "Mixture"),
    "budget": (
        "MOST_PASSAGES",
        "Budget",
        "default_lr",
        "held_out_tokens",
        "passages",
        "resolve_budget",
        "warmup_steps",
    ),
    "checkpoints": ("Checkpoints",),
    "finished": ("asked_for", "before_after", "folder_digest", "refuse_other_request", "say_done"),
    "footprint": ("Sizes", "Step", "flops_per_token", "least_bytes", "memory_of_step"),
    "loop": ("LoopSettings", "Outcome", "train"),
    "pair": ("Pair",),
    "private": ("PrivateSteps", "gradient_norm", "train_privately"),
    "ranks": ("Factors", "choose_ranks", "expert_matrices"),
    "track": ("Track", "log_beside", "tracked"),
    "tuning": ("RouterTuning",),
    "whole": ("WholeSettings", "train_whole"),
    "work": ("refuse_busy", "working_folder"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
