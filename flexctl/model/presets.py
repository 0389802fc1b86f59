"""Small OLMo-2-shaped models to start from when there is no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["PRESETS", "Preset", "new_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Sizes of a model and how it is trained.

    Attributes:
        vocab_size: Entries of the tokenizer that is trained with it.
        max_tokens: Training tokens unless told otherwise.
        lr: Peak learning rate, chosen by measurement (docs/results.md).
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_tokens: int
    seq_len: int
    batch_tokens: int
    lr: float


PRESETS = {
    "nano": Preset(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        vocab_size=2048,
        max_tokens=1_200_000,
        seq_len=256,
        batch_tokens=512,
        lr=3e-3,
    ),
    "micro": Preset(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        vocab_size=4096,
        max_tokens=1_200_000,
        seq_len=256,
        batch_tokens=1024,
        lr=3e-3,
    ),
    "small": Preset(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=2048,
        vocab_size=16384,
        max_tokens=100_000_000,
        seq_len=1024,
        batch_tokens=32_768,
        lr=1.5e-3,
    ),
}


def new_model(preset: Preset, tokenizer: Any, seed: int) -> Any:
    """Return a freshly initialised model of a preset's sizes for a tokenizer, float32.

    The head is not tied and rms_norm_eps is 1e-5, as vLLM's FlexOlmo has it.
    """
    import transformers

    config = transformers.Olmo2Config(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_attention_heads,
        max_position_embeddings=preset.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    return transformers.Olmo2ForCausalLM(config)
