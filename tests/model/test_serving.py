"""What vLLM's loaders look for in a merged model, as docs/serving.md has it, held against what merge writes.

vLLM itself is not run here. The tables say, in this project's words, which keys and config fields its classes read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import make_anchor, make_expert

from flexctl.bundle import Anchor
from flexctl.bundle.headers import read_header
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.model.configs import resolve_moe_config

LAYERS, HIDDEN, INNER, VOCAB, HEAD, EXPERTS = 2, 8, 12, 32, 4, 3

pytestmark = pytest.mark.usefixtures("in_empty_folder")

_EVERYWHERE: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "model.layers.{i}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{i}.self_attn.k_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{i}.self_attn.v_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{i}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.{i}.post_attention_layernorm.weight": (HIDDEN,),
}
_NAMED: dict[str, tuple[int, ...]] = {
    "model.layers.{i}.mlp.gate.weight": (EXPERTS, HIDDEN),
    "model.layers.{i}.mlp.experts.{k}.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.{i}.mlp.experts.{k}.up_proj.weight": (INNER, HIDDEN),
    "model.layers.{i}.mlp.experts.{k}.down_proj.weight": (HIDDEN, INNER),
}
_PRE_NORM: dict[str, tuple[int, ...]] = {"model.layers.{i}.input_layernorm.weight": (HIDDEN,)}

KEYS: dict[str, dict[str, tuple[int, ...]]] = {
    "FlexOlmoForCausalLM": {
        **_EVERYWHERE,
        **_NAMED,
        "model.layers.{i}.post_feedforward_layernorm.weight": (HIDDEN,),
        "model.layers.{i}.self_attn.q_norm.weight": (HIDDEN,),
        "model.layers.{i}.self_attn.k_norm.weight": (HIDDEN,),
    },
    "MixtralForCausalLM": {
        **_EVERYWHERE,
        **_PRE_NORM,
        "model.layers.{i}.block_sparse_moe.gate.weight": (EXPERTS, HIDDEN),
        "model.layers.{i}.block_sparse_moe.experts.{k}.w1.weight": (INNER, HIDDEN),
        "model.layers.{i}.block_sparse_moe.experts.{k}.w3.weight": (INNER, HIDDEN),
        "model.layers.{i}.block_sparse_moe.experts.{k}.w2.weight": (HIDDEN, INNER),
    },
    "Qwen3MoeForCausalLM": {
        **_EVERYWHERE,
        **_PRE_NORM,
        **_NAMED,
        "model.layers.{i}.self_attn.q_norm.weight": (HEAD,),
        "model.layers.{i}.self_attn.k_norm.weight": (HEAD,),
    },
}

_FIELDS: dict[str, type] = {
    "hidden_size": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "num_attention_heads": int,
    "num_experts_per_tok": int,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "rms_norm_eps": float,
    "rope_parameters": dict,
    "rope_theta": float,
    "tie_word_embeddings": bool,
    "vocab_size": int,
    "dtype": str,
}
FIELDS: dict[str, dict[str, type]] = {
    "FlexOlmoForCausalLM": {**_FIELDS, "num_experts": int},
    "MixtralForCausalLM": {**_FIELDS, "num_local_experts": int, "head_dim": int},
    "Qwen3MoeForCausalLM": {
        **_FIELDS,
        "num_experts": int,
        "head_dim": int,
        "hidden_act": str,
        "moe_intermediate_size": int,
        "norm_topk_prob": bool,
        "decoder_sparse_step": int,
        "mlp_only_layers": list,
    },
}
CLASSES = {
    "olmo2": "FlexOlmoForCausalLM",
    "llama": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}


def make_merged(model_type: str, **settings: Any) -> tuple[Anchor, Path]:
    anchor = make_anchor(Path("anchor").absolute(), model_type=model_type, resolve=resolve_moe_config, **settings)
    experts = tuple(make_expert(Path(f"{name}.st"), anchor, name).path for name in ("code", "law"))
    return anchor, merge(MergeConfig(experts=experts, anchor=anchor.path, output=Path("merged"), top_k=2)).path


def loaded_files(folder: Path) -> list[Path]:
    """As vLLM chooses them: every safetensors file, less those that the index does not name, if there is one."""
    found, index = sorted(folder.glob("*.safetensors")), folder / "model.safetensors.index.json"
    if not index.is_file():
        return found
    named = set(json.loads(index.read_text())["weight_map"].values())
    return [path for path in found if path.name in named]


def loaded_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in loaded_files(folder):
        tensors = read_header(path).tensors
        assert not tensors.keys() & shapes.keys(), "the same key in two files"
        shapes |= {name: span.shape for name, span in tensors.items()}
    return shapes


def written_out(patterns: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        pattern.format(i=layer, k=expert): shape
        for pattern, shape in patterns.items()
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", CLASSES)
def test_keys_and_shapes_are_those_that_the_loader_looks_for(model_type: str, tied: bool) -> None:
    _, merged = make_merged(model_type, tied=tied)
    head = {} if tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    assert loaded_shapes(merged) == written_out(KEYS[CLASSES[model_type]]) | head


@pytest.mark.parametrize("model_type", CLASSES)
def test_config_has_every_field_that_the_class_reads(model_type: str) -> None:
    _, merged = make_merged(model_type)
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == [CLASSES[model_type]]
    for name, kind in FIELDS[CLASSES[model_type]].items():
        assert type(config[name]) is kind, name
    assert config.get("num_local_experts", config.get("num_experts")) == EXPERTS
    assert config["num_experts_per_tok"] == 2
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    if model_type == "qwen3":
        assert config["moe_intermediate_size"] == config["intermediate_size"] == INNER
        assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [])


@pytest.mark.parametrize("model_type", CLASSES)
def test_each_expert_matrix_is_taken_by_one_entry_of_the_experts_mapping(model_type: str) -> None:
    """vLLM looks for ``experts.{k}.{name}.`` inside a key, for every k and name: one of them must be there, once."""
    _, merged = make_merged(model_type)
    names = ("w1", "w2", "w3") if "Mixtral" in CLASSES[model_type] else ("gate_proj", "down_proj", "up_proj")
    parts = [f"experts.{k}.{name}." for k in range(EXPERTS) for name in names]
    inside = [key for key in loaded_shapes(merged) if ".experts." in key]
    assert len(inside) == LAYERS * len(parts)
    assert all(sum(part in key for part in parts) == 1 for key in inside)
    assert not any(re.search(r"[qkv]_proj", key) for key in inside), "they would be taken for attention"


def test_other_safetensors_files_beside_the_weights_are_not_loaded() -> None:
    anchor, merged = make_merged("llama")
    (merged / "router-untuned.safetensors").write_bytes((merged / "model-router.safetensors").read_bytes())
    assert all(path.name.startswith("model-") for path in loaded_files(merged))
    assert len(loaded_files(merged)) == 2 + EXPERTS
    assert [path.name for path in loaded_files(anchor.path)] == ["model.safetensors"]
    assert {path.name for path in anchor.path.glob("*.safetensors")} > {"model.safetensors", "router-space.safetensors"}


def test_an_anchor_s_index_lists_every_weight() -> None:
    anchor, _ = make_merged("llama", dtype="BF16")
    index = json.loads((anchor.path / "model.safetensors.index.json").read_text())
    header = read_header(anchor.path / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(sorted(header.tensors), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(span.stop - span.start for span in header.tensors.values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("model_type", "tied", "warned"), [("olmo2", True, 1), ("olmo2", False, 0), ("llama", True, 0)]
)
def test_a_tied_head_that_vllm_would_not_tie_is_told(
    model_type: str, tied: bool, warned: int, texts: Any, tokenizer: Any
) -> None:
    from flexctl.runtime import SilentReporter

    said: list[str] = []

    class Listener(SilentReporter):
        def warn(self, message: str) -> None:
            said.append(message)

    tiny.make_dense(tiny.dense_config(model_type, tie_word_embeddings=tied)).save_pretrained("stock")
    tokenizer.save_pretrained("stock")
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source="stock", output=Path("a"), dry_run=True), Listener())
    assert len(said) == warned
    assert all("tie_word_embeddings is true" in message for message in said)
