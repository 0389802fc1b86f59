"""Configs of Transformers: the dense one checked, the mixture's resolved from it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexctl.errors import BundleError
from flexctl.families import Family, family_of, mixture_families
from flexctl.runtime import Reporter

__all__ = ["MixtureConfig", "read_mixture", "refuse_other_architecture", "resolve_moe_config", "warn_of_length"]

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
# What of a mixture's config says nothing of what its layers compute once they are trained.
_TRAINING_OF_MIXTURES = {*_NO_BALANCING, "router_jitter_noise"}
_COUNTS = ("num_experts", "num_local_experts")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "moe_intermediate_size",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "vocab_size",
    *_COUNTS,
)
_SIZES_OR_NULL = ("head_dim", "num_key_value_heads", "sliding_window")
_SHARED_EXPERTS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")
_WHY_NOT = {
    "decoder_sparse_step": "layers without experts cannot be taken apart",
    "mlp_only_layers": "layers without experts cannot be taken apart",
    "norm_topk_prob": "it decides whether the kept experts' weights are divided by their sum",
}
_LARGEST = 2**31 - 1
_NAMED = re.compile(r"Validation error for field '(\w+)'")
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
    family = family_of(str(dense_config.get("model_type")))
    _refuse_no_numbers(dense_config, "config.json")
    _refuse_unsupported(dense_config, family.required)
    dense = _of_class(dense_config, "config.json")
    resolved = {key: value for key, value in dense.to_dict().items() if key not in _PRIVATE}
    resolved["head_dim"] = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    resolved["sliding_window"] = getattr(dense, "sliding_window", None)
    resolved |= {name: getattr(dense, source) for name, source in family.copied.items()}
    resolved |= dict(family.fixed) | _NO_BALANCING
    resolved[family.count_field] = 1
    resolved["num_experts_per_tok"] = 1
    resolved["model_type"] = family.moe_type
    resolved["dtype"] = str(dense.dtype).removeprefix("torch.") if dense.dtype is not None else "float32"
    moe = _of_class(resolved, "config.json")
    generic = _generic_fields()
    finished = {key: value for key, value in moe.to_dict().items() if key not in generic}
    finished |= {"model_type": family.moe_type, "architectures": [family.moe_architecture]}
    finished[family.count_field] = finished.pop("num_local_experts", 1)
    finished |= _older_rope_fields(finished["rope_parameters"])
    return dict(sorted(finished.items()))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """What config.json of a stock mixture of experts comes to.

    Attributes:
        family: The one whose merged models compute the same.
        dense: config.json of one of its experts as a dense model.
        num_experts: How many there are.
        num_experts_per_tok: How many answer each token.
    """

    family: Family
    dense: Mapping[str, Any]
    num_experts: int
    num_experts_per_tok: int


def read_mixture(config: Mapping[str, Any], where: str) -> MixtureConfig:
    """Return what the config of a stock mixture comes to; of several dense types, the first that says all of it.

    Both it and what would be merged again go through the mixture's Transformers class, and every field that decides
    what layers compute must be the same.

    Args:
        config: config.json.
        where: Its file, for messages.

    Raises:
        BundleError: Its type has no family, or a field has a value that no merged model has.
    """
    candidates = mixture_families(str(config.get("model_type")))
    _refuse_no_numbers(config, where)
    _refuse_what_cannot_be_parted(config, where)
    stock = _of_class(config, where).to_dict()
    problems = []
    for family in candidates:
        dense = _dense_fields(stock, family)
        problems = _differences(stock, dense, family)
        if not problems:
            break
    else:
        name, found, wanted = problems[0]
        raise BundleError(
            f"{where}: {name} is {found!r}; a mixture that can be taken apart has {wanted!r}",
            hint=_WHY_NOT.get(name),
        )
    return MixtureConfig(
        family=family,
        dense=dense,
        num_experts=next(stock[name] for name in reversed(_COUNTS) if name in stock),
        num_experts_per_tok=stock["num_experts_per_tok"],
    )


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


def _refuse_no_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse sizes that are none, which the Transformers class would refuse in several lines, or not at all."""
    for name in (*_SIZES, *_SIZES_OR_NULL):
        value = config.get(name, 1)
        if (value is not None or name in _SIZES) and (type(value) is not int or value < 1):
            raise BundleError(f"{where}: {name} is {value!r}; expected a whole number above 0")
        if type(value) is int and value > _LARGEST:
            raise BundleError(f"{where}: {name} is {value!r}; expected at most {_LARGEST}")
    heads, hidden = config.get("num_attention_heads", 1), config.get("hidden_size", _LARGEST)
    if config.get("head_dim") is None and heads > hidden:
        raise BundleError(f"{where}: num_attention_heads is {heads}, more than hidden_size, {hidden}")
    eps = config.get("rms_norm_eps", 1e-6)
    if type(eps) not in (int, float) or not eps > 0:
        raise BundleError(f"{where}: rms_norm_eps is {eps!r}; expected a number above 0")


