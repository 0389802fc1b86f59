"""Sizes of what is measured, random models of them, and the operations that a training step of each kind needs.

The formula is that of docs/benchmarks.md: multiplications with additions a token, two operations each; the attention's
own products count for the half that a causal mask leaves; what is computed twice on purpose (the head under a chunked
loss, layers under activation checkpointing) counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A dense anchor's sizes, and those of a training step.

    Attributes:
        batch: Sequences a step; a fourth of them is public.
        seq_len: Targets of one.
    """

    layers: int
    hidden: int
    heads: int
    inner: int
    vocab: int
    batch: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Targets a step."""
        return self.batch * self.seq_len


SMALL = Shape(layers=2, hidden=64, heads=4, inner=128, vocab=512, batch=4, seq_len=32)
CPU = Shape(layers=6, hidden=256, heads=4, inner=1024, vocab=8192, batch=8, seq_len=256)
ONE_B = Shape(layers=16, hidden=2048, heads=16, inner=8192, vocab=100_352, batch=8, seq_len=1024)
"""allenai/OLMo-2-0425-1B."""
SEVEN_B = Shape(layers=32, hidden=4096, heads=32, inner=11_008, vocab=100_352, batch=4, seq_len=1024)
"""allenai/OLMo-2-1124-7B."""

DENSE, PAIR, MASKED, LORA = "dense, every weight", "pair", "masked 2 experts", "LoRA"
"""Kinds of training step."""


def step_flops(shape: Shape, kind: str, rank: int | None = None) -> int:
    """Return the operations of one training step.

    Args:
        shape: Of the anchor and of the step.
        kind: DENSE trains all of the dense model; PAIR a second feed-forward network beside the frozen one; MASKED
            both, and throws the public one's gradients away; LORA differences to the dense feed-forward matrices.
        rank: Of PAIR and LORA; None is full matrices.
    """
    attention, network, head = 4 * shape.hidden**2, 3 * shape.hidden * shape.inner, shape.vocab * shape.hidden
    scores = shape.seq_len * shape.hidden
    low = 3 * rank * (shape.hidden + shape.inner) if rank else 0
    # A low-rank expert and the public one have one product with each public matrix between them.
    networks = {PAIR: network if rank else 2 * network, MASKED: 2 * network}.get(kind, network)
    layer = attention + networks + low
    forward = shape.layers * (layer + scores) + head
    if kind == DENSE:
        backward = shape.layers * (2 * layer + 2 * scores) + 2 * head
    else:
        trained = 2 if kind == MASKED else 1
        # Below the first trained network nothing goes back; in it, only through its last matrix.
        inputs = (shape.layers - 1) * (layer + 2 * scores) + trained * network // 3 + head
        weights = shape.layers * (low or trained * network)
        backward = inputs + weights
    return 2 * (forward + backward) * shape.tokens


def sizes(shape: Shape) -> dict[str, Any]:
    """Return a shape as Transformers' configs have it."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "max_position_embeddings": max(1024, shape.seq_len),
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }


def dense_model(shape: Shape, device: Any, dtype: Any) -> Any:
    """Return a dense OLMo-2 with random weights and flexctl's attention, made in ``dtype`` where it is to be."""
    import torch
    import transformers

    from flexctl.model.attention import register_attention

    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Olmo2Config(**sizes(shape)), attn_implementation=register_attention(), dtype=dtype
        )
    return model.eval()


def mixture_model(shape: Shape, device: Any, dtype: Any, *, experts: int, top_k: int, how: str) -> Any:
    """Return Transformers' own FlexOlmo with random weights.

    Args:
        shape: Of the anchor.
        device: Where.
        dtype: Of all weights.
        experts: How many.
        top_k: How many run on a token.
        how: Transformers' implementation of the experts: eager, grouped_mm or batched_mm.
    """
    import torch
    import transformers

    config = transformers.FlexOlmoConfig(
        **sizes(shape), num_experts=experts, num_experts_per_tok=top_k, output_router_logits=False
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", experts_implementation=how, dtype=dtype
        )
    return model.eval()
