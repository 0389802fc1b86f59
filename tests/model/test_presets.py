"""The shapes to start from: loadable as FlexOlmo wherever it runs, and no more than a laptop can train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexctl.model.configs import resolve_moe_config
from flexctl.model.presets import PRESETS, Preset, new_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_sizes_are_what_other_loaders_need(preset: Preset) -> None:
    assert preset.hidden_size % preset.num_attention_heads == 0
    assert (preset.hidden_size // preset.num_attention_heads) % 2 == 0
    assert preset.batch_tokens % preset.seq_len == 0
    assert preset.max_tokens >= 100 * preset.batch_tokens


def test_new_model_has_the_shape_of_olmo_2_and_follows_its_seed(tokenizer: Any) -> None:
    preset = PRESETS["nano"]
    model, again, other = (new_model(preset, tokenizer, seed) for seed in (1, 1, 2))
    config = model.config.to_dict()
    assert config["model_type"] == "olmo2"
    assert config["tie_word_embeddings"] is False
    assert config["rms_norm_eps"] == 1e-5
    assert config["vocab_size"] == len(tokenizer)
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["max_position_embeddings"] >= preset.seq_len
    assert resolve_moe_config(config)["model_type"] == "flex_olmo"
    states = [made.state_dict() for made in (model, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
