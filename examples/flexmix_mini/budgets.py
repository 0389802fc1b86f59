"""How much of everything: four budgets, and the settings that a run writes down."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a run trains and scores.

    Attributes:
        preset: Size of an anchor from scratch.
        anchor_tokens: Its training tokens, or those that a checkpoint is annealed on.
        anchor_batch_tokens: Tokens an optimiser step of its training.
        sample_tokens: Public text that goes with it.
        expert_tokens: The owner's tokens an expert; a third as many public ones come on top.
        seq_len: Tokens a sequence, in training and in scoring.
        batch_tokens: Tokens an optimiser step.
        domains: Sets that take part, public among them; None is all.
        public_bytes: Public text kept for training; None is all.
        train_bytes: Text kept of each other training set; None is all.
        test_bytes: Text scored of each test set; None is all.
        document_bytes: Text scored of each document, some windows of it, so that there are many; None is all.
        whole_lr: Learning rate where every weight trains, from an anchor from scratch.
        dtype: Of matrix products in training and of models in scoring.
        classifier_passages: Passages a set that the prompt classifier learns from.
        proxy_documents: Public documents in each set's list for tuning the router.
        unrestricted: Mixtures trained on everything -> share of all experts' tokens that each sees.
        recipes: Ways of training that are tried; None is all.
        variants: Ways of merging that are tried; None is all that the recipes allow.
    """

    preset: str
    anchor_tokens: int
    anchor_batch_tokens: int
    expert_tokens: int
    seq_len: int
    batch_tokens: int
    domains: tuple[str, ...] | None = None
    sample_tokens: int = 1_000_000
    public_bytes: int | None = None
    train_bytes: int | None = None
    test_bytes: int | None = None
    document_bytes: int | None = None
    whole_lr: float = 1e-3
    dtype: str = "auto"
    classifier_passages: int = 128
    proxy_documents: int = 200
    unrestricted: dict[str, float] = field(default_factory=lambda: {"unrestricted": 0.5, "unrestricted-2x": 1.0})
    recipes: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None


ANNEAL_LR = 1e-4

CHECKPOINT_LR = 2.2e-4
"""Where every weight of a checkpoint trains: dense experts, BTX, mixtures. What experts get by default at width 576."""

PUBLIC_MIX = 0.3

BUDGETS = {
    "smoke": Budget(
        preset="nano",
        anchor_tokens=8_000,
        anchor_batch_tokens=512,
        expert_tokens=2_000,
        seq_len=64,
        batch_tokens=512,
        domains=("public", "code", "math"),
        public_bytes=40_000,
        train_bytes=40_000,
        test_bytes=8_000,
        document_bytes=2_000,
        proxy_documents=20,
    ),
    "cpu": Budget(
        preset="nano",
        anchor_tokens=600_000,
        anchor_batch_tokens=512,
        expert_tokens=50_000,
        seq_len=256,
        batch_tokens=1024,
        sample_tokens=200_000,
        train_bytes=300_000,
        test_bytes=20_000,
        document_bytes=2_000,
        whole_lr=2e-3,
    ),
    "checkpoint": Budget(
        preset="none",
        anchor_tokens=40_000,
        anchor_batch_tokens=2048,
        expert_tokens=8_192,
        seq_len=256,
        batch_tokens=1024,
        sample_tokens=40_000,
        train_bytes=100_000,
        test_bytes=16_000,
        document_bytes=2_000,
        dtype="bfloat16",
        classifier_passages=16,
        unrestricted={"unrestricted": 0.5},
        recipes=("discriminant",),
        variants=(
            "flexctl",
            "discriminant-0 rows",
            "discriminant-0.2 rows",
            "half the scale",
            "hidden rows",
            "encoder rows",
            "no bias",
            "top-1",
            "bias lowered by 1",
        ),
    ),
    "gpu": Budget(
        preset="small",
        anchor_tokens=5_000_000,
        anchor_batch_tokens=4096,
        expert_tokens=1_000_000,
        seq_len=1024,
        batch_tokens=8192,
    ),
}
