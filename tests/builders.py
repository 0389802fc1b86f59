"""Makers of tiny random anchors and experts on disk, in well under a second and without torch, and of broken ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle import (
    Anchor,
    DataInfo,
    Expert,
    RawTensor,
    RouterInfo,
    open_anchor,
    write_anchor,
    write_expert,
)
from flexctl.bundle.anchor import write_tensors
from flexctl.bundle.codec import canonical_json, encode
from flexctl.bundle.hashing import hash_raw
from flexctl.bundle.headers import header_bytes
from flexctl.bundle.index import Index, open_index
from flexctl.bundle.layout import ROUTER_TENSOR, expert_layout
from flexctl.bundle.manifest import MANIFEST_KEY, digest_of
from flexctl.bundle.stock import checkpoint_spans
from flexctl.bundle.tensors import TensorType, from_float32, size_of, to_float32
from flexctl.families import family_of
from flexctl.runtime import SILENT
from flexctl.text.documents import Record
from flexctl.tracing.building import build_index

_NORMS = {
    "olmo2": {"self_attn.q_norm": "hidden", "self_attn.k_norm": "hidden", "post_feedforward_layernorm": "hidden"},
    "llama": {"input_layernorm": "hidden"},
    "mistral": {"input_layernorm": "hidden"},
    "qwen3": {"self_attn.q_norm": "head", "self_attn.k_norm": "head", "input_layernorm": "hidden"},
}


def random_tensor(rng: np.random.PCG64, dtype: str, shape: tuple[int, ...]) -> RawTensor:
    """Return numbers between -1 and 1 rounded to ``dtype``; the same on every machine and with every numpy."""
    raw = np.asarray(rng.random_raw(math.prod(shape)), np.uint64) >> np.uint64(40)
    values = (raw.astype(np.float64) / 2**23 - 1).astype(np.float32)
    return RawTensor(dtype, shape, from_float32(dtype, values))


def make_checkpoint(
    path: Path,
    *,
    model_type: str = "olmo2",
    dtype: str = "F32",
    layers: int = 2,
    hidden: int = 8,
    inner: int = 12,
    vocab: int = 32,
    shards: int = 1,
    tied: bool = False,
    seed: int = 0,
    tokenizer: Path | None = None,
    sparse: bool = False,
) -> Path:
    """Write a stock dense checkpoint with random weights, in one file or in several with an index.

    A sparse one is all zeros that take no room on the disk; ``tokenizer`` is a directory to take real tokenizer files
    from.
    """
    path.mkdir(parents=True)
    config = {
        "model_type": model_type,
        "architectures": [{"olmo2": "Olmo2", "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}[model_type]],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config["architectures"] = [config["architectures"][0] + "ForCausalLM"]
    rng = np.random.PCG64(seed)
    shapes = _dense_shapes(model_type, layers, hidden, inner, vocab, tied)
    names = list(shapes)
    tensors = {} if sparse else {name: random_tensor(rng, dtype, shape) for name, shape in shapes.items()}
    if sparse:
        write_zeros(path / "model.safetensors", {name: TensorType(dtype, shape) for name, shape in shapes.items()})
    elif shards == 1:
        write_tensors(path / "model.safetensors", tensors)
    else:
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            mine = names[shard::shards]
            write_tensors(path / file, {name: tensors[name] for name in mine})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text('{"do_sample": false}\n')
    (path / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}\n')
    for file in tokenizer.glob("tokenizer*") if tokenizer else ():
        shutil.copy(file, path)
    return path


def write_zeros(path: Path, tensors: Mapping[str, TensorType]) -> None:
    """Write a safetensors file whose tensors are a hole, all zeros."""
    head = header_bytes(tensors, {"format": "pt"})
    with path.open("xb") as file:
        file.write(head)
        file.truncate(len(head) + sum(map(size_of, tensors.values())))


def noisy(tensor: RawTensor, seed: int, size: float = 0.05) -> RawTensor:
    """Return a tensor with normal noise of standard deviation ``size``."""
    values = to_float32(tensor.dtype, tensor.data)
    noise = np.random.Generator(np.random.PCG64(seed)).standard_normal(len(values)).astype(np.float32)
    return RawTensor(tensor.dtype, tensor.shape, from_float32(tensor.dtype, values + size * noise))


def fine_tune(
    base: Path,
    path: Path,
    names: Sequence[str] | None = None,
    change: Callable[[dict[str, RawTensor]], Mapping[str, RawTensor]] = dict,
) -> Path:
    """Write a copy of a dense checkpoint in which tensors have moved, and whatever else ``change`` does to them.

    Args:
        base: Checkpoint or anchor.
        path: Directory to write.
        names: Tensors that get noise; None is all of the feed-forward networks.
        change: What else becomes of the tensors.
    """
    shutil.copytree(base, path, ignore=shutil.ignore_patterns("flexctl.json", "*.safetensors*", "run.json"))
    tensors = {name: span.read() for name, span in checkpoint_spans(base).items()}
    moved = [name for name in tensors if ".mlp." in name] if names is None else names
    tensors |= {name: noisy(tensors[name], sum(name.encode())) for name in moved}
    write_tensors(path / "model.safetensors", change(tensors))
    return path


def simple_moe_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dense config with the mixture's fields; the real resolution needs Transformers."""
    family = family_of(config["model_type"])
    return {
        **config,
        **family.fixed,
        **{field: config[source] for field, source in family.copied.items()},
        "model_type": family.moe_type,
        "architectures": [family.moe_architecture],
        family.count_field: 1,
        "num_experts_per_tok": 1,
    }


