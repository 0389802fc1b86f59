"""Checkpoints as people have them, from every family, through init-anchor and merge: what goes in comes out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from builders import make_expert
from safetensors.torch import load_file, save_file

from flexctl.bundle import open_anchor, open_merged
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.errors import BundleError
from flexctl.families import FAMILIES, family_of
from flexctl.model.building import build_model
from flexctl.model.routed import exclude

TOLERANCE = 1e-4
TYPES = [family.dense_type for family in FAMILIES]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}\u2713"

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

# Each is one kind of checkpoint: what its config has, and how it is written.
KINDS: dict[str, dict[str, Any]] = {
    "float32, sharded, tied, old linear": {
        "tie_word_embeddings": True,
        "rope_theta": 300.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "bfloat16, sharded, new llama3": {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 300.0, **LLAMA3},
    },
    "float16, tied, new yarn": {
        "dtype": "float16",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 300.0, **YARN},
    },
    "float32, old yarn, as few keys as can be": {
        "rope_scaling": {"rope_type": "yarn", **YARN},
        "num_attention_heads": 8,
        "head_dim": None,
    },
}
LEFT_OUT = (
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "max_position_embeddings",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "transformers_version",
)

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


def config_of(model_type: str, kind: str) -> dict[str, Any]:
    config = tiny.dense_config(model_type, **KINDS[kind])
    if "few keys" in kind:
        # What Qwen3 has 32 of unless told, and the others as many as there are heads or 8.
        kept = ("num_key_value_heads",) if model_type == "qwen3" else ()
        config = {name: value for name, value in config.items() if name not in LEFT_OUT or name in kept}
    return config


def make_stock(folder: Path, config: dict[str, Any], tokenizer: Any, *, sharded: bool) -> Path:
    """Write a checkpoint with a chat template, added tokens, generation settings, and the config as it was given."""
    model = tiny.make_dense(config).to(getattr(torch, config.get("dtype", "float32")))
    model.save_pretrained(folder, max_shard_size=20_000 if sharded else "5GB")
    files = tokenizer.save_pretrained(folder)
    assert files
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    last = tokenizer.convert_ids_to_tokens(tiny.VOCAB_SIZE - 1)
    settings |= {"added_note": "kept", "extra_special_tokens": {"image_token": last}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=4))
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps({last: tiny.VOCAB_SIZE - 1}))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}\n')
    (folder / "generation_config.json").write_text('{"do_sample": true,  "temperature": 0.6, "eos_token_id": [0, 5]}')
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make(stock: Path, texts: Any) -> Path:
    path = Path("anchor").absolute()
    data = (texts.public_test,)
    init_anchor(InitAnchorConfig(data=data, source=str(stock), output=path, sample_tokens=600, threads=1))
    return path


def stock_files(folder: Path) -> dict[str, bytes]:
    patterns = (
        "generation_config.json",
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template*",
    )
    return {item.name: item.read_bytes() for pattern in patterns for item in folder.glob(pattern)}


@torch.no_grad()
def stock_logits(path: Path) -> tuple[Any, torch.Tensor]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, use_safetensors=True
    )
    assert not any(info.values()), info
    return model.eval(), model(tiny.some_tokens(2, 40)).logits


@torch.no_grad()
def our_logits(path: Path, without: tuple[int, ...] = ()) -> torch.Tensor:
    model = build_model(open_merged(path).weights(), device=torch.device("cpu"), dtype=torch.float32)
    exclude(model, without)
    return model(tiny.some_tokens(2, 40)).logits


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_becomes_a_merged_model(model_type: str, kind: str, texts: Any, tokenizer: Any) -> None:
    config = config_of(model_type, kind)
    stock = make_stock(Path("stock"), config, tokenizer, sharded="sharded" in kind)
    anchor = open_anchor(make(stock, texts))
    assert (
        anchor.manifest.architecture.dtype
        == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[config.get("dtype", "float32")]
    )
    merge(MergeConfig(anchor=anchor.path, output=Path("alone")))
    experts = [make_expert(Path(f"{name}.st"), anchor, name).path for name in ("code", "law")]
    merge(MergeConfig(experts=tuple(experts), anchor=anchor.path, output=Path("merged"), top_k=2))
    remove(RemoveConfig(names=("law",), source=Path("merged"), output=Path("removed")))
    assert (anchor.path / "config.json").read_bytes() == (stock / "config.json").read_bytes()
    assert len(stock_files(stock)) >= 6
    for folder in (anchor.path, Path("alone"), Path("merged"), Path("removed")):
        assert stock_files(folder) == stock_files(stock), folder
    dense, expected = stock_logits(stock)
    assert_same(stock_logits(anchor.path)[1], expected)
    mixture, alone = stock_logits(Path("alone"))
    assert type(mixture).__name__ == family_of(model_type).moe_architecture
    assert mixture.config.tie_word_embeddings == dense.config.tie_word_embeddings
    assert_same(alone, expected)
    assert_same(our_logits(Path("alone")), expected)
    merged = stock_logits(Path("merged"))[1]
    assert_same(our_logits(Path("merged")), merged)
    assert float((merged - expected).abs().max()) > 0.05
    assert_same(our_logits(Path("merged"), without=(2,)), stock_logits(Path("removed"))[1])


@pytest.mark.parametrize("model_type", TYPES)
@torch.no_grad()
def test_scaled_positions_matter(model_type: str) -> None:
    """Else the test above could not fail: at these lengths, each scaling and each base changes the logits."""
    tokens = tiny.some_tokens(1, 40)
    plain = tiny.make_dense(tiny.dense_config(model_type, rope_theta=300.0))(tokens).logits
    for scaling in (
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "yarn", **YARN},
    ):
        config = tiny.dense_config(model_type, rope_theta=300.0, rope_scaling=scaling)
        assert float((tiny.make_dense(config)(tokens).logits - plain).abs().max()) > 0.001, scaling
    other = tiny.make_dense(tiny.dense_config(model_type))(tokens).logits
    assert float((other - plain).abs().max()) > 0.001


def edited(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without_vocab_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "vocab_size"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
        (edited(lambda t: t.pop("lm_head.weight")), "tensor lm_head.weight is missing"),
        (
            edited(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})),
            "tensor 'model.layers.0.self_attn.q_proj.bias' is extra",
        ),
        (
            edited(lambda t: t.update({"model.norm.weight": torch.ones(16)})),
            "tensor model.norm.weight: shape is (16,); expected (32,)",
        ),
        (without_vocab_size, "config.json: vocab_size is None"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors: is missing"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_with_other_tensors_is_refused_before_any_work(
    change: Callable[[Path], None], said: str, dry_run: bool, texts: Any, tokenizer: Any
) -> None:
    stock = make_stock(Path("stock"), tiny.dense_config("mistral"), tokenizer, sharded=False)
    change(stock)
    with pytest.raises(BundleError) as caught:
        init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(stock), output=Path("a"), dry_run=dry_run))
    assert said in caught.value.message
    assert str(stock) in caught.value.message
    assert "\n" not in caught.value.message
    assert [item.name for item in Path().iterdir()] == ["stock"]


def test_what_the_class_leaves_out_on_purpose_may_be_there(texts: Any, tokenizer: Any) -> None:
    """Old checkpoints hold rotary buffers, and tied ones their head as well."""
    stock = make_stock(Path("stock"), tiny.dense_config("llama", tie_word_embeddings=True), tokenizer, sharded=False)
    head = {"lm_head.weight": load_file(stock / "model.safetensors")["model.embed_tokens.weight"].clone()}
    edited(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), **head}))(stock)
    merge(MergeConfig(anchor=make(stock, texts), output=Path("alone")))
    assert_same(stock_logits(Path("alone"))[1], stock_logits(stock)[1])


REFUSED = {
    "gpt2": {"model_type": "gpt2"},
    "gemma2": {"model_type": "gemma2"},
    "phi3": {"model_type": "phi3"},
    "mixtral": {"model_type": "mixtral"},
    "olmo3": {"model_type": "olmo3"},
    "qwen2": {"model_type": "qwen2"},
    "quantization_config": tiny.dense_config("llama", quantization_config={"quant_method": "gptq", "bits": 4}),
    "attention_bias": tiny.dense_config("llama", attention_bias=True),
    "mlp_bias": tiny.dense_config("llama", mlp_bias=True),
    "layer_types": tiny.dense_config("qwen3", layer_types=["sliding_attention", "full_attention"]),
    "use_sliding_window": tiny.dense_config("qwen3", use_sliding_window=True, sliding_window=8),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_no_mixture_class_takes_is_refused_by_name_before_weights_are_looked_at(named: str, texts: Any) -> None:
    folder = Path("stock")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(REFUSED[named]))
    with pytest.raises(BundleError, match=named) as caught:
        init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(folder), output=Path("a")))
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message
    shutil.rmtree(folder)
    assert list(Path().iterdir()) == []
