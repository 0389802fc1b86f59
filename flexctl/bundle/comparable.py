"""Stock checkpoints, dense or mixture, as models to compare with: no manifest, nothing to verify."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexctl.bundle.layout import feed_forward_keys
from flexctl.bundle.names import PUBLIC, shown
from flexctl.bundle.stock import CONFIG_FILE, DENSE_PREFIX, checkpoint_spans, read_dense_config
from flexctl.bundle.tensors import Span, TensorType, Typed, check_agreement, check_floats
from flexctl.bundle.weights import Weights, zero_rows
from flexctl.errors import BundleError
from flexctl.families import Family, family_of

__all__ = ["alone", "is_mixture", "open_checkpoint"]


def alone(weights: Weights) -> Weights:
    """Return the public expert of a model as a model of its own: the anchor."""
    return Weights(
        dense_config=weights.dense_config,
        shared=weights.shared,
        experts={PUBLIC: weights.experts[PUBLIC]},
        router=zero_rows(len(weights.router), weights.router[0].shape[1]),
        num_experts_per_tok=1,
    )


def is_mixture(path: Path, anchor: Weights) -> bool:
    """Return whether the checkpoint in a directory is of the anchor's mixture class, rather than of its dense class.

    Raises:
        BundleError: It is of neither.
    """
    family = _family(anchor)
    model_type = read_dense_config(path).get("model_type")
    if model_type not in (family.dense_type, family.moe_type):
        raise BundleError(
            f"{path / CONFIG_FILE}: model_type is {shown(model_type)}; "
            f"expected {family.dense_type!r} or {family.moe_type!r}, as the anchor's family has them"
        )
    return bool(model_type == family.moe_type)


def open_checkpoint(path: Path, anchor: Weights) -> Weights:
    """Return the stock checkpoint in a directory, which has the anchor's family and sizes, memory-mapped.

    Args:
        path: As ``save_pretrained`` leaves it, dense or mixture; a mixture has a tensor an expert.
        anchor: What it descends from.

    Raises:
        BundleError: It is of another family, or a tensor is missing, extra, misshaped or of no float dtype.
    """
    spans = checkpoint_spans(path)
    if is_mixture(path, anchor):
        return _mixture(path, spans, anchor)
    expected = {**anchor.shared, **{DENSE_PREFIX + name: raw for name, raw in anchor.experts[PUBLIC].items()}}
    _check_shapes(path, spans, expected)
    return replace(
        alone(anchor),
        shared={name: spans[name].read() for name in anchor.shared},
        experts={PUBLIC: {name: spans[DENSE_PREFIX + name].read() for name in anchor.experts[PUBLIC]}},
    )


def _mixture(path: Path, spans: Mapping[str, Span], anchor: Weights) -> Weights:
    family, layers = _family(anchor), len(anchor.router)
    config = read_dense_config(path)
    count, top_k = _count(path, config, family.count_field), _count(path, config, "num_experts_per_tok")
    keys = [feed_forward_keys(family, layers, index) for index in range(count)]
    rows = [family.router_name(layer) for layer in range(layers)]
    expected: dict[str, Typed] = dict(anchor.shared)
    expected |= {own[name]: raw for own in keys for name, raw in anchor.experts[PUBLIC].items()}
    expected |= {name: TensorType("F32", (count, anchor.router[0].shape[1])) for name in rows}
    _check_shapes(path, spans, expected)
    names = [PUBLIC, *(f"expert-{index}" for index in range(1, count))]
    return Weights(
        dense_config=anchor.dense_config,
        shared={name: spans[name].read() for name in anchor.shared},
        experts={
            name: {tensor: spans[key].read() for tensor, key in own.items()}
            for name, own in zip(names, keys, strict=True)
        },
        router=tuple(spans[name].read() for name in rows),
        num_experts_per_tok=min(top_k, count),
    )


def _family(anchor: Weights) -> Family:
    return family_of(str(anchor.dense_config["model_type"]))


def _count(path: Path, config: Mapping[str, Any], field: str) -> int:
    count = config.get(field)
    if type(count) is not int or count < 1:
        raise BundleError(f"{path / CONFIG_FILE}: {field} is {shown(count)}; expected a whole number")
    return count


def _check_shapes(path: Path, found: Mapping[str, Span], expected: Mapping[str, Typed]) -> None:
    """Refuse other tensors than the expected; they may be of any float dtype."""
    check_floats(found)
    types = {
        name: TensorType(found[name].dtype if name in found else tensor.dtype, tensor.shape)
        for name, tensor in expected.items()
    }
    check_agreement(found, types, str(path))
