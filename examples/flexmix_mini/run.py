"""The whole comparison on real text: anchor, experts, every baseline, every ablation, one table.

    python examples/flexmix_mini/run.py --data DIR --budget cpu

DIR holds a folder a set, each with train.jsonl and test.jsonl, one of them called public. Everything goes into
./flexmix-mini-BUDGET (or --output): RESULTS.md and results.json at its top, a folder a seed below. Run it again after
an interruption and it goes on where it was. Budgets: smoke (minutes on one core), cpu (an hour on two), checkpoint
(an hour or two on two, with a checkpoint of some 100M parameters as --anchor), gpu (all text).

    --anchor CHECKPOINT_DIR   anneal this dense checkpoint in place of training an anchor from scratch
    --encoder MODEL           also try router rows from this sentence encoder
    --sets public news code   only these sets take part, public among them
    --seeds 0 1 2             repeat the default and the baselines with other seeds; seed 0 tries everything else

Seeds may run side by side, each in a process of its own with the same --output; a last run with all of them writes
their table.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from budgets import BUDGETS, PUBLIC_MIX
from flops import Matrices
from recipes import DEFAULT, MAIN_RECIPES, MAIN_VARIANTS, RECIPES, THOROUGH_SEED, VARIANTS, Recipe, Variant
from scoring import score_all_baselines, score_anchor, score_pairs, score_removal, score_variant
from stages import TOP_K, make_anchor, make_btx, make_classifier, make_dense, make_expert, make_unrestricted
from table import read_removals, read_scores, rows_of, write_results
from work import Work, hold_settings, prepare_data, say

from flexctl.bundle import open_anchor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--budget", choices=BUDGETS, required=True)
    parser.add_argument("--anchor", default="scratch")
    parser.add_argument("--encoder")
    parser.add_argument("--sets", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()

    root = asked.output or Path(f"flexmix-mini-{asked.budget}")
    source = None if asked.anchor == "scratch" else Path(asked.anchor)
    budget = BUDGETS[asked.budget]
    if asked.sets:
        budget = replace(budget, domains=tuple(asked.sets))
    told = {"budget": asked.budget, "anchor": source.name if source else budget.preset, **asdict(budget)}
    runs = [
        Work(root=root / f"seed-{seed}", budget=budget, source=source, encoder=asked.encoder, seed=seed)
        for seed in asked.seeds
    ]
    for work in runs:
        hold_settings(work.root, {**told, "encoder": asked.encoder, "seed": work.seed})
        run_main(work, asked.data)
    for work in runs:
        if work.seed == THOROUGH_SEED:
            run_everything(work)
    rows = rows_of([read_scores(work.root) for work in runs], training_cost(runs[0]))
    removals = [removed for work in runs for removed in read_removals(work.root)]
    write_results(root, rows, removals, {**told, "seeds": asked.seeds})
    say(f"{root / 'RESULTS.md'} and {root / 'results.json'} are written")


def run_main(work: Work, data: Path) -> None:
    """Train and score the default and the baselines, as far as they are not there yet."""
    prepare_data(data, work)
    make_anchor(work)
    score_anchor(work)
    for recipe in RECIPES:
        if recipe.name in MAIN_RECIPES:
            try_recipe(work, recipe)
    for variant in VARIANTS:
        if variant.name in MAIN_VARIANTS:
            score_variant(work, variant)
    for name in work.names:
        make_dense(work, name)
    make_classifier(work)
    make_btx(work)
    for folder, share in work.budget.unrestricted.items():
        make_unrestricted(work, folder, share)
    score_all_baselines(work)


def run_everything(work: Work) -> None:
    """Train and score whatever else the budget has room for."""
    recipes, variants = wanted(work)
    for recipe in recipes:
        try_recipe(work, recipe)
    for variant in variants:
        score_variant(work, variant)
        if variant.name == DEFAULT:
            score_removal(work, variant)


def try_recipe(work: Work, recipe: Recipe) -> None:
    for name in work.names:
        make_expert(work, recipe, name)
    score_pairs(work, recipe)


def wanted(work: Work) -> tuple[list[Recipe], list[Variant]]:
    """Return the budget's recipes and variants; those with encoder rows only where there is an encoder."""
    budget = work.budget
    recipes = [recipe for recipe in RECIPES if budget.recipes is None or recipe.name in budget.recipes]
    names = {recipe.name for recipe in recipes}
    variants = [
        variant
        for variant in VARIANTS
        if (budget.variants is None or variant.name in budget.variants)
        and (work.encoder or variant.rows != "encoder")
        and variant.recipe in names
    ]
    return recipes, variants


def training_cost(work: Work) -> dict[str, float]:
    """Return row -> operations of all training after the anchor's, counted as docs/baselines.md says."""
    matrices = Matrices.of(open_anchor(work.anchor).config)
    experts = len(work.names)
    tokens = work.budget.expert_tokens / (1 - PUBLIC_MIX)
    active = min(TOP_K, experts + 1)
    dense, mixture = matrices.training(), matrices.training(active, experts + 1)
    blends = ("soup", "ties", "dare", "weighted soup", "btm", "perplexity routing", "prompt routing")
    names = ["own dense expert", *blends, *(f"{name} oracle" for name in blends[3:])]
    return {
        "anchor": 0.0,
        DEFAULT: experts * tokens * matrices.pair_training(),
        **dict.fromkeys(names, experts * tokens * dense),
        "btx": experts * tokens * dense + tokens * mixture,
        **{name: share * experts * tokens * mixture for name, share in work.budget.unrestricted.items()},
    }


if __name__ == "__main__":
    main()
