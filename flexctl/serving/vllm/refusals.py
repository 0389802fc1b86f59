"""What vLLM is not asked to do, and where it is not asked at all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from flexctl.bundle import Anchor, Expert, Merged
from flexctl.errors import UsageError

__all__ = ["PLUGIN", "RELEASES", "merged_of", "refuse_config", "refuse_flags", "refuse_release", "require_vllm"]

RELEASES = ("0.32",)
"""Minor releases of vLLM that the tests ran."""

PLUGIN = "flexctl"
"""Name of the entry point."""

_OURS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--config",
    "--dtype",
    "--additional-config",
    "--worker-extension-cls",
    "--api-key",
)
"""Flags that flexctl gives, or that would give them from elsewhere."""


def refuse_release() -> None:
    """Refuse where no vLLM is installed, or one that the tests did not run.

    Raises:
        UsageError: So it is.
    """
    hint = f"pip install 'vllm=={RELEASES[-1]}.*' beside flexctl, or leave out `engine`"
    found = _installed()
    if found is None:
        raise UsageError("vLLM is not installed here", hint=hint, field="engine")
    if not found.startswith(tuple(f"{release}." for release in RELEASES)):
        said = f"this is vLLM {found}; masks were tested with {', '.join(RELEASES)} alone"
        raise UsageError(said, hint=hint, field="engine")


def _installed() -> str | None:
    """Return vLLM's version; builds for other machines have other package names."""
    packages = metadata.packages_distributions().get("vllm", [])
    return metadata.version(packages[0]) if packages else None


def require_vllm() -> None:
    """Refuse where vLLM cannot serve with masks.

    Raises:
        UsageError: It is not installed, is another release, its processes would not find the plugin, or it would ask
            for a key of its own.
    """
    refuse_release()
    if os.environ.get("VLLM_API_KEY"):
        raise UsageError("VLLM_API_KEY is vLLM's own", hint="unset it and write a file for `api_keys`", field="engine")
    if not metadata.entry_points(group="vllm.general_plugins", name=PLUGIN):
        said = "vLLM does not find flexctl's plugin, as flexctl runs from a folder and is not installed"
        raise UsageError(said, hint="pip install flexctl beside vLLM", field="engine")


def merged_of(bundle: Anchor | Expert | Merged, place: object) -> Merged:
    """Return a bundle that vLLM can serve.

    Args:
        bundle: Whatever it is.
        place: How an error names it.

    Raises:
        UsageError: It is not merged.
    """
    if isinstance(bundle, Merged):
        return bundle
    kind = "an anchor" if isinstance(bundle, Anchor) else "an expert"
    hint = "merge first (flexctl merge), or leave out `engine`"
    raise UsageError(f"{place} is {kind}, and vLLM serves merged models", hint=hint, field="bundle")


def refuse_flags(flags: Sequence[str]) -> None:
    """Refuse flags for vLLM that flexctl gives, or that would give them from elsewhere.

    Raises:
        UsageError: One is.
    """
    for flag in flags:
        name = re.split("[=.]", flag, maxsplit=1)[0].replace("_", "-")
        if name in _OURS:
            raise UsageError(f"{name} is flexctl's to give to vLLM", hint="leave it out", field="engine_flags")


def refuse_config(config: Any) -> None:
    """Refuse what cannot carry a mask, or was not tried with one.

    Args:
        config: vLLM's resolved configuration.

    Raises:
        UsageError: It asks for such a thing.
    """
    parallel = config.parallel_config
    untried = {
        "sequence-parallel experts": parallel.use_sequence_parallel_moe,
        "micro-batches (--enable-dbo)": parallel.use_ubatching,
        "experts that move (--enable-eplb)": parallel.enable_eplb,
        "data parallelism": parallel.data_parallel_size > 1,
        "speculative decoding": config.speculative_config is not None,
        "LoRA adapters": config.lora_config is not None,
        "quantised weights": config.quant_config is not None,
        "key-value caches outside vLLM": config.kv_transfer_config is not None,
        "prompts of embeddings": config.model_config.enable_prompt_embeds,
    }
    for what, asked in untried.items():
        if asked:
            raise UsageError(f"masks of experts do not go with {what}", hint="leave that out", field="engine_flags")
