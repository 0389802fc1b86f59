"""Torch modules: the routed feed-forward block, and models built from weights."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "building": (
        "WeightSource",
        "autocast_dtype",
        "build_model",
        "build_sharded",
        "dense_shapes",
        "is_bare_sentencepiece",
        "load_dense",
        "load_tokenizer",
        "moved_tensors",
        "pick_device",
        "pick_dtype",
        "quiet_transformers",
        "route",
        "set_threads",
        "stock_problems",
    ),
    "configs": ("MixtureConfig", "read_mixture", "refuse_other_architecture", "resolve_moe_config", "warn_of_length"),
    "dense": ("build_dense", "save_dense"),
    "kernels": ("Kernels", "find_kernels", "fused"),
    "losses": ("training_loss",),
    "lowrank": ("decompose", "expand"),
    "presets": ("PRESETS", "new_model"),
    "recompute": ("recompute_layers",),
    "routed": ("exclude", "masking", "observing", "routed_layers", "set_top_k", "token_mask"),
    "slots": ("SlotCache", "Span", "forward"),
    "tensors": ("DTYPES", "to_bytes", "to_torch"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
