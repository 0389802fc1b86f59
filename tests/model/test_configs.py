"""The mixture's config is resolved from the dense class: every field of it survives, or the anchor is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch
import transformers

from flexctl.errors import BundleError
from flexctl.families import FAMILIES, family_of
from flexctl.model.configs import read_mixture, resolve_moe_config

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = [family.dense_type for family in FAMILIES]
# What Transformers writes for every model, and what names the class itself.
GENERIC = set(transformers.PretrainedConfig().to_dict()) | {"architectures", "model_type"}
IDS = {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache", "dtype"}

# None of these is a default of either class.
UNUSUAL: dict[str, Any] = {
    "attention_dropout": 0.125,
    "bos_token_id": 5,
    "dtype": "bfloat16",
    "eos_token_id": 7,
    "head_dim": 16,
    "hidden_size": 32,
    "initializer_range": 0.003,
    "intermediate_size": 48,
    "max_position_embeddings": 77,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "rms_norm_eps": 3e-4,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 4321.0},
    "tie_word_embeddings": True,
    "use_cache": False,
    "vocab_size": 333,
}


def as_loaded(moe_config: dict[str, Any]) -> Any:
    """The config object that stock software makes of the file."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(moe_config)))


def fields_of(dense: Any) -> set[str]:
    return (set(dense.to_dict()) - GENERIC) | IDS


@pytest.mark.parametrize("model_type", TYPES)
def test_every_field_of_the_dense_class_survives(model_type: str) -> None:
    given = {"model_type": model_type, **UNUSUAL}
    if model_type == "mistral":
        given["sliding_window"] = 11
    dense = transformers.AutoConfig.for_model(**given)
    moe = as_loaded(resolve_moe_config(given))
    assert set(UNUSUAL) <= fields_of(dense) | {"head_dim"}
    for name in sorted(fields_of(dense)):
        assert getattr(moe, name) == getattr(dense, name), name
    assert moe.head_dim == 16


@pytest.mark.parametrize("model_type", TYPES)
def test_absent_fields_take_the_dense_defaults(model_type: str) -> None:
    given = {"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4}
    dense = transformers.AutoConfig.for_model(**given)
    moe = as_loaded(resolve_moe_config(given))
    for name in sorted(fields_of(dense) - {"dtype", "head_dim"}):
        assert getattr(moe, name) == getattr(dense, name), name
    assert moe.head_dim == (getattr(dense, "head_dim", None) or 16)
    assert moe.dtype == "float32" or moe.dtype == torch.float32


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral"])
def test_the_two_classes_do_have_other_defaults(model_type: str) -> None:
    """Else the test above could not fail."""
    family = family_of(model_type)
    dense = transformers.AutoConfig.for_model(model_type)
    moe = transformers.AutoConfig.for_model(family.moe_type)
    assert dense.rope_parameters["rope_theta"] != moe.rope_parameters["rope_theta"]
    assert dense.rms_norm_eps != moe.rms_norm_eps


@pytest.mark.parametrize("model_type", TYPES)
def test_result_is_finished_json_with_the_family_s_fields(model_type: str) -> None:
    family = family_of(model_type)
    config = resolve_moe_config(tiny.dense_config(model_type))
    assert json.loads(json.dumps(config)) == config
    assert config["model_type"] == family.moe_type
    assert config["architectures"] == [family.moe_architecture]
    assert config[family.count_field] == config["num_experts_per_tok"] == 1
    assert all(config[name] == value for name, value in family.fixed.items())
    assert all(config[name] == config[source] for name, source in family.copied.items())
    assert "_name_or_path" not in config
    assert "transformers_version" not in config


@pytest.mark.parametrize("model_type", TYPES)
def test_counts_reach_the_class(model_type: str) -> None:
    family = family_of(model_type)
    moe = as_loaded(family.merged_config(resolve_moe_config(tiny.dense_config(model_type)), 5, 3))
    assert getattr(moe, family.count_field) == 5
    assert moe.num_experts_per_tok == 3


@pytest.mark.parametrize("model_type", TYPES)
def test_a_trainer_adds_no_balancing_loss(model_type: str) -> None:
    """What it would add moves owners' rows; turned on, it adds nothing."""
    moe = as_loaded(family_of(model_type).merged_config(resolve_moe_config(tiny.dense_config(model_type)), 3, 2))
    assert (moe.output_router_logits, moe.router_aux_loss_coef) == (False, 0.0)
    torch.manual_seed(0)
    model, tokens = transformers.AutoModelForCausalLM.from_config(moe), tiny.some_tokens()
    plain, balanced = (model(tokens, labels=tokens, output_router_logits=asked).loss for asked in (False, True))
    assert torch.equal(balanced, plain)


@pytest.mark.parametrize("model_type", TYPES)
def test_resolving_does_not_depend_on_how_the_dense_config_was_written(model_type: str) -> None:
    """As a person writes it, with old names, or as save_pretrained does, with every field."""
    short = tiny.dense_config(model_type, rope_theta=5000.0)
    full = transformers.AutoConfig.for_model(**short).to_dict()
    assert resolve_moe_config(short) == resolve_moe_config(json.loads(json.dumps(full)))


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "dynamic", "factor": 2.0},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: str(scaling["rope_type"]))
@pytest.mark.parametrize("model_type", TYPES)
def test_both_spellings_of_scaled_positions_are_read_and_written(model_type: str, scaling: dict[str, Any]) -> None:
    """Software on Transformers 4 knows rope_theta and rope_scaling; without them it takes its class's own base."""
    older = tiny.dense_config(model_type, rope_theta=4321.0, rope_scaling=dict(scaling))
    newer = tiny.dense_config(model_type, rope_parameters={**scaling, "rope_theta": 4321.0})
    config = resolve_moe_config(older)
    assert config == resolve_moe_config(newer)
    assert config["rope_parameters"] == {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    assert config["rope_theta"] == 4321.0
    assert scaling.items() <= config["rope_scaling"].items()
    reread = as_loaded(config)
    assert reread.rope_parameters == config["rope_parameters"]


@pytest.mark.parametrize("model_type", TYPES)
def test_plain_positions_have_a_base_and_no_scaling(model_type: str) -> None:
    config = resolve_moe_config(tiny.dense_config(model_type))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert "rope_scaling" not in config


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("olmo2", {"rope_theta": 300.0}),
        ("llama", {"rope_theta": 300.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ("llama", {"head_dim": 16}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"head_dim": 4, "rms_norm_eps": 0.1}),
        ("qwen3", {"head_dim": 16, "rope_theta": 300.0}),
    ],
)
@torch.no_grad()
def test_what_survives_is_computed_with(model_type: str, changes: dict[str, Any]) -> None:
    config = tiny.dense_config(model_type, **changes)
    weights, tokens = tiny.make_weights(config), tiny.some_tokens()
    dense = tiny.make_dense(config)(tokens).logits
    stock, _ = tiny.stock_mixture(weights)
    assert float((stock(tokens).logits - dense).abs().max()) <= 1e-4
    assert float((tiny.build(weights)(tokens).logits - dense).abs().max()) <= 1e-4


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window is True"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types has ['sliding_attention']"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ({"model_type": "llama", "num_key_value_heads": 2.5}, "num_key_value_heads is 2.5"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"model_type": "flex_olmo"}, "model_type is 'flex_olmo'"),
        ({}, "model_type"),
    ],
)
def test_refusals_name_the_field(config: dict[str, Any], field: str) -> None:
    with pytest.raises(BundleError, match=r"^config\.json: ") as caught:
        resolve_moe_config(config)
    assert field in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("model_type", TYPES)
