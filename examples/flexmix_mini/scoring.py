"""The stages that score: every bundle and baseline, document by document, so that intervals can be drawn."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from recipes import Recipe, Variant
from stages import TOP_K
from work import Work, write_json

import flexctl
from flexctl.bundle import PUBLIC, RawTensor, open_anchor, open_expert, open_router_file, reroute_expert
from flexctl.bundle.runnable import open_runnable
from flexctl.evaluation.baselines import find_ingredients, score_baselines
from flexctl.evaluation.domains import Domain, score_domain
from flexctl.evaluation.scoring import Score
from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype
from flexctl.model.routed import set_top_k
from flexctl.model.rows import set_bias, set_public_logits
from flexctl.model.space import RouterSpace
from flexctl.model.tensors import to_bytes, to_torch
from flexctl.runtime import SILENT

BATCH_TOKENS = 8192


def score_anchor(work: Work) -> None:
    path = work.root / "scores" / "anchor.json"
    work.stage(path, lambda: write_json(path, score(work, work.anchor, [PUBLIC, *work.names])))


def score_pairs(work: Work, recipe: Recipe) -> None:
    """Score every expert of a recipe beside the public one, on its own set."""
    path = work.root / "scores" / "pairs" / f"{recipe.name}.json"

    def make() -> None:
        found = {name: score(work, work.expert(recipe.name, name), [name])[name] for name in work.names}
        write_json(path, found)

    work.stage(path, make)


def score_variant(work: Work, variant: Variant) -> None:
    """Merge a variant's experts, their rows edited, score the merged model, and delete it."""
    path = work.root / "scores" / "variants" / f"{variant.name}.json"

    def make() -> None:
        folder = work.root / "unfinished" / "merging"
        shutil.rmtree(folder, ignore_errors=True)
        experts = tuple(edited(work, variant, name, folder / f"{name}.st") for name in work.names)
        top_k = min(variant.top_k or TOP_K, len(experts) + 1)
        config = flexctl.MergeConfig(experts=experts, anchor=work.anchor, output=folder / "merged", top_k=top_k)
        flexctl.merge(config)
        write_json(path, score(work, folder / "merged", [PUBLIC, *work.names]))
        shutil.rmtree(folder)

    work.stage(path, make)


def edited(work: Work, variant: Variant, name: str, target: Path) -> Path:
    """Return an expert's file, or that of a copy with the rows that the variant asks for."""
    source = work.expert(variant.recipe, name)
    if variant.edit is None:
        return source
    anchor, expert = open_anchor(work.anchor), open_expert(source)
    space = RouterSpace.from_tensors(anchor.router_space())
    rows = to_torch(expert.router())
    if isinstance(variant.edit, tuple):
        rows = set_public_logits(rows, space, *variant.edit)
    elif variant.edit.startswith("start"):
        rows = to_torch(open_router_file(work.rows(expert.manifest.router.kind, name), anchor).rows)
    if str(variant.edit).endswith("no bias"):
        rows = set_bias(rows, space, 0.0)
    raw = RawTensor(*to_bytes(rows))
    reroute_expert(target, anchor=anchor, expert=expert, rows=raw, router=expert.manifest.router, overwrite=True)
    return target


def score_all_baselines(work: Work) -> None:
    path = work.root / "scores" / "baselines.json"

    def make() -> None:
        device = pick_device("auto")
        ingredients = find_ingredients(work.dense, open_anchor(work.anchor).weights(), work.names, work.anchor)
        found = score_baselines(
            ingredients,
            load_tokenizer(work.anchor),
            [Domain(name=name, path=work.test(name)) for name in (PUBLIC, *work.names)],
            seq_len=work.budget.seq_len,
            batch_tokens=BATCH_TOKENS,
            top_k=TOP_K,
            device=device,
            dtype=pick_dtype("auto", device),
            reporter=SILENT,
        )
        write_json(path, {name: {domain: listed(s) for domain, s in by.items()} for name, by in found.items()})

    work.stage(path, make)


def score(work: Work, bundle: Path, domains: Sequence[str]) -> dict[str, list[list[float]]]:
    """Return {domain: (nats, targets, bytes) of each document} of an anchor, an expert or a merged model."""
    runnable, device = open_runnable(bundle, work.anchor), pick_device("auto")
    model = build_model(runnable.weights, device=device, dtype=pick_dtype("auto", device))
    set_top_k(model, runnable.weights.num_experts_per_tok)
    tokenizer = load_tokenizer(work.anchor)

    def on(name: str) -> Score:
        domain, seq_len = Domain(name=name, path=work.test(name)), work.budget.seq_len
        return score_domain(model, tokenizer, domain, seq_len=seq_len, batch_tokens=BATCH_TOKENS, reporter=SILENT)

    return {name: listed(on(name)) for name in domains}


def listed(score: Score) -> list[list[float]]:
    return [[round(figure, 4) for figure in document] for document in score.per_document.tolist()]
