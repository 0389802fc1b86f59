"""Configs of Transformers: the dense one checked, the mixture's resolved from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexctl.errors import BundleError
from flexctl.families import family_of
from flexctl.runtime import Reporter

__all__ = ["refuse_other_architecture", "resolve_moe_config", "warn_of_length"]

_PRIVATE = ("architectures", "model_type", "transformers_version", "_name_or_path")
# What may differ between two checkpoints whose layers compute the same: files, generation, training, the longest text.
_IMMATERIAL = {
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "pad_token_id",
    "use_cache",
}
# A trainer that turns the router's load-balancing loss on then adds nothing by it; it would move owners' rows.
_NO_BALANCING = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
_GENERIC_KEPT = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "tie_word_embeddings", "use_cache")


def resolve_moe_config(dense_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the finished config of the mixture-of-experts class for a dense anchor.

    The dense config goes through its own Transformers class first, so that absent keys take the dense class's
    defaults rather than the mixture's, which differ. Expert counts are those of the anchor
    alone: merge sets them. Rotary settings stand in both spellings, rope_parameters and the older rope_theta with
    rope_scaling: software on Transformers 4 takes its class's own rope_theta where it finds none.

    Raises:
        BundleError: The family is not supported, or a field has a value that the mixture class cannot hold.
    """
    import transformers

    family = family_of(str(dense_config.get("model_type")))
    _refuse_unsupported(dense_config, family.required)
    dense = transformers.AutoConfig.for_model(**dict(dense_config))
    resolved = {key: value for key, value in dense.to_dict().items() if key not in _PRIVATE}
    resolved["head_dim"] = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    resolved["sliding_window"] = getattr(dense, "sliding_window", None)
    resolved |= {name: getattr(dense, source) for name, source in family.copied.items()}
    resolved |= dict(family.fixed) | _NO_BALANCING
    resolved[family.count_field] = 1
    resolved["num_experts_per_tok"] = 1
    resolved["model_type"] = family.moe_type
    resolved["dtype"] = str(dense.dtype).removeprefix("torch.") if dense.dtype is not None else "float32"
    moe = transformers.AutoConfig.for_model(**resolved)
    generic = set(transformers.PretrainedConfig().to_dict()) - set(_GENERIC_KEPT)
    finished = {key: value for key, value in moe.to_dict().items() if key not in generic}
    finished |= {"model_type": family.moe_type, "architectures": [family.moe_architecture]}
    finished[family.count_field] = finished.pop("num_local_experts", 1)
    finished |= _older_rope_fields(finished["rope_parameters"])
    return dict(sorted(finished.items()))


def refuse_other_architecture(config: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Refuse a dense config whose model is of another family, has other sizes, or computes otherwise than the anchor.

    Both go through their Transformers class, so that a key that one of them leaves to its default makes no difference.

    Args:
        config: config.json in question.
        expected: The anchor's.
        where: File of ``config``, for the message.

    Raises:
        BundleError: A field differs.
    """
    if config.get("model_type") != expected["model_type"]:
        raise BundleError(
            f"{where}: model_type is {config.get('model_type')!r}; the anchor's is {expected['model_type']!r}"
        )
    found, wanted = resolve_moe_config(config), resolve_moe_config(expected)
    for name in sorted(wanted.keys() - _IMMATERIAL):
        if found.get(name) != wanted[name]:
            raise BundleError(
                f"{where}: {name} is {found.get(name)!r}; the anchor's is {wanted[name]!r}",
                hint="an expert must come from the very anchor that it is merged with",
            )


def warn_of_length(
    tokens: int | None, config: Mapping[str, Any], reporter: Reporter, what: str = "a sequence has"
) -> None:
    """Warn of more tokens at once than a model is made for; None are the model's own choice."""
    longest = config.get("max_position_embeddings")
    if tokens is not None and longest is not None and tokens > longest:
        reporter.warn(f"{what} {tokens} tokens; the model is made for {longest} (max_position_embeddings)")


def _older_rope_fields(rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta, and rope_scaling where there is any, as Transformers 4 spells rope_parameters."""
    scaling = {name: value for name, value in rope_parameters.items() if name != "rope_theta"}
    older = {"rope_theta": rope_parameters["rope_theta"]}
    return older if scaling["rope_type"] == "default" else older | {"rope_scaling": scaling}


def _refuse_unsupported(config: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    for name, value in required.items():
        if config.get(name, value) != value:
            raise BundleError(f"config.json: {name} is {config[name]!r}; the mixture class needs {value!r}")
    if config.get("quantization_config") is not None:
        raise BundleError("config.json: quantization_config is set; anchors are F32, BF16 or F16", hint="dequantise it")
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise BundleError(
            f"config.json: layer_types has {sorted(layer_types)}; the mixture class has full_attention alone"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise BundleError(f"config.json: hidden_act is {config['hidden_act']!r}; the mixture class needs 'silu'")