def test_a_mixture_s_config_leads_back_to_its_dense_type(model_type: str) -> None:
    """With every field of it, and then to the same mixture again."""
    more = {"mistral": {"sliding_window": 11}}.get(model_type, {})
    moe_config = resolve_moe_config({"model_type": model_type, **UNUSUAL, **more})
    family = family_of(model_type)
    merged = family.merged_config(moe_config, 5, 3)
    found = read_mixture(merged, "config.json")
    assert (found.family, found.num_experts, found.num_experts_per_tok) == (family, 5, 3)
    assert resolve_moe_config(found.dense) == moe_config
    assert found.dense["architectures"] == [transformers.AutoModelForCausalLM._model_mapping[
        type(transformers.AutoConfig.for_model(model_type))].__name__]  # fmt: skip


@pytest.mark.parametrize("field", ["rope_theta", "rope_scaling", "torch_dtype"])
def test_older_spellings_of_a_mixture_are_read(field: str) -> None:
    older = {
        "rope_theta": 4321.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        "torch_dtype": "bfloat16",
    }
    base = {"model_type": "mixtral", **UNUSUAL}
    del base["rope_parameters"], base["dtype"]
    found = resolve_moe_config(read_mixture({**base, field: older[field]}, "config.json").dense)
    if field == "torch_dtype":
        assert found["dtype"] == "bfloat16"
    elif field == "rope_theta":
        assert found["rope_parameters"]["rope_theta"] == 4321.0
    else:
        assert (found["rope_parameters"]["rope_type"], found["rope_parameters"]["factor"]) == ("yarn", 4.0)


@pytest.mark.parametrize("padding", [None, -1, 0, 49])
def test_a_padding_token_inside_the_vocabulary_passes(padding: int | None) -> None:
    config = {"model_type": "llama", "vocab_size": 50, "pad_token_id": padding}
    assert resolve_moe_config(config)["pad_token_id"] == padding


def test_an_unknown_family_is_told_which_there_are() -> None:
    with pytest.raises(BundleError) as caught:
        resolve_moe_config({"model_type": "gpt2"})
    assert caught.value.hint is not None
    assert all(name in caught.value.hint for name in TYPES)
