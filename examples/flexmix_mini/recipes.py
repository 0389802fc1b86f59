"""What is tried: ways to train experts, and ways to merge what was trained."""

from __future__ import annotations

from dataclasses import dataclass

from budgets import PUBLIC_MIX


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to train all experts.

    Attributes:
        name: Of its folder.
        rows: Where router rows start: discriminant, hidden, encoder, or random.
        frozen: Whether they stay there.
        public_mix: Share of public text.
        pair: False takes the feed-forward networks of the dense experts, which trained without the public one beside.
    """

    name: str
    rows: str = "discriminant"
    frozen: bool = False
    public_mix: float = PUBLIC_MIX
    pair: bool = True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to merge experts.

    Attributes:
        name: In the table.
        recipe: Whose experts.
        edit: What happens to each expert's rows: nothing, "start" (put back), "no bias" (mean public logit 0),
            "start, no bias", or (mean, deviation) that their public logits get.
        top_k: Experts kept for each token; None is 4, or all of fewer.
        about: What it shows.
    """

    name: str
    recipe: str = "discriminant"
    edit: str | tuple[float, float] | None = None
    top_k: int | None = None
    about: str


KINDS = ("discriminant", "hidden", "encoder")
SHARES = (0.0, 0.15, 0.5)
CALIBRATIONS = ((-1.0, 1.0), (-2.0, 1.0), (-2.0, 2.0), (-4.0, 2.0))
DEFAULT = "flexctl"

RECIPES = (
    *(Recipe(name=kind, rows=kind) for kind in KINDS),
    *(Recipe(name=f"{kind}-frozen", rows=kind, frozen=True) for kind in KINDS),
    Recipe(name="no-init", rows="random"),
    Recipe(name="no-pair", pair=False),
    *(Recipe(name=f"public-{share:.0%}".rstrip("%"), public_mix=share) for share in SHARES),
)

VARIANTS = (
    Variant(name=DEFAULT, about="the default recipe: discriminant rows, trained and tethered, 30 % public text"),
    Variant(
        name="no bias", edit="no bias", about="paper's ablation: each row's mean public logit set to 0 after training"
    ),
    Variant(name="no init", recipe="no-init", about="paper's ablation: rows start small and random"),
    Variant(name="no init, no bias", recipe="no-init", edit="no bias", about="paper's ablation: neither"),
    Variant(
        name="no pair training", recipe="no-pair", about="paper's ablation: feed-forward networks of dense experts"
    ),
    Variant(name="hidden-state init", recipe="hidden", about="paper's ablation: rows from mean hidden states"),
    *(Variant(name=f"top-{k}", top_k=k, about=f"{k} active") for k in (1, 2, 8)),
    *(
        Variant(name=f"{kind} rows, {how}", recipe=f"{kind}{suffix}", edit=edit, about=f"ours: {kind} rows {how}")
        for kind in KINDS
        for how, suffix, edit in (("trained", "", None), ("frozen", "-frozen", None), ("put back", "", "start"))
        if (kind, how) not in {("discriminant", "trained"), ("hidden", "trained")}
    ),
    Variant(name="put back, no bias", edit="start, no bias", about="ours: start rows without their part along u"),
    *(
        Variant(
            name=f"public logits {m:g} +- {d:g}",
            edit=(m, d),
            about="ours: rows scaled and shifted to a set mean and deviation on public text",
        )
        for m, d in CALIBRATIONS
    ),
    *(
        Variant(
            name=f"public share {share:.0%}",
            recipe=f"public-{share:.0%}".rstrip("%"),
            about="ours: share of public text in training",
        )
        for share in SHARES
    ),
    *(
        Variant(name=f"put back, top-{k}", edit="start", top_k=k, about=f"ours: start rows, {k} active")
        for k in (1, 2, 8)
    ),
)