def make_anchor(
    path: Path,
    *,
    name: str = "tiny-anchor",
    license: str | None = "Apache-2.0",
    resolve: Callable[[Mapping[str, Any]], Mapping[str, Any]] = simple_moe_config,
    **sizes: Any,
) -> Anchor:
    """Write an anchor over ``make_checkpoint(**sizes)``."""
    checkpoint = make_checkpoint(path.with_name(path.name + "-checkpoint"), **sizes)
    config = json.loads((checkpoint / "config.json").read_text())
    rng = np.random.PCG64(1)
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    space = {}
    for layer in range(layers):
        space[f"layers.{layer}.mean"] = random_tensor(rng, "F32", (hidden,))
        space[f"layers.{layer}.covariance_factor"] = random_tensor(rng, "F32", (min(hidden, 256), hidden))
        ones = np.ones(hidden, np.float32)
        space[f"layers.{layer}.covariance_diagonal"] = RawTensor("F32", (hidden,), from_float32("F32", ones))
    tokens = (np.asarray(rng.random_raw(100)) % config["vocab_size"]).astype("<u4")
    offsets = np.array([0, 40, 100], "<i8")
    write_anchor(
        path,
        checkpoint=checkpoint,
        name=name,
        moe_config=resolve(config),
        router_space=space,
        public_sample={
            "offsets": RawTensor("I64", (3,), offsets.view(np.uint8)),
            "tokens": RawTensor("U32", (100,), tokens.view(np.uint8)),
        },
        overwrite=False,
        license=license,
    )
    return open_anchor(path)


def make_tensors(
    anchor: Anchor, seed: int, rank: int | None = None, *, several_ranks: bool = False
) -> dict[str, RawTensor]:
    """Return random tensors of an expert for ``anchor``; of several ranks, matrices have ranks from 1 to ``rank``."""
    rng = np.random.PCG64([seed, rank or 0])
    layout = expert_layout(anchor.manifest.architecture, rank)
    if rank and several_ranks:
        firsts = [(name, tensor) for name, tensor in layout.items() if name.endswith("lora_A")]
        found = {name: replace(a, shape=(1 + i % rank, a.shape[1])) for i, (name, a) in enumerate(firsts)}
        layout = expert_layout(anchor.manifest.architecture, rank, found)
    return {name: random_tensor(rng, tensor.dtype, tensor.shape) for name, tensor in layout.items()}


def make_expert(
    path: Path,
    anchor: Anchor,
    name: str,
    *,
    seed: int | None = None,
    rank: int | None = None,
    license: str | None = "Apache-2.0",
    expires: str | None = None,
    tensors: dict[str, RawTensor] | None = None,
    overwrite: bool = False,
    **data: Any,
) -> Expert:
    """Write a random expert; its weights follow from its name unless a seed is given."""
    seed = sum(name.encode()) if seed is None else seed
    layers = anchor.manifest.architecture.num_hidden_layers
    tensors = make_tensors(anchor, seed, rank) if tensors is None else tensors
    assert ROUTER_TENSOR in tensors
    return write_expert(
        path,
        anchor=anchor,
        name=name,
        tensors=tensors,
        data=DataInfo(documents=3, tokens=100, bytes=400, license=license, expires=expires, **data),
        training={"seed": seed, "steps": 2, "losses": [3.5, 3.25], "frozen_verified": True},
        router=RouterInfo(kind="discriminant", samples=3, encoder=None, trained=False, bias=(-1.5,) * layers),
        rank=rank,
        run={"tokens_per_s": 12.5},
        overwrite=overwrite,
    )


