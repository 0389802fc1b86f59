"""Merged models of every family, in sizes that servers take, and what stock Transformers computes from what is left."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle import open_anchor
from flexctl.bundle.layout import ROUTER_TENSOR
from flexctl.bundle.stock import checkpoint_spans
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.text.tokenizer import train_tokenizer
from tests import tiny
from tests.builders import make_expert, make_tensors, noisy

NAMES = ("code", "law", "math")
MASKS = ((), ("code",), ("law",), ("math",), ("code", "math"), NAMES)
"""Nobody, each one, two, all."""

TOP_K = {"olmo2": 4, "llama": 2, "mistral": 1, "qwen3": 3}
"""Model type of the anchor -> experts active for a token."""

CONTEXT = 256
_TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def make_merged(root: Path, model_type: str, **changes: int) -> Path:
    """Return a merged model of three closed experts; each family keeps another number of them for a token."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, **changes}
    heads = {"head_dim": 32} if model_type == "qwen3" else {}
    words = [text for kind in ("public", "code", "sums") for text in tiny.make_texts(kind, 20, seed=2)]
    tokenizer = train_tokenizer(words, tiny.VOCAB_SIZE, CONTEXT)
    tokenizer.chat_template = _TURNS
    config = tiny.dense_config(model_type, **sizes, **heads, max_position_embeddings=CONTEXT)
    dense = tiny.make_dense(config)
    for parameter in dense.parameters():
        parameter.data.mul_(
            0.5 if parameter.ndim > 1 else 1
        )  # what is left of float32 behind 150 tokens is then below 1e-5
    dense.save_pretrained(root / "stock")
    tokenizer.save_pretrained(root / "stock")
    (root / "public.txt").write_text("\n".join(tiny.make_texts("public", 40)))
    init_anchor(
        InitAnchorConfig(source=str(root / "stock"), data=(root / "public.txt",), output=root / "anchor", threads=1)
    )
    anchor = open_anchor(root / "anchor")
    public = {name: span.read() for name, span in checkpoint_spans(root / "anchor").items()}
    experts = []
    for seed, name in enumerate(NAMES):
        rights = {"purposes": ("research",)} if name == "law" else {}
        rows = make_tensors(anchor, seed)[ROUTER_TENSOR]
        tensors = {key: noisy(public[f"model.{key}"], seed, 0.15) for key in make_tensors(anchor, seed) if "mlp" in key}
        experts.append(
            make_expert(root / f"{name}.st", anchor, name, tensors={**tensors, ROUTER_TENSOR: rows}, **rights).path
        )
    return merge(
        MergeConfig(experts=tuple(experts), anchor=root / "anchor", output=root / "merged", top_k=TOP_K[model_type])
    ).path


def removed(merged: Path, names: Sequence[str]) -> Path:
    """Return the merged model without these experts, made at first use."""
    target = merged.parent / f"less-{'-'.join(names)}"
    if names and not target.exists():
        remove(RemoveConfig(names=tuple(names), source=merged, output=target))
    return target if names else merged


def make_prompts(count: int, seed: int = 0, shortest: int = 7, longest: int = 106) -> list[list[int]]:
    """Return token ids, of lengths from ``shortest`` to ``longest``."""
    numbers = random.Random(seed)
    lengths = [numbers.randint(shortest, longest) for _ in range(count)]
    return [[numbers.randrange(4, tiny.VOCAB_SIZE) for _ in range(length)] for length in lengths]


@dataclass(frozen=True, slots=True)
class Continued:
    """A prompt gone on with by the likeliest tokens.

    Attributes:
        prompt: Log probabilities of the prompt's tokens but the first.
        tokens: What follows.
        output: Its log probabilities.
    """

    prompt: list[float]
    tokens: list[int]
    output: list[float]


def continued(model: Any, prompt: Sequence[int], new_tokens: int) -> Continued:
    """Return what a stock model computes; the end of a text does not end it."""
    import torch

    ids, tokens, output = torch.tensor([list(prompt)]), [], []
    with torch.no_grad():
        out = model(ids, use_cache=True)
        first = out.logits[0].float().log_softmax(-1)
        of_prompt = first[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
        for _ in range(new_tokens):
            last = out.logits[0, -1].float().log_softmax(-1)
            tokens.append(int(last.argmax()))
            output.append(float(last.max()))
            out = model(torch.tensor([[tokens[-1]]]), past_key_values=out.past_key_values, use_cache=True)
    return Continued(of_prompt, tokens, output)
