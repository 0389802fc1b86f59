"""Stock mixtures of experts that somebody else merged, taken apart as bytes: nothing of one is ever in memory whole.

Transformers has written them in two layouts: a tensor a matrix of each expert, and all experts of a layer packed into
two tensors. What packed tensors hold lies one after the other, so that both are read alike.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.codec import indented_json
from flexctl.bundle.copying import append_range
from flexctl.bundle.hashing import Advance, StoredTensor, hash_weights
from flexctl.bundle.layout import expert_layout, feed_forward_keys, stock_head
from flexctl.bundle.manifest import Architecture, digest_of
from flexctl.bundle.stock import (
    CONFIG_FILE,
    DENSE_PREFIX,
    HEAD,
    SINGLE_FILE,
    checkpoint_spans,
    is_stock_file,
)
from flexctl.bundle.tensors import (
    RawTensor,
    Span,
    TensorType,
    check_agreement,
    check_floats,
    from_float32,
    to_float32,
)
from flexctl.errors import BundleError
from flexctl.families import Family

__all__ = ["Mixture", "MixtureHashes", "hash_mixture", "open_mixture", "write_dense"]

_PACKED = "model.layers.{i}.mlp."
_GATE_UP, _DOWN, _ROUTER = "experts.gate_up_proj", "experts.down_proj", "gate.weight"
_BUFFER = ".rotary_emb.inv_freq"
_WHY_NOT = {
    r"shared_expert": "a shared expert runs on every token, beside all others; such a mixture cannot be taken apart",
    r"bias$": "neither routers nor experts of merged models have biases",
    r"(scale|scale_inv|scales|qweight|qzeros|absmax|_blocks)$": "dequantise it: experts are F32, BF16 or F16",
    r"\.mlp\.(gate|up|down)_proj\.weight$": "a layer without experts cannot be taken apart",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """A stock mixture on disk, its headers read and checked, its bytes not yet.

    Attributes:
        path: Directory.
        family: The one whose merged models have its class.
        architecture: Sizes of one expert as a dense model.
        shared: Where the weights outside the feed-forward networks lie, by dense name.
        experts: Where each expert's matrices lie, by expert tensor name, in the order of expert files.
        routers: Where the rows of each layer lie, (num_experts, hidden_size), of any float dtype.
    """

    path: Path
    family: Family
    architecture: Architecture
    shared: Mapping[str, Span]
    experts: tuple[Mapping[str, Span], ...]
    routers: tuple[Span, ...]

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(span.stop - span.start for span in self.spans().values())

    def size_of_dense(self, index: int) -> int:
        """Return the bytes of one expert with all that is shared, as a dense model."""
        spans = (*self.shared.values(), *self.experts[index].values())
        return sum(span.stop - span.start for span in spans)

    def spans(self) -> dict[str, Span]:
        """Return where all of it lies, by the names of a merged model, whatever the layout."""
        named = {self.family.router_name(layer): span for layer, span in enumerate(self.routers)}
        for index, expert in enumerate(self.experts):
            keys = feed_forward_keys(self.family, self.architecture.num_hidden_layers, index)
            named |= {keys[name]: span for name, span in expert.items()}
        return {**self.shared, **named}

    def rows(self, index: int, public: int) -> RawTensor:
        """Return an expert's router rows less the public expert's, (num_hidden_layers, hidden_size), F32.

        Every logit of a token moves by the same number, which no softmax and no order of logits sees. The difference
        of two BF16 numbers is exact in F32 where their exponents differ by at most 15 (F16: 12); any other is rounded
        once, by at most 2^-24 of itself.
        """
        shifted = [
            (span.rows(index, index + 1).load(), span.rows(public, public + 1).load(), span.dtype)
            for span in self.routers
        ]
        values = np.concatenate([to_float32(dtype, own) - to_float32(dtype, other) for own, other, dtype in shifted])
        return RawTensor("F32", (len(self.routers), self.architecture.hidden_size), from_float32("F32", values))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureHashes:
    """What one pass over a mixture's bytes finds.

    Attributes:
        digest: Of all its weights, the same for both layouts and any number of files.
        experts: Each expert's matrices by expert tensor name, with what their bytes are.
    """

    digest: str
    experts: tuple[Mapping[str, StoredTensor], ...]


def open_mixture(
    path: Path, *, family: Family, config: Mapping[str, Any], num_experts: int, shapes: Mapping[str, tuple[int, ...]]
) -> Mixture:
    """Return the stock mixture in a directory, after checking that it has the tensors of its class and no others.

    Args:
        path: Directory.
        family: The one whose merged models have its class.
        config: config.json of one expert as a dense model.
        num_experts: How many it has.
        shapes: Of every weight of that dense model, by name.

    Raises:
        BundleError: There are no safetensors, or a tensor is missing, extra, misshaped, or of another dtype.
    """
    spans = {name: span for name, span in checkpoint_spans(path).items() if not name.endswith(_BUFFER)}
    check_floats(spans)
    layers = config["num_hidden_layers"]
    packed = _PACKED.format(i=0) + _GATE_UP in spans
    first = _PACKED.format(i=0) + _GATE_UP if packed else family.expert_key(0, 0, "gate_proj")
    if first not in spans:
        raise BundleError(f"{path}: tensor {first} is missing", hint="save it by Transformers' save_pretrained")
    architecture = Architecture(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=layers,
        vocab_size=config["vocab_size"],
        dtype=spans[first].dtype,
    )
    shared = {name: shape for name, shape in shapes.items() if ".mlp." not in name}
    if config.get("tie_word_embeddings") and HEAD in spans:
        shared[HEAD] = spans[HEAD].shape
    expected = {name: _as_found(spans, name, shape) for name, shape in shared.items()}
    routers = [_PACKED.format(i=i) + _ROUTER if packed else family.router_name(i) for i in range(layers)]
    expected |= {name: _as_found(spans, name, (num_experts, architecture.hidden_size)) for name in routers}
    expected |= (_packed_layout if packed else _plain_layout)(family, architecture, num_experts)
    _refuse_telling(spans, expected)
    check_agreement(spans, expected, str(path))
    return Mixture(
        path=path,
        family=family,
        architecture=architecture,
        shared={name: spans[name] for name in shared},
        experts=tuple(
            _unpacked(spans, architecture, index)
            if packed
            else {name: spans[key] for name, key in feed_forward_keys(family, layers, index).items()}
            for index in range(num_experts)
        ),
        routers=tuple(spans[name] for name in routers),
    )


def hash_mixture(mixture: Mixture, advance: Advance) -> MixtureHashes:
    """Return what a mixture's bytes are, read once through small buffers.

    Raises:
        BundleError: A tensor holds NaN or infinity, or a file ends early.
    """
    infos = hash_weights(mixture.spans(), advance)
    layers = mixture.architecture.num_hidden_layers
    experts = []
    for index, expert in enumerate(mixture.experts):
        keys = feed_forward_keys(mixture.family, layers, index)
        experts.append({name: StoredTensor(keys[name], span, infos[keys[name]]) for name, span in expert.items()})
    return MixtureHashes(digest=digest_of(infos), experts=tuple(experts))


def write_dense(mixture: Mixture, index: int, folder: Path, config: Mapping[str, Any], advance: Advance) -> None:
    """Write one expert of a mixture as a stock dense checkpoint, with the mixture's tokenizer, byte for byte.

    Args:
        mixture: Where it comes from.
        index: Of the expert.
        folder: Directory to fill.
        config: config.json of the dense class.
        advance: Told the bytes written.
    """
    for file in mixture.path.iterdir():
        if file.is_file() and is_stock_file(file.name) and file.name != CONFIG_FILE:
            shutil.copyfile(file, folder / file.name)
    (folder / CONFIG_FILE).write_bytes(indented_json(config))
    own = {DENSE_PREFIX + name: span for name, span in mixture.experts[index].items()}
    spans = {**mixture.shared, **own}
    with (folder / SINGLE_FILE).open("xb") as output:
        output.write(stock_head(spans))
        for span in spans.values():
            append_range(span.path, span.start, output, span.stop - span.start)
            advance(span.stop - span.start)


def _as_found(spans: Mapping[str, Span], name: str, shape: tuple[int, ...]) -> TensorType:
    """Return what a tensor must be that may have any float dtype."""
    return TensorType(spans[name].dtype if name in spans else "F32", shape)


def _plain_layout(family: Family, architecture: Architecture, num_experts: int) -> dict[str, TensorType]:
    layout, layers = expert_layout(architecture), architecture.num_hidden_layers
    keys = (feed_forward_keys(family, layers, index) for index in range(num_experts))
    return {key: layout[name] for expert in keys for name, key in expert.items()}


def _packed_layout(_family: Family, architecture: Architecture, num_experts: int) -> dict[str, TensorType]:
    hidden, inner, dtype = architecture.hidden_size, architecture.intermediate_size, architecture.dtype
    layout = {}
    for layer in range(architecture.num_hidden_layers):
        layout[_PACKED.format(i=layer) + _GATE_UP] = TensorType(dtype, (num_experts, 2 * inner, hidden))
        layout[_PACKED.format(i=layer) + _DOWN] = TensorType(dtype, (num_experts, hidden, inner))
    return layout


def _unpacked(spans: Mapping[str, Span], architecture: Architecture, index: int) -> dict[str, Span]:
    """Return where the matrices of one expert lie inside packed tensors: gate and then up, and down."""
    found = {}
    layout = expert_layout(architecture)
    for layer in range(architecture.num_hidden_layers):
        both, down = (spans[_PACKED.format(i=layer) + name].rows(index, index + 1) for name in (_GATE_UP, _DOWN))
        middle = (both.start + both.stop) // 2
        places = {
            "gate": (both, both.start, middle),
            "up": (both, middle, both.stop),
            "down": (down, down.start, down.stop),
        }
        for part, (span, start, stop) in places.items():
            name = f"layers.{layer}.mlp.{part}_proj.weight"
            found[name] = Span(span.path, span.dtype, layout[name].shape, start, stop)
    return found


def _refuse_telling(spans: Mapping[str, Span], expected: Mapping[str, TensorType]) -> None:
    """Refuse a tensor that does not belong there and whose name tells why."""
    for name, span in spans.items():
        for pattern, reason in _WHY_NOT.items() if name not in expected else ():
            if re.search(pattern, name):
                raise BundleError(f"{span.path}: tensor {name} is extra", hint=reason)