def forge_expert(path: Path, expert: Expert, tensors: Mapping[str, RawTensor] | None = None, **changes: Any) -> Path:
    """Write a file like an expert's with other tensors or manifest fields, as a careless or hostile owner might.

    The digest fits the tensors unless it is among the changes, whose names are dotted: ``anchor__digest``.
    """
    tensors = {name: expert.tensor(name) for name in expert.spans} if tensors is None else tensors
    infos = {name: hash_raw(tensor) for name, tensor in tensors.items()}
    manifest = encode(replace(expert.manifest, tensors=infos, digest=digest_of(infos)))
    for field, value in changes.items():
        *parents, last = field.split("__")
        place = manifest
        for parent in parents:
            place = place[parent]
        place[last] = value
    text = canonical_json(manifest).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(header_bytes(tensors, {MANIFEST_KEY: text}))
        for tensor in tensors.values():
            file.write(tensor.view())
    return path


def read_directory(path: Path) -> dict[str, bytes]:
    """Return every file below a directory but results.json, which evaluate leaves beside a bundle: name -> bytes."""
    files = (item for item in sorted(path.rglob("*")) if item.is_file() and item.name != "results.json")
    return {str(item.relative_to(path)): item.read_bytes() for item in files}


@dataclass(frozen=True, slots=True)
class World:
    """An anchor and experts in a folder of their own."""

    root: Path
    anchor: Anchor
    experts: dict[str, Expert]

    def files(self, *names: str) -> tuple[Path, ...]:
        """Return the files of some experts; of all without names."""
        return tuple(self.experts[name].path for name in names or self.experts)


def make_world(root: Path, names: tuple[str, ...] = ("code", "law", "math"), **sizes: Any) -> World:
    """Return an anchor in ``root``/anchor and experts in ``root``/experts; a name starting with "low" has rank 2."""
    anchor = make_anchor(root / "anchor", **sizes)
    experts = {
        name: make_expert(root / f"experts/{name}.st", anchor, name, rank=2 if name.startswith("low") else None)
        for name in names
    }
    return World(root, anchor, experts)


def make_index(folder: Path, texts: Iterable[str], *, shard_bytes: int = 1 << 20) -> Index:
    """Return the index of some documents of one file, law.jsonl."""
    records = [Record("law.jsonl", number, text) for number, text in enumerate(texts, start=1)]
    with SILENT.progress("", 0, "") as bar:
        build_index(
            folder / "an.index",
            records,
            name="law",
            shard_bytes=shard_bytes,
            folder=folder / "work",
            overwrite=True,
            progress=bar,
        )
    return open_index(folder / "an.index")


TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def anchor_with_chat_template(anchor: Path, folder: Path, template: str = TURNS) -> Path:
    """The same dense model as an anchor whose tokenizer knows how user and assistant take turns."""
    import tiny

    from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor

    source = folder / "source"
    shutil.copytree(anchor, source, ignore=shutil.ignore_patterns("flexctl.json", "router-space*", "public-sample*"))
    (source / "chat_template.jinja").write_text(template)
    (folder / "public.txt").write_text("\n".join(tiny.make_texts("public", 40)))
    chatty = folder / "chatty"
    init_anchor(InitAnchorConfig(source=str(source), data=(folder / "public.txt",), output=chatty, threads=1))
    return chatty


def _dense_shapes(
    model_type: str, layers: int, hidden: int, inner: int, vocab: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    widths = {"hidden": hidden, "head": hidden // 2}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for projection in "qkvo":
            shapes[f"{prefix}.self_attn.{projection}_proj.weight"] = (hidden, hidden)
        for norm, width in _NORMS[model_type].items():
            shapes[f"{prefix}.{norm}.weight"] = (widths[width],)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
