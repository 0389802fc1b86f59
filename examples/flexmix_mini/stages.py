"""The stages that train: anchor, router rows, experts, and what the baselines need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from budgets import ANNEAL_LR, CHECKPOINT_LR, PUBLIC_MIX
from classifier import fit_classifier, save_classifier
from recipes import Recipe
from upcycled import btx_start, save_mixture, train_mixture, upcycle
from work import Work, say, whole

import flexctl
from flexctl.bundle import (
    PUBLIC,
    RawTensor,
    RouterInfo,
    open_anchor,
    write_router_file,
)
from flexctl.bundle.comparable import open_checkpoint
from flexctl.evaluation.baselines import CLASSIFIER_FILE
from flexctl.model.building import autocast_dtype, build_model, load_dense, load_tokenizer, pick_device
from flexctl.model.tensors import to_bytes
from flexctl.routing.space import measure_documents
from flexctl.runtime import SILENT
from flexctl.text.corpus import Corpus, prepare_corpus
from flexctl.text.documents import read_documents, sample_passages
from flexctl.text.sample import PublicSample
from flexctl.text.tokens import Framed, TokenStream, frame_documents, frame_passages, pack
from flexctl.training.whole import WholeSettings, train_whole

TOP_K = 4
RANDOM_STD = 0.02
EPOCHS = 1000.0
EVERY_HELD_OUT = 20


def make_anchor(work: Work) -> None:
    budget = work.budget
    if work.source is None:
        how: dict[str, Any] = {"preset": budget.preset, "max_tokens": budget.anchor_tokens}
        how |= {"batch_tokens": budget.anchor_batch_tokens}
    else:
        how = {"source": str(work.source), "anneal_tokens": budget.anchor_tokens, "lr": ANNEAL_LR}
        how |= {"seq_len": budget.seq_len, "batch_tokens": budget.anchor_batch_tokens}
    config = flexctl.InitAnchorConfig(
        data=(work.train(PUBLIC),),
        output=work.anchor,
        sample_tokens=budget.sample_tokens,
        seed=work.seed,
        resume=True,
        **how,
    )
    work.stage(work.anchor, lambda: flexctl.init_anchor(config))


def make_rows(work: Work, kind: str, name: str) -> None:
    """Write a set's router rows of a kind: see ``Recipe.rows``."""
    path = work.rows(kind, name)
    if kind == "random":
        work.stage(path, lambda: random_rows(work, name, path))
        return
    router, _, share = kind.partition("-")
    config = flexctl.EmbedRouterConfig(
        data=(work.train(name),),
        anchor=work.anchor,
        router=router,
        **({"own_covariance": float(share)} if share else {}),
        encoder=work.encoder,
        output=path,
        seed=work.seed,
        dtype=work.budget.dtype,
    )
    work.stage(path, lambda: flexctl.embed_router(config))


def random_rows(work: Work, name: str, path: Path) -> None:
    anchor = open_anchor(work.anchor)
    sizes = anchor.manifest.architecture
    generator = torch.Generator().manual_seed(work.seed + work.names.index(name))
    rows = RANDOM_STD * torch.randn(sizes.num_hidden_layers, sizes.hidden_size, generator=generator)
    bias = (0.0,) * sizes.num_hidden_layers
    info = RouterInfo(kind="random", samples=0, encoder=None, trained=False, bias=bias)
    write_router_file(path, anchor=anchor, name=name, rows=RawTensor(*to_bytes(rows)), router=info, overwrite=False)


def make_expert(work: Work, recipe: Recipe, name: str) -> None:
    make_rows(work, recipe.rows, name)
    path = work.expert(recipe.name, name)
    rows = str(work.rows(recipe.rows, name))
    if not recipe.pair:
        imported = flexctl.ImportExpertConfig(
            dense=str(work.dense / name),
            data=(work.train(name),),
            anchor=work.anchor,
            name=name,
            output=path,
            ffn_only=True,
            router=rows,
        )
        work.stage(path, lambda: flexctl.import_expert(imported))
        return
    config = flexctl.TrainExpertConfig(
        data=(work.train(name),),
        anchor=work.anchor,
        name=name,
        output=path,
        router=rows,
        max_tokens=work.budget.expert_tokens,
        epochs=EPOCHS,
        seq_len=work.budget.seq_len,
        batch_tokens=work.budget.batch_tokens,
        public_mix=recipe.public_mix,
        dtype=work.budget.dtype,
        seed=work.seed,
        resume=True,
    )
    work.stage(path, lambda: flexctl.train_expert(config))


def make_dense(work: Work, name: str) -> None:
    """Train the whole anchor on what an expert trains on, batch by batch."""

    def make() -> None:
        model, tokenizer = load_dense(work.anchor), load_tokenizer(work.anchor)
        stored = model.config.dtype
        train(work, f"dense-{name}", train_whole, model, own_corpus(work, name).stream, work.budget.expert_tokens)
        with whole(work.dense / name) as folder:
            model.to(device="cpu", dtype=stored).save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    work.stage(work.dense / name, make)


