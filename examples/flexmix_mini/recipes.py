"""What is tried: ways to train experts, and ways to merge what was trained."""

from __future__ import annotations

from dataclasses import dataclass

from budgets import PUBLIC_MIX


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to train all experts.

    Attributes:
        name: Of its folder.
        rows: Its router rows: a kind, ``discriminant-A`` with a share A of the owner's covariance, or random.
        public_mix: Share of public text.
        pair: False takes the feed-forward networks of the dense experts, which trained without the public one beside.
    """

    name: str
    rows: str = "discriminant"
    public_mix: float = PUBLIC_MIX
    pair: bool = True


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to merge experts.

    Attributes:
        name: In the table.
        recipe: Whose experts.
        rows: Other rows that are put in; None leaves those that the experts trained behind.
        scale: What the rows are multiplied by.
        shift: How far their mean public logit moves.
        bias: False sets the mean public logit to 0.
        top_k: Experts kept for each token; None is 4, or all of fewer.
        tuned: Whether the merged model's router is tuned on proxies.
        about: What it shows.
    """

    name: str
    recipe: str = "discriminant"
    rows: str | None = None
    scale: float = 1.0
    shift: float = 0.0
    bias: bool = True
    top_k: int | None = None
    tuned: bool = False
    about: str


OTHER_ROWS = ("hidden", "encoder", "random", *(f"discriminant-{share}" for share in (0, 0.02, 0.05, 0.2)))
SHARES = (0.0, 0.15, 0.5)
DEFAULT = "flexctl"

RECIPES = (
    Recipe(name="discriminant"),
    Recipe(name="no-pair", pair=False),
    *(Recipe(name=f"public-{share:.0%}".rstrip("%"), public_mix=share) for share in SHARES),
)

MAIN_RECIPES = ("discriminant",)
MAIN_VARIANTS = (DEFAULT,)
"""What every seed trains and scores beside the baselines."""

THOROUGH_SEED = 0
"""Which seed tries everything else."""

VARIANTS = (
    Variant(name=DEFAULT, about="the default recipe: discriminant rows with 0.1 of own covariance, 30 % public text"),
    Variant(name="no bias", bias=False, about="paper's ablation: each row's mean public logit set to 0"),
    Variant(
        name="no pair training", recipe="no-pair", about="paper's ablation: feed-forward networks of dense experts"
    ),
    *(Variant(name=f"top-{k}", top_k=k, about=f"{k} active") for k in (1, 2, 8)),
    Variant(name="tuned router", tuned=True, about="paper's: rows tuned on public text like each set, and public text"),
    *(
        Variant(name=f"{rows} rows", rows=rows, about="ours: other rows beside the same networks")
        for rows in OTHER_ROWS
    ),
    Variant(name="half the scale", scale=0.5, about="ours: rows halved"),
    Variant(name="twice the scale", scale=2.0, about="ours: rows doubled"),
    *(
        Variant(name=f"bias lowered by {nats:g}", shift=-nats, about="ours: every row moved along u")
        for nats in (1.0, 2.0)
    ),
    *(
        Variant(
            name=f"public share {share:.0%}",
            recipe=f"public-{share:.0%}".rstrip("%"),
            about="ours: share of public text in training",
        )
        for share in SHARES
    ),
)
