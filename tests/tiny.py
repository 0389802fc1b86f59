"""Tiny things made in memory: text of three kinds, models of every family, weights as bundles hand them over."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexctl.bundle import RawTensor, TensorType
from flexctl.families import PROJECTIONS, family_of

VOCAB_SIZE = 320
CONTEXT = 128

_PEOPLE = [
    "the miller",
    "a sailor",
    "her brother",
    "the old king",
    "a young doctor",
    "our neighbour",
    "the teacher",
    "some traveller",
]
_DEEDS = [
    "walked to",
    "looked at",
    "remembered",
    "left behind",
    "spoke about",
    "came home from",
    "dreamed of",
    "returned to",
]
_PLACES = [
    "the harbour",
    "a quiet village",
    "the long road",
    "the burning forest",
    "an empty house",
    "the winter market",
]
_ENDS = [
    "before the rain began",
    "without a word",
    "on the following morning",
    "as he had promised",
    "and nobody asked why",
]
_NAMES = ["value", "index", "total", "buffer", "result", "count", "item", "offset"]


def make_texts(kind: str, count: int, seed: int = 0) -> list[str]:
    """Return ``count`` documents of "public" prose, Python-like "code" or "sums"; the same on every machine."""
    rng = random.Random(f"{kind} {seed}")

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.random() * len(options))]

    def number(below: int) -> int:
        return int(rng.random() * below)

    def prose() -> str:
        line = f"{pick(_PEOPLE)} {pick(_DEEDS)} {pick(_PLACES)} {pick(_ENDS)}."
        return line[0].upper() + line[1:] + " "

    def code() -> str:
        left, right = pick(_NAMES), pick(_NAMES)
        body = f"    if {left}_{number(9)} > {number(99)}:\n        return self.{right}({left})\n"
        return f"def {left}_{right}(self, {left}, {right}=None):\n{body}    return [{right} for _ in range({left})]\n\n"

    def sums() -> str:
        a, b = number(900), number(900)
        return f"{a} + {b} = {a + b}; {a} * 7 = {a * 7}\n"

    make = {"public": prose, "code": code, "sums": sums}[kind]
    pieces = {"public": 9, "code": 4, "sums": 20}[kind]
    return ["".join(make() for _ in range(pieces + number(4))) for _ in range(count)]


def dense_config(model_type: str = "olmo2", **changes: Any) -> dict[str, Any]:
    """Return config.json of a tiny dense model: two layers, 32 wide, two key-value heads for four query heads."""
    config = {
        "model_type": model_type,
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    if model_type == "qwen3":
        config["head_dim"] = 8
    return config | changes


def raw(tensor: Any) -> RawTensor:
    """Return a torch tensor as bundles keep it."""
    from flexctl.model.tensors import to_bytes

    return RawTensor(*to_bytes(tensor))


def make_dense(config: Mapping[str, Any], seed: int = 0) -> Any:
    """Return a stock dense model with weights large enough for logits to differ, and norms that are not 1."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.15)
    return model.eval()


def scrambled(shape: Sequence[int], start: int, size: float) -> Any:
    """Return numbers between -size and size that are the same on every machine and in every version of torch."""
    import torch

    numbers = (torch.arange(math.prod(shape)) + start) * 2654435761 % 2**32
    numbers = (numbers ^ (numbers >> 15)) * 2246822519 % 2**32
    numbers = numbers ^ (numbers >> 13)
    return ((numbers.double() / 2**31 - 1) * size).float().reshape(tuple(shape))


def make_golden_model() -> Any:
    """Return a stock dense model whose weights never change, for losses that are written down."""
    import torch

    model = make_dense(dense_config())
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(scrambled(parameter.shape, 100_000 * i, 0.2) + (1 if parameter.ndim == 1 else 0))
    return model


MIXTURES = {
    "flex_olmo": ("olmo2", {}),
    "mixtral": ("llama", {}),
    "mixtral-sliding": ("mistral", {"sliding_window": 8}),
    "qwen3_moe": ("qwen3", {"head_dim": 8, "moe_intermediate_size": 24, "norm_topk_prob": True}),
}
"""A kind of stock mixture -> the dense type of its experts, and what its config says more."""


def make_mixture(
    path: Path, kind: str, *, experts: int = 4, packed: bool = False, dtype: str = "float32", **changes: Any
) -> Any:
    """Save a stock mixture with random weights, as Transformers saves it, and return the model.

    Args:
        path: Directory to write.
        kind: One of ``MIXTURES``.
        experts: How many; two answer each token unless changes say otherwise.
        packed: Keep a layer's experts in two tensors, as Transformers 5 has them in memory.
        dtype: That weights are stored in.
        **changes: Other fields of its config.
    """
    import torch
    import transformers

    counts = {"num_experts": experts, "num_local_experts": experts, "num_experts_per_tok": 2}
    config = dense_config(MIXTURES[kind][0]) | counts | MIXTURES[kind][1] | {"model_type": kind.split("-")[0]} | changes
    model = make_dense(config).to(getattr(torch, dtype))
    assert isinstance(model, transformers.PreTrainedModel)
    model.save_pretrained(path, save_original_format=not packed)
    return model