def make_proxy(work: Work, name: str) -> Path:
    """Choose public documents that are like a set."""
    path = work.root / "proxies" / f"{name}.proxy.json"
    config = flexctl.SelectProxyConfig(
        data=(work.train(name),),
        anchor=work.anchor,
        name=name,
        output=path,
        public=work.train(PUBLIC),
        count=work.budget.proxy_documents,
        seed=work.seed,
        dtype=work.budget.dtype,
    )
    work.stage(path, lambda: flexctl.select_proxy(config))
    return path


def tune(work: Work, bundle: Path) -> None:
    """Tune a merged model's router in place, on the tokens of one expert; leave it where that gains nothing."""
    config = flexctl.TuneRouterConfig(
        merged=bundle,
        proxy=tuple(make_proxy(work, name) for name in work.names),
        anchor=work.anchor,
        public=work.train(PUBLIC),
        max_tokens=work.budget.expert_tokens,
        seq_len=work.budget.seq_len,
        batch_tokens=work.budget.batch_tokens,
        seed=work.seed,
        dtype=work.budget.dtype,
        overwrite=True,
    )
    try:
        flexctl.tune_router(config)
    except (flexctl.UsageError, flexctl.BundleError):
        raise
    except flexctl.FlexctlError as refused:
        say(f"{bundle.name}: stays as it is: {refused}")


def make_btx(work: Work) -> None:
    """Turn the dense experts into a mixture and train it on public text, with the budget of one expert."""

    def make() -> None:
        anchor = open_anchor(work.anchor).weights()
        models = {PUBLIC: anchor} | {name: open_checkpoint(work.dense / name, anchor) for name in work.names}
        model = mixture_of(btx_start(models, min(TOP_K, len(models)), work.seed))
        tokens = round(work.budget.expert_tokens / (1 - PUBLIC_MIX))
        train(work, "btx", train_mixture, model, public_stream(work), tokens, public_share=0.0)
        save(work, model, work.dense / "btx")

    work.stage(work.dense / "btx", make)


def make_unrestricted(work: Work, folder: str, share: float) -> None:
    """Upcycle the anchor and train it on ``share`` of the tokens that all experts see together."""

    def make() -> None:
        model = mixture_of(open_anchor(work.anchor).weights())
        experts = len(work.names) + 1
        upcycle(model, experts, min(TOP_K, experts), work.seed)
        tokens = round(share * work.budget.expert_tokens * len(work.names))
        train(work, folder, train_mixture, model, union(work), tokens)
        save(work, model, work.dense / folder)

    work.stage(work.dense / folder, make)


def make_classifier(work: Work) -> None:
    path = work.dense / CLASSIFIER_FILE

    def make() -> None:
        model, tokenizer = mixture_of(open_anchor(work.anchor).weights()), load_tokenizer(work.anchor)
        embedded = {}
        for name in (PUBLIC, *work.names):
            passages = sample_passages(read_documents([work.train(name)]), work.budget.classifier_passages, work.seed)
            embedded[name] = measure_documents(model, frame_passages(tokenizer, passages))
        save_classifier(fit_classifier(embedded), path)

    work.stage(path, make)


def train(
    work: Work,
    name: str,
    how: Callable[..., Any],
    model: Any,
    stream: TokenStream,
    tokens: int,
    public_share: float = PUBLIC_MIX,
) -> None:
    """Train every weight of a model in place, on top of ``tokens`` with a share of public text."""
    budget, device = work.budget, pick_device("auto")
    settings = WholeSettings(
        max_tokens=tokens,
        seq_len=budget.seq_len,
        batch_tokens=budget.batch_tokens,
        lr=budget.whole_lr if work.source is None else CHECKPOINT_LR,
        seed=work.seed,
        public_share=public_share,
    )
    how(
        model.to(device),
        stream,
        settings,
        work=work.root / "unfinished" / name,
        resume=True,
        autocast=autocast_dtype(budget.dtype, device),
        reporter=SILENT,
        public=public_stream(work) if public_share else None,
    )


def mixture_of(weights: Any) -> Any:
    return build_model(weights, device=pick_device("auto"), dtype=torch.float32)


def save(work: Work, model: Any, path: Path) -> None:
    with whole(path) as folder:
        save_mixture(model, folder, load_tokenizer(work.anchor))


def own_corpus(work: Work, name: str) -> Corpus:
    """Return a set's training text exactly as train-expert splits it."""
    folder = work.root / "tokens" / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(work.anchor)
    return prepare_corpus([work.train(name)], tokenizer, folder, seed=work.seed, reporter=SILENT)


def public_stream(work: Work) -> TokenStream:
    """Return the public sample but for the documents that train-expert holds out."""
    sample = PublicSample.from_tensors(open_anchor(work.anchor).public_sample())
    return PublicSample([text for i, text in enumerate(sample.documents) if i % EVERY_HELD_OUT]).stream()


def union(work: Work) -> TokenStream:
    """Return as much of every set as its expert sees, one after the other."""

    def documents() -> Iterator[Framed]:
        for name in work.names:
            left = work.budget.expert_tokens
            for framed in frame_documents(load_tokenizer(work.anchor), own_corpus(work, name).documents()):
                if left <= 0:
                    break
                left -= len(framed.tokens)
                yield framed

    folder = work.root / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    return pack(folder / "union.tokens", documents())
