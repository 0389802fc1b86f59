"""The stages that score: every bundle and baseline, document by document, so that intervals can be drawn."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from recipes import Recipe, Variant
from stages import TOP_K, make_rows, tune
from torch import Tensor
from work import Work, write_json

import flexctl
from flexctl.bundle import PUBLIC, Anchor, RawTensor, open_anchor, open_expert, open_router_file, reroute_expert
from flexctl.bundle.runnable import open_runnable
from flexctl.evaluation.baselines import Baselines, find_ingredients
from flexctl.evaluation.domains import Domain, score_domain
from flexctl.evaluation.scoring import Score
from flexctl.model.building import build_model, load_tokenizer, pick_device, pick_dtype
from flexctl.model.routed import exclude, set_top_k
from flexctl.model.tensors import to_bytes, to_torch
from flexctl.routing.rows import bias_of, set_bias
from flexctl.routing.space import RouterSpace
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
        with merged(work, variant) as bundle:
            write_json(path, score(work, bundle, [PUBLIC, *work.names]))

    work.stage(path, make)


def score_removal(work: Work, variant: Variant) -> None:
    """Score a variant's merged model on everything with each expert left out."""
    path = work.root / "scores" / "removal" / f"{variant.name}.json"

    def make() -> None:
        with merged(work, variant) as bundle:
            write_json(path, {name: score(work, bundle, [PUBLIC, *work.names], name) for name in work.names})

    work.stage(path, make)


@contextmanager
def merged(work: Work, variant: Variant) -> Iterator[Path]:
    """Give a variant's merged model, which is deleted after the block."""
    folder = work.root / "unfinished" / "merging" / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    experts = tuple(edited(work, variant, name, folder / f"{name}.st") for name in work.names)
    top_k = min(variant.top_k or TOP_K, len(experts) + 1)
    config = flexctl.MergeConfig(experts=experts, anchor=work.anchor, output=folder / "merged", top_k=top_k)
    flexctl.merge(config)
    if variant.tuned:
        tune(work, folder / "merged")
    yield folder / "merged"
    shutil.rmtree(folder)


def edited(work: Work, variant: Variant, name: str, target: Path) -> Path:
    """Return an expert's file, or that of a copy with the rows that the variant asks for."""
    source = work.expert(variant.recipe, name)
    anchor, expert = open_anchor(work.anchor), open_expert(source)
    own = to_torch(expert.router())
    rows = edited_rows(work, variant, name, anchor, own)
    if rows is own:
        return source
    raw = RawTensor(*to_bytes(rows))
    reroute_expert(target, anchor=anchor, expert=expert, rows=raw, router=expert.manifest.router, overwrite=True)
    return target


def edited_rows(work: Work, variant: Variant, name: str, anchor: Anchor, rows: Tensor) -> Tensor:
    """Return an expert's rows (layers, hidden_size) as a variant wants them; the same tensor where nothing changes."""
    space = RouterSpace.from_tensors(anchor.router_space())
    if variant.rows:
        make_rows(work, variant.rows, name)
        rows = to_torch(open_router_file(work.rows(variant.rows, name), anchor).rows)
    if variant.scale != 1:
        rows = variant.scale * rows
    if not variant.bias:
        rows = set_bias(rows, space, 0.0)
    if variant.shift:
        rows = set_bias(rows, space, bias_of(rows, space) + variant.shift)
    return rows


def score_all_baselines(work: Work) -> None:
    path = work.root / "scores" / "baselines.json"

    def make() -> None:
        device = pick_device("auto")
        ingredients = find_ingredients(work.dense, open_anchor(work.anchor).weights(), work.names, work.anchor)
        domains = [Domain(name=name, path=work.test(name)) for name in (PUBLIC, *work.names)]
        baselines = Baselines(
            ingredients,
            load_tokenizer(work.anchor),
            seq_len=work.budget.seq_len,
            batch_tokens=BATCH_TOKENS,
            top_k=TOP_K,
            device=device,
            dtype=pick_dtype(work.budget.dtype, device),
            reporter=SILENT,
        )
        found = baselines.score(domains)
        write_json(path, {name: {domain: listed(s) for domain, s in by.items()} for name, by in found.items()})

    work.stage(path, make)


def score(work: Work, bundle: Path, domains: Sequence[str], without: str | None = None) -> dict[str, list[list[float]]]:
    """Return {domain: (nats, targets, bytes) of each document} of an anchor, an expert or a merged model.

    Args:
        work: The run.
        bundle: What to score.
        domains: On which sets.
        without: An expert to leave out.
    """
    runnable, device = open_runnable(bundle, work.anchor), pick_device("auto")
    model = build_model(runnable.weights, device=device, dtype=pick_dtype(work.budget.dtype, device))
    selection = runnable.select([without] if without else [])
    set_top_k(model, runnable.active(None, selection, SILENT))
    exclude(model, selection.left_out)
    tokenizer = load_tokenizer(work.anchor)

    def on(name: str) -> Score:
        domain, seq_len = Domain(name=name, path=work.test(name)), work.budget.seq_len
        return score_domain(model, tokenizer, domain, seq_len=seq_len, batch_tokens=BATCH_TOKENS, reporter=SILENT)

    return {name: listed(on(name)) for name in domains}


def listed(score: Score) -> list[list[float]]:
    return [[round(figure, 4) for figure in document] for document in score.per_document.tolist()]