def make_sparse_mixture(path: Path, hidden: int, inner: int) -> None:
    """Write a packed mixtral of one layer and two experts, BF16, all zeros that take no room on the disk."""
    import torch
    import transformers
    from builders import write_zeros

    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 1}
    counts = {"num_local_experts": 2, "num_experts_per_tok": 1, "dtype": "bfloat16"}
    config = transformers.MixtralConfig(**dense_config("llama", **sizes, **counts) | {"model_type": "mixtral"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    path.mkdir(parents=True)
    config.save_pretrained(path)
    types = {name: TensorType("BF16", tuple(value.shape)) for name, value in model.state_dict().items()}
    write_zeros(path / "model.safetensors", types)


def make_weights(
    config: Mapping[str, Any],
    names: Sequence[str] = ("public",),
    *,
    top_k: int | None = None,
    spread: float = 0.1,
    rows: Sequence[Any] | None = None,
    seed: int = 0,
) -> SimpleNamespace:
    """Return a WeightSource: a dense model, and beside its feed-forward networks others at a distance of ``spread``.

    Args:
        config: As from ``dense_config``.
        names: Experts, the public one first.
        top_k: Experts kept for each token; None keeps all.
        spread: Standard deviation of the other experts' difference to the public one.
        rows: Router rows of each layer, (num_experts, hidden_size); None draws them, with the public row at zero.
        seed: Of all of it.
    """
    import torch

    state = dict(make_dense(config, seed).state_dict())
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    public = {name.removeprefix("model."): value for name, value in state.items() if ".mlp." in name}
    shared = {name: raw(value) for name, value in state.items() if ".mlp." not in name}
    generator = torch.Generator().manual_seed(seed + 1)

    def moved(value: Any) -> Any:
        return value + spread * torch.randn(value.shape, generator=generator)

    experts = {name: public if i == 0 else {k: moved(v) for k, v in public.items()} for i, name in enumerate(names)}
    if rows is None:
        shape = (len(names), config["hidden_size"])
        rows = [0.7 * torch.randn(shape, generator=generator) for _ in range(config["num_hidden_layers"])]
        for layer in rows:
            layer[0] = 0
    return SimpleNamespace(
        dense_config=dict(config),
        shared=shared,
        experts={name: {k: raw(v) for k, v in tensors.items()} for name, tensors in experts.items()},
        router=tuple(raw(layer) for layer in rows),
        num_experts_per_tok=len(names) if top_k is None else top_k,
    )


def build(weights: SimpleNamespace) -> Any:
    """Return flexctl's model of ``weights``, float32 on the CPU."""
    import torch

    from flexctl.model.building import build_model

    return build_model(weights, device=torch.device("cpu"), dtype=torch.float32)


def without(weights: SimpleNamespace, name: str, requested: int) -> SimpleNamespace:
    """Return ``weights`` with an expert and its rows gone, keeping min(requested, remaining) experts a token."""
    from flexctl.model.tensors import to_torch

    names = list(weights.experts)
    kept = [i for i, other in enumerate(names) if other != name]
    return SimpleNamespace(
        dense_config=weights.dense_config,
        shared=weights.shared,
        experts={names[i]: weights.experts[names[i]] for i in kept},
        router=tuple(raw(to_torch(layer)[kept]) for layer in weights.router),
        num_experts_per_tok=min(requested, len(kept)),
    )


def stock_mixture(weights: SimpleNamespace) -> tuple[Any, dict[str, Any]]:
    """Return the stock mixture-of-experts model of ``weights`` and what Transformers says about loading it."""
    import transformers

    from flexctl.model.configs import resolve_moe_config
    from flexctl.model.tensors import to_torch

    family = family_of(weights.dense_config["model_type"])
    moe_config = resolve_moe_config(weights.dense_config)
    merged = family.merged_config(moe_config, len(weights.experts), weights.num_experts_per_tok)
    config = transformers.AutoConfig.for_model(**merged)
    state = {name: to_torch(value) for name, value in weights.shared.items()}
    for layer, rows in enumerate(weights.router):
        state[family.router_name(layer)] = to_torch(rows)
        for index, tensors in enumerate(weights.experts.values()):
            for projection in PROJECTIONS:
                value = to_torch(tensors[f"layers.{layer}.mlp.{projection}.weight"])
                state[family.expert_key(layer, index, projection)] = value
    model_class = getattr(transformers, family.moe_architecture)
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype="float32", output_loading_info=True
    )
    return model.eval(), info


def some_tokens(batch: int = 2, length: int = 24, seed: int = 0) -> Any:
    """Return random token ids, (batch, length)."""
    import torch

    return torch.randint(2, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
