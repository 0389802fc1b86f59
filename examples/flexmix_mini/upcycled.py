"""Training a mixture as a whole: what every party's text in one place, or public text after the merge, would give."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flexctl.bundle import PUBLIC, RawTensor, Weights
from flexctl.evaluation.baselines.blends import Blend, soup
from flexctl.families import PROJECTIONS, family_of
from flexctl.model.building import add_expert
from flexctl.model.configs import resolve_moe_config
from flexctl.model.routed import observing, routed_layers, set_top_k
from flexctl.model.tensors import to_bytes
from flexctl.runtime import Reporter
from flexctl.text.tokens import TokenStream
from flexctl.training.whole import WholeSettings, train_whole

__all__ = ["LoadBalance", "btx_start", "save_mixture", "train_mixture", "upcycle"]

BALANCE = 0.01
ROUTER_STD = 0.02


def upcycle(model: nn.Module, num_experts: int, top_k: int, seed: int) -> None:
    """Give every layer copies of its feed-forward network, so that the logits stay as they are.

    Args:
        model: The anchor, as from ``model.building.build_model``.
        num_experts: Experts there shall be.
        top_k: Experts kept for each token.
        seed: Of the router rows, which are drawn small. The first stays zero: a softmax knows only differences.

    Source: Komatsuzaki et al., "Sparse Upcycling" (arXiv 2212.05055).
    """
    generator = torch.Generator().manual_seed(seed)
    hidden_size = routed_layers(model)[0].router.public.shape[1]
    for _ in range(num_experts - 1):
        add_expert(model, ROUTER_STD * torch.randn(len(routed_layers(model)), hidden_size, generator=generator))
    set_top_k(model, top_k)


def btx_start(models: Mapping[str, Weights], top_k: int, seed: int = 0) -> Blend:
    """Return the mixture that BTX trains: the models' feed-forward networks as experts, other weights averaged.

    Args:
        models: By name, the anchor first.
        top_k: Experts kept for each token.
        seed: Of the router rows, which are drawn small; the public one is zero.

    Source: Sukhbaatar et al., "Branch-Train-MiX" (arXiv 2403.07816), section 3.2.
    """
    every = list(models.values())
    generator = torch.Generator().manual_seed(seed)
    layers, hidden_size = len(every[0].router), every[0].router[0].shape[1]
    return Blend(
        dense_config=every[0].dense_config,
        shared=soup(every).shared,
        experts={name: model.experts[PUBLIC] for name, model in models.items()},
        router=[_random_rows(len(every), hidden_size, generator) for _ in range(layers)],
        num_experts_per_tok=top_k,
    )


def _random_rows(count: int, hidden_size: int, generator: torch.Generator) -> RawTensor:
    rows = ROUTER_STD * torch.randn(count, hidden_size, generator=generator)
    rows[0] = 0
    return RawTensor(*to_bytes(rows))


def train_mixture(
    model: Any,
    stream: TokenStream,
    settings: WholeSettings,
    *,
    work: Path,
    resume: bool,
    autocast: torch.dtype | None,
    reporter: Reporter,
    public: TokenStream | None = None,
) -> tuple[int, float]:
    """Train every weight of a mixture in place, its load balanced, and return what ``train_whole`` returns.

    Args:
        model: As from ``model.building.build_model`` in float32, with all its experts.
        stream: Text.
        settings: How.
        work: Folder for checkpoints.
        resume: Whether to go on from the newest of them.
        autocast: Dtype of matrix products, or None.
        reporter: Hears of progress.
        public: Public text for ``settings.public_share``.
    """
    balance = LoadBalance(BALANCE)
    with observing(model, balance.watch):
        return train_whole(
            model,
            stream,
            settings,
            work=work,
            resume=resume,
            autocast=autocast,
            reporter=reporter,
            public=public,
            match=balance.match,
        )


class LoadBalance:
    """Penalty on experts that get unequal shares of the tokens.

    Args:
        weight: Of the penalty, in nats a token.

    Source: Fedus et al., "Switch Transformers" (arXiv 2101.03961), equations 4 to 6, with kept probabilities.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._found: list[Tensor] = []
        self._tokens = 0

    def watch(self, _layer: int, _inputs: Tensor, kept: Tensor, _outputs: Tensor) -> None:
        """Take in the kept probabilities (T, N) of one layer."""
        if torch.is_grad_enabled():
            chosen = (kept > 0).float()
            shares = chosen.mean(dim=0) / chosen.sum(dim=1).mean()
            self._found.append(kept.shape[1] * (shares * kept.mean(dim=0)).sum())
            self._tokens = len(kept)

    @contextmanager
    def match(self, _public: Tensor) -> Iterator[Callable[[], Tensor]]:
        """Give the penalty on a forward pass, as ``loop.train`` asks for one."""
        yield self.penalty

    def penalty(self) -> Tensor:
        """Return weight times N sum_i f_i P_i, mean over the layers of the forward pass just made, times its tokens."""
        total: Tensor = torch.stack(self._found).mean() * (self._weight * self._tokens)
        self._found.clear()
        return total


def save_mixture(model: Any, folder: Path, tokenizer: Any) -> None:
    """Write a mixture as a stock checkpoint: config.json, one safetensors file, tokenizer.

    Weights are rounded to the dtype of the model's config; router rows stay float32.
    """
    dense = model.config.to_dict()
    family = family_of(dense["model_type"])
    blocks = routed_layers(model)
    config = family.merged_config(resolve_moe_config(dense), len(blocks[0].experts), blocks[0].top_k)
    dtype = getattr(torch, config["dtype"])
    tied = {"lm_head.weight"} if dense.get("tie_word_embeddings") else set()
    state = {name: value for name, value in model.state_dict().items() if ".mlp." not in name and name not in tied}
    for layer, block in enumerate(blocks):
        for index, expert in enumerate(block.experts):
            for projection in PROJECTIONS:
                state[family.expert_key(layer, index, projection)] = getattr(expert, projection).weight
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    tensors |= {family.router_name(i): block.router.rows.detach().cpu() for i, block in enumerate(blocks)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
