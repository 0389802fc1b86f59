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
        rows: Kind of untrained rows that are put in; None leaves the trained ones.
        scale: What the rows are multiplied by.
        shift: How far their mean public logit moves.
        public_logits: Mean and deviation that public logits get.
        bias: False sets the mean public logit to 0.
        top_k: Experts kept for each token; None is 4, or all of fewer.
        tuned: Whether the merged model's router is tuned on proxies.
        removal: Also score the model with each expert left out.
        about: What it shows.
    """

    name: str
    recipe: str = "discriminant"
    rows: str | None = None
    scale: float = 1.0
    shift: float = 0.0
    public_logits: tuple[float, float] | None = None
    bias: bool = True
    top_k: int | None = None
    tuned: bool = False
    removal: bool = False
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

MAIN_RECIPES = ("discriminant",)
MAIN_VARIANTS = (DEFAULT,)
"""What every seed trains and scores beside the baselines; the first seed tries everything."""

VARIANTS = (
    Variant(
        name=DEFAULT,
        removal=True,
        about="the default recipe: discriminant rows, trained and tethered, 30 % public text",
    ),
    Variant(name="no bias", bias=False, about="paper's ablation: each row's mean public logit set to 0 after training"),
    Variant(name="no init", recipe="no-init", about="paper's ablation: rows start small and random"),
    Variant(name="no init, no bias", recipe="no-init", bias=False, about="paper's ablation: neither"),
    Variant(
        name="no pair training", recipe="no-pair", about="paper's ablation: feed-forward networks of dense experts"
    ),
    Variant(name="hidden-state init", recipe="hidden", about="paper's ablation: rows from mean hidden states"),
    *(Variant(name=f"top-{k}", top_k=k, about=f"{k} active") for k in (1, 2, 8)),
    Variant(name="tuned router", tuned=True, about="paper's: rows tuned on public text like each set, and public text"),
    Variant(name="encoder rows, trained", recipe="encoder", about="ours: encoder rows trained"),
    *(Variant(name=f"{k} rows, frozen", recipe=f"{k}-frozen", about=f"ours: {k} rows frozen") for k in KINDS),
    *(Variant(name=f"{k} rows, put back", recipe=k, rows=k, about=f"ours: {k} rows, put back") for k in KINDS),
    *(
        Variant(name=f"{k} rows, put in", rows=k, about=f"ours: {k} rows beside networks trained with the default's")
        for k in KINDS[1:]
    ),
    Variant(name="put back, no bias", rows="discriminant", bias=False, about="ours: start rows without their bias"),
    Variant(name="half the scale", rows="discriminant", scale=0.5, removal=True, about="ours: start rows, halved"),
    Variant(name="twice the scale", rows="discriminant", scale=2.0, about="ours: start rows, doubled"),
    *(
        Variant(
            name=f"bias lowered by {nats:g}",
            shift=-nats,
            removal=True,
            about="ours: the default, every row moved along u",
        )
        for nats in (1.0, 2.0)
    ),
    *(
        Variant(
            name=f"public logits {m:g} +- {d:g}",
            public_logits=(m, d),
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
        Variant(name=f"put back, top-{k}", rows="discriminant", top_k=k, about=f"ours: start rows, {k} active")
        for k in (1, 2, 8)
    ),
)