def _of_class(fields: Mapping[str, Any], where: str) -> Any:
    """Return the Transformers config of these fields, whose ``model_type`` is one that families have.

    Raises:
        BundleError: Its class does not take them.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        # Transformers writes into what it is given.
        made = transformers.AutoConfig.for_model(**copy.deepcopy(dict(fields)))
        made.to_dict()  # some fields are looked at here only
        return made
    except (StrictDataclassError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        named = _NAMED.match(str(error))
        if named and named[1] in fields:
            problem = f"{named[1]} is {fields[named[1]]!r}, which {fields['model_type']} models cannot have"
        else:
            problem = (
                f"Transformers refuses it as that of a {fields['model_type']} model: {' '.join(str(error).split())}"
            )
        raise BundleError(f"{where}: {problem}") from error


def _refuse_what_cannot_be_parted(config: Mapping[str, Any], where: str) -> None:
    if config.get("quantization_config") is not None:
        raise BundleError(f"{where}: quantization_config is set; experts are F32, BF16 or F16", hint="dequantise it")
    for name in _SHARED_EXPERTS:
        if config.get(name):
            raise BundleError(
                f"{where}: {name} is {config[name]!r}; a shared expert runs on every token, beside all others",
                hint="such a mixture cannot be taken apart into a public expert and closed ones",
            )


def _dense_fields(stock: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the config of one expert as a dense model: what its class knows of the mixture's fields."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = AutoConfig.for_model(family.dense_type).to_dict().keys() - _generic_fields() - set(_PRIVATE) | {"head_dim"}
    kept = {name: value for name, value in stock.items() if name in known and (name != "head_dim" or value)}
    kept |= {dense: stock[name] for name, dense in family.copied.items()}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.dense_type]
    return dict(sorted({**kept, "model_type": family.dense_type, "architectures": [architecture]}.items()))


def _differences(stock: Mapping[str, Any], dense: Mapping[str, Any], family: Family) -> list[tuple[str, Any, Any]]:
    """Return (field, its value, the value of a merged model) where a mixture is not what its parts merge into."""
    wanted = {name: value for name, value in family.required.items() if name in stock}
    if all(stock[name] == value for name, value in wanted.items()):
        wanted = resolve_moe_config(dense)
    free = _IMMATERIAL | _TRAINING_OF_MIXTURES | {*_PRIVATE, *_COUNTS, "num_experts_per_tok", *family.copied.values()}
    found = dict(stock)
    if "head_dim" in stock:
        found["head_dim"] = stock["head_dim"] or stock["hidden_size"] // stock["num_attention_heads"]
    names = sorted((wanted.keys() & found.keys()) - free)
    return [(name, found[name], wanted[name]) for name in names if found[name] != wanted[name]]


def _generic_fields() -> set[str]:
    """Return the fields that every config of Transformers has, but for those that a model's own config keeps."""
    import transformers

    return set(transformers.PretrainedConfig().to_dict()) - set(_GENERIC_KEPT)


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
