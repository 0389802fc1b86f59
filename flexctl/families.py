"""Model families: which dense anchor becomes which mixture-of-experts class, and under which keys.

One row a family, used by the bundle code (key names, config) and the model code (classes) alike.
Sources: the state dicts and config classes of Transformers 5, and vLLM's loaders for the same classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexctl.errors import BundleError

__all__ = ["FAMILIES", "PROJECTIONS", "Family", "family_of", "feed_forward_names", "mixture_families"]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a SwiGLU feed-forward network, in the order that every file keeps them."""

_GENERIC = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How one dense architecture maps onto the mixture-of-experts class that stock software has.

    Attributes:
        dense_type: ``model_type`` of the anchor's config.
        moe_type: ``model_type`` of the merged model's config.
        moe_architecture: Class name for ``architectures`` in the merged config.
        experts_prefix: Where layer ``{i}`` keeps expert ``{k}`` in the merged checkpoint.
        router_key: Where layer ``{i}`` keeps its router in the merged checkpoint.
        projections: Name of each projection inside the merged checkpoint's experts.
        count_field: Config field with the number of experts.
        renormalises: Whether the class divides kept probabilities by their sum.
        post_norm: Whether an RMSNorm follows the feed-forward network, so that scale is absorbed.
        fixed: Config fields that the merged model always has.
        copied: Merged config field -> dense config field that it takes its value from.
        required: Dense config fields that must have the given value, else the anchor is refused.
    """

    dense_type: str
    moe_type: str
    moe_architecture: str
    experts_prefix: str = "model.layers.{i}.mlp.experts.{k}"
    router_key: str = "model.layers.{i}.mlp.gate.weight"
    projections: Mapping[str, str] = field(default_factory=lambda: dict(_GENERIC))
    count_field: str = "num_experts"
    renormalises: bool = True
    post_norm: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    copied: Mapping[str, str] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)

    def expert_key(self, layer: int | str, index: int | str, projection: str) -> str:
        """Return the merged checkpoint's key of one projection of expert ``index`` in ``layer``.

        Either may be text, for a key of fixed width.
        """
        prefix = self.experts_prefix.format(i=layer, k=index)
        return f"{prefix}.{self.projections[projection]}.weight"

    def merged_config(self, moe_config: Mapping[str, Any], num_experts: int, requested: int) -> dict[str, Any]:
        """Return a merged model's config.json: the finished mixture config with its counts.

        Args:
            moe_config: From the anchor's manifest, or another merged model of the same anchor.
            num_experts: Including the public expert.
            requested: num_experts_per_tok as asked for; never more than there are experts.
        """
        counts = {self.count_field: num_experts, "num_experts_per_tok": min(requested, num_experts)}
        return {**moe_config, **counts}

    def dense_config(self, moe_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the dense class's config behind a merged model's: every field resolved, but ``architectures``."""
        added = {self.count_field, "num_experts_per_tok", "architectures", *self.fixed, *self.copied}
        kept = {name: value for name, value in moe_config.items() if name not in added}
        return {**kept, "model_type": self.dense_type}

    def router_name(self, layer: int) -> str:
        """Return the merged checkpoint's key of ``layer``'s router."""
        return self.router_key.format(i=layer)


_MIXTRAL: dict[str, Any] = {
    "moe_type": "mixtral",
    "moe_architecture": "MixtralForCausalLM",
    "experts_prefix": "model.layers.{i}.block_sparse_moe.experts.{k}",
    "router_key": "model.layers.{i}.block_sparse_moe.gate.weight",
    "projections": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "count_field": "num_local_experts",
}

FAMILIES: tuple[Family, ...] = (
    Family(
        dense_type="olmo2",
        moe_type="flex_olmo",
        moe_architecture="FlexOlmoForCausalLM",
        renormalises=False,
        post_norm=True,
        fixed={"norm_topk_prob": False},
        required={"attention_bias": False},
    ),
    Family(dense_type="llama", required={"attention_bias": False, "mlp_bias": False}, **_MIXTRAL),
    Family(dense_type="mistral", **_MIXTRAL),
    Family(
        dense_type="qwen3",
        moe_type="qwen3_moe",
        moe_architecture="Qwen3MoeForCausalLM",
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        copied={"moe_intermediate_size": "intermediate_size"},
        required={"attention_bias": False, "use_sliding_window": False},
    ),
)


def family_of(dense_type: str) -> Family:
    """Return the family of a dense ``model_type``.

    Raises:
        BundleError: No family has that type; the message names those that exist.
    """
    for family in FAMILIES:
        if family.dense_type == dense_type:
            return family
    known = ", ".join(family.dense_type for family in FAMILIES)
    hint = f"use an anchor of one of these families: {known}"
    if any(family.moe_type == dense_type for family in FAMILIES):
        hint = "flexctl adopt takes a mixture of experts apart, into an anchor and experts"
    raise BundleError(
        f"config.json: model_type is {dense_type!r}, which no mixture-of-experts class of stock software takes",
        hint=hint,
    )


def mixture_families(moe_type: str) -> tuple[Family, ...]:
    """Return the families whose merged models have a ``model_type``.

    Raises:
        BundleError: There are none; the message names those that exist.
    """
    found = tuple(family for family in FAMILIES if family.moe_type == moe_type)
    if not found:
        known = ", ".join(dict.fromkeys(family.moe_type for family in FAMILIES))
        raise BundleError(
            f"config.json: model_type is {moe_type!r}; mixtures of these types can be taken apart: {known}",
            hint="flexctl init-anchor makes an anchor of a dense checkpoint",
        )
    return found


def feed_forward_names(num_hidden_layers: int) -> Iterator[tuple[int, str, str]]:
    """Yield (layer, projection, expert tensor name) in the order in which expert files keep them."""
    for layer in range(num_hidden_layers):
        for projection in PROJECTIONS:
            yield layer, projection, f"layers.{layer}.mlp.{projection}.weight"
