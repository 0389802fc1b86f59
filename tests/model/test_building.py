"""Models from weights: right dtypes, nothing trainable, nothing moved, and every device or dtype named right."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch

from flexctl.errors import BundleError, UsageError
from flexctl.model.building import (
    add_expert,
    autocast_dtype,
    build_model,
    load_dense,
    load_tokenizer,
    moved_tensors,
    pick_device,
    pick_dtype,
    route,
)
from flexctl.model.routed import routed_layers

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def test_devices_by_name() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match="device: 'toaster'"):
        pick_device("toaster")
    for known in ("mps", "meta", "xpu:0"):
        with pytest.raises(UsageError, match=f"device: '{known}' is not supported"):
            pick_device(known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="torch sees none"):
        pick_device("cuda")


def test_dtypes_by_name() -> None:
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    assert autocast_dtype("auto", CPU) is None
    assert autocast_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(UsageError, match="dtype: 'int4'"):
        pick_dtype("int4", CPU)


def test_built_model_is_frozen_and_in_evaluation_mode() -> None:
    model = tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a")))
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_built_model_has_the_given_dtype_but_for_the_router() -> None:
    weights = tiny.make_weights(tiny.dense_config(), ("public", "a"))
    model = build_model(weights, device=CPU, dtype=torch.bfloat16)
    routers = {id(tensor) for block in routed_layers(model) for tensor in (block.router.public, block.router.closed)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor.dtype == (torch.float32 if id(tensor) in routers else torch.bfloat16), name
    assert len(routers) == 4
    assert model(tiny.some_tokens()).logits.isfinite().all()


def test_router_rows_of_each_layer_reach_that_layer() -> None:
    rows = [torch.randn(3, 32), torch.randn(3, 32)]
    weights = tiny.make_weights(tiny.dense_config(), ("public", "a", "b"), rows=rows, top_k=2)
    blocks = routed_layers(tiny.build(weights))
    assert [block.layer for block in blocks] == [0, 1]
    for block, expected in zip(blocks, rows, strict=True):
        assert torch.equal(block.router.rows, expected)
        assert block.top_k == 2


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_moves_in_building(tied: bool) -> None:
    weights = tiny.make_weights(tiny.dense_config(tie_word_embeddings=tied))
    assert moved_tensors(tiny.build(weights), weights) == []


def test_every_moved_tensor_is_named() -> None:
    weights = tiny.make_weights(tiny.dense_config())
    model = tiny.build(weights)
    add_expert(model, torch.randn(2, 32))
    assert moved_tensors(model, weights) == []
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1e-6
        model.model.layers[1].mlp.experts[0].down_proj.weight[0, 0] *= 1.0001
        model.model.layers[0].mlp.router.public[0, 3] = 1e-30
        model.model.layers[0].mlp.experts[1].down_proj.weight.zero_()
    assert moved_tensors(model, weights) == [
        "model.embed_tokens.weight",
        "layers.1.mlp.down_proj.weight",
        "router row of layer 0",
    ]


def test_added_expert_is_a_trainable_float32_copy_of_public() -> None:
    weights = tiny.make_weights(tiny.dense_config())
    model = build_model(weights, device=CPU, dtype=torch.bfloat16)
    rows = torch.randn(2, 32)
    added = add_expert(model, rows)
    for block, expert, row in zip(routed_layers(model), added, rows, strict=True):
        assert block.experts[1] is expert
        assert torch.equal(block.router.rows, torch.stack([torch.zeros(32), row]))
        assert block.top_k == 2
        for mine, public in zip(expert.parameters(), block.experts[0].parameters(), strict=True):
            assert mine.dtype == torch.float32
            assert mine.requires_grad
            assert not public.requires_grad
            assert torch.equal(mine, public.float())
            assert mine.data_ptr() != public.data_ptr()


def test_checkpoint_is_loaded_in_float32_and_remembers_its_dtype(tmp_path: Path) -> None:
    model = tiny.make_dense(tiny.dense_config()).bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load_dense(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert loaded.config.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name


def test_routed_dense_model_computes_what_it_did() -> None:
    model, tokens = tiny.make_dense(tiny.dense_config()), tiny.some_tokens()
    with torch.no_grad():
        before = model(tokens).logits
        after = route(model)(tokens).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_building_says_nothing(capfd: pytest.CaptureFixture[str], checkpoint: Path) -> None:
    """The Python API is silent; only a reporter speaks."""
    capfd.readouterr()
    tiny.build(tiny.make_weights(tiny.dense_config(), ("public", "a")))
    load_dense(checkpoint)
    load_tokenizer(checkpoint)
    assert capfd.readouterr() == ("", "")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1\n".format("a" * 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer.json": None, "tokenizer_config.json": None}, ": has no tokenizer"),
        ({"tokenizer.json": POINTER}, "tokenizer.json: is a pointer of git-lfs"),
        ({"tokenizer_config.json": POINTER}, "tokenizer_config.json: is a pointer of git-lfs"),
        ({"tokenizer.json": "{}"}, "its tokenizer cannot be read"),
        ({"tokenizer.json": "nothing"}, "its tokenizer cannot be read"),
        (
            {
                "tokenizer_config.json": '{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["x.X", null]}}',
                "config.json": '{"model_type": "llama"}',
            },
            "names a tokenizer class that needs code of its own",
        ),
    ],
)
def test_a_tokenizer_that_does_not_load_is_a_line(
    tmp_path: Path, checkpoint: Path, changes: dict[str, str | None], says: str
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "odd")
    for name, content in changes.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    with pytest.raises(BundleError) as caught:
        load_tokenizer(folder)
    assert says in caught.value.message
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message
