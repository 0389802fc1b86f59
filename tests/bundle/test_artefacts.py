"""Anchors, experts and router files: written and opened again, laid out as promised, refused when they do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import (
    World,
    forge_expert,
    make_anchor,
    make_checkpoint,
    make_expert,
    make_tensors,
    make_world,
    random_tensor,
    read_directory,
)

from flexctl.bundle import (
    RawTensor,
    RouterInfo,
    open_anchor,
    open_bundle,
    open_expert,
    open_router_file,
    pair_weights,
    write_router_file,
)
from flexctl.bundle.headers import PAGE_BYTES, header_bytes, read_header
from flexctl.bundle.layout import expert_head, expert_layout, feed_forward_keys, merged_expert_head
from flexctl.bundle.lowrank import expand_bytes
from flexctl.bundle.manifest import Architecture
from flexctl.bundle.tensors import from_float32, to_float32
from flexctl.errors import BundleError, UsageError
from flexctl.families import FAMILIES, family_of

FIXTURES = Path(__file__).parent.parent / "fixtures/schema-1"
GATE = "layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), ("code", "low"), dtype="BF16")


@pytest.fixture
def copy(world: World, tmp_path: Path) -> Path:
    """A copy of the anchor that may be broken."""
    return Path(shutil.copytree(world.anchor.path, tmp_path / "anchor"))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize(("rank", "several"), [(None, False), (3, False), (3, True)])
def test_an_expert_comes_back_as_it_was_written(tmp_path: Path, dtype: str, rank: int | None, several: bool) -> None:
    anchor = make_anchor(tmp_path / "anchor", dtype=dtype)
    tensors = make_tensors(anchor, 5, rank, several_ranks=several)
    expert = make_expert(tmp_path / "x.st", anchor, "law", tensors=tensors, rank=rank)
    again = open_expert(tmp_path / "x.st")
    assert again.manifest == expert.manifest
    assert again.digest == expert.digest
    assert {name: again.tensor(name).data.tobytes() for name in again.spans} == {
        name: tensor.data.tobytes() for name, tensor in tensors.items()
    }
    same = make_expert(tmp_path / "y.st", anchor, "law", tensors=dict(reversed(tensors.items())), rank=rank)
    assert same.path.read_bytes() == expert.path.read_bytes()
    assert json.loads((tmp_path / "x.run.json").read_text()) == {"tokens_per_s": 12.5}


def test_an_expert_of_schema_version_1_is_read_and_laid_out_for_good() -> None:
    expert = open_expert(FIXTURES / "expert.st")
    manifest = expert.manifest
    assert expert.manifest_text.encode() == (FIXTURES / "expert.json").read_bytes()
    head = expert_head(family_of("olmo2"), expert_layout(manifest.architecture), expert.manifest_text)
    assert read_header(expert.path).head == head
    assert list(expert.spans) == list(expert_layout(manifest.architecture))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.dense_type)
@pytest.mark.parametrize("rank", [None, 7])
@pytest.mark.parametrize("layers", [1, 11, 130])
def test_weights_lie_at_the_same_offset_whatever_the_index(family: Any, rank: int | None, layers: int) -> None:
    sizes = Architecture(hidden_size=8, intermediate_size=12, num_hidden_layers=layers, vocab_size=32, dtype="BF16")
    for length in (10, 3000, 4000):
        manifest = "m" * length
        starts = {len(merged_expert_head(family, sizes, index, manifest)) for index in (0, 1, 9, 10, 999, 9999)}
        if rank is None:
            starts.add(len(expert_head(family, expert_layout(sizes), manifest)))
        assert len(starts) == 1
        assert starts.pop() % PAGE_BYTES == 0
        assert len(expert_head(family, expert_layout(sizes, rank), manifest)) % PAGE_BYTES == 0


def test_the_offset_is_the_first_page_that_holds_the_reference_header() -> None:
    family = family_of("llama")
    sizes = Architecture(hidden_size=8, intermediate_size=12, num_hidden_layers=3, vocab_size=32, dtype="F32")
    reference = {}
    for name, tensor in expert_layout(sizes).items():
        _, layer, _, projection, *_ = f"{name}.....".split(".")
        projections = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        wide = f"model.layers.000{layer}.block_sparse_moe.experts.0000.{projections.get(projection)}.weight"
        reference[name if name == "router.weight" else wide] = tensor
    for length in range(2000, 4000, 37):
        manifest = '"' * length
        expected = len(header_bytes(reference, {"flexctl": manifest, "format": "pt"}))
        assert len(expert_head(family, expert_layout(sizes), manifest)) == expected


def test_keys_of_every_family() -> None:
    assert next(iter(feed_forward_keys(family_of("olmo2"), 1, 3).values())) == (
        "model.layers.0.mlp.experts.3.gate_proj.weight"
    )
    assert list(feed_forward_keys(family_of("mistral"), 2, 1).values())[3:] == [
        "model.layers.1.block_sparse_moe.experts.1.w1.weight",
        "model.layers.1.block_sparse_moe.experts.1.w3.weight",
        "model.layers.1.block_sparse_moe.experts.1.w2.weight",
    ]


@pytest.mark.parametrize("model_type", ["olmo2", "llama", "mistral", "qwen3"])
def test_an_anchor_comes_back_as_its_checkpoint(tmp_path: Path, model_type: str) -> None:
    anchor = make_anchor(tmp_path / "anchor", model_type=model_type, tied=model_type == "llama")
    checkpoint = read_directory(tmp_path / "anchor-checkpoint")
    assert {name: (anchor.path / name).read_bytes() for name in checkpoint} == checkpoint
    weights = anchor.weights()
    assert ("lm_head.weight" in weights.shared) == (model_type != "llama")
    assert list(weights.experts) == ["public"]
    stock = read_header(tmp_path / "anchor-checkpoint/model.safetensors").tensors
    for name, tensor in {**weights.shared, **{f"model.{n}": t for n, t in weights.experts["public"].items()}}.items():
        assert tensor.data.tobytes() == stock[name].load()
    assert len(weights.shared) + len(weights.experts["public"]) == len(stock)
    assert not any(row.data.any() for row in weights.router)
    assert anchor.config == json.loads(checkpoint["config.json"])
    assert list(anchor.public_sample()) == ["offsets", "tokens"]
    assert len(anchor.router_space()) == 6


def test_the_digest_is_of_content_not_of_shards(tmp_path: Path) -> None:
    one = make_anchor(tmp_path / "one")
    three = make_anchor(tmp_path / "three", shards=3)
    assert one.digest == three.digest
    assert make_anchor(tmp_path / "other", seed=1).digest != one.digest


def test_weight_files_that_the_index_does_not_name_stay_behind(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "a-checkpoint", shards=2)
    assert (checkpoint / "model.safetensors.index.json").exists()
    anchor = make_anchor(tmp_path / "b", shards=2)
    (tmp_path / "b-checkpoint/consolidated.safetensors").write_bytes(b"x")
    assert not (anchor.path / "consolidated.safetensors").exists()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: (path / "config.json").unlink(), r"config\.json: is missing"),
        (lambda path: (path / "model.safetensors").unlink(), r"model\.safetensors: is missing"),
        (lambda path: edit_config(path, hidden_size="8"), r"config\.json: hidden_size is '8'"),
        (lambda path: edit_config(path, model_type="gpt2"), r"config\.json: model_type is 'gpt2'"),
        (lambda path: edit_config(path, intermediate_size=13), r"gate_proj.weight: shape is \(12, 8\); expected"),
        (lambda path: edit_config(path, num_hidden_layers=3), r"tensor layers.2.mlp.gate_proj.weight is missing"),
        (lambda path: edit_config(path, num_hidden_layers=1), r"tensor 'layers.1.mlp.\w+.weight' is extra"),
        (lambda path: spoil(path, "model.norm.weight"), r"tensor model.norm.weight: holds NaN or infinity"),
    ],
)
def test_checkpoints_that_make_no_anchor(tmp_path: Path, break_it: Any, message: str) -> None:
    def break_and_resolve(config: Any) -> Any:
        break_it(tmp_path / "a-checkpoint")
        return {**config, "model_type": "flex_olmo"}

    with pytest.raises(BundleError, match=message) as caught:
        make_anchor(tmp_path / "a", resolve=break_and_resolve)
    assert "\n" not in caught.value.message
    assert [item.name for item in tmp_path.iterdir()] == ["a-checkpoint"]


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


def spoil(path: Path, name: str) -> None:
    """Write a NaN into a tensor."""
    span = read_header(path / "model.safetensors").tensors[name]
    with span.path.open("r+b") as file:
        file.seek(span.stop - 4)
        file.write(np.float32(np.nan).tobytes())


def test_an_anchor_must_not_be_of_several_dtypes_where_experts_are(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="dtype is I64; expected F32, BF16, F16"):
        make_anchor(tmp_path / "a", resolve=lambda config: replace_tensor(tmp_path, "model.norm.weight", "I64", config))
    with pytest.raises(BundleError, match=r"mlp.up_proj.weight: dtype is BF16; expected F32"):
        make_anchor(
            tmp_path / "b",
            resolve=lambda config: replace_tensor(tmp_path, "model.layers.1.mlp.up_proj.weight", "BF16", config, "b"),
        )


def replace_tensor(root: Path, name: str, dtype: str, config: Any, anchor: str = "a") -> Any:
    path = root / f"{anchor}-checkpoint/model.safetensors"
    tensors = {key: span.read() for key, span in read_header(path).tensors.items()}
    size = {"I64": 8, "BF16": 2}[dtype] * int(np.prod(tensors[name].shape))
    tensors[name] = RawTensor(dtype, tensors[name].shape, np.zeros(size, np.uint8))
    data = header_bytes(tensors, {}) + b"".join(tensor.data.tobytes() for tensor in tensors.values())
    path.write_bytes(data)
    return config


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{}", r"config\.json: its bytes are not those of the manifest"),
        ("flexctl.json", b"{}", r"flexctl\.json: schema_version is None"),
        ("flexctl.json", None, r"flexctl\.json: is missing"),
        ("model.safetensors", None, r"model\.safetensors: is missing"),
        ("model.safetensors", b"\0" * 8, r"model\.safetensors: header is"),
        ("router-space.safetensors", None, r"router-space\.safetensors: is missing"),
        ("model.safetensors.index.json", b'{"weight_map":{"a":"../../etc/x"}}', r"weight_map names the file"),
        ("model.safetensors.index.json", b'{"weight_map":[]}', r"weight_map is \[\]"),
        ("model.safetensors.index.json", b'{"weight_map":{"a":"model.safetensors"}}', r"is extra"),
    ],
)
def test_broken_anchors_are_refused_with_their_file(copy: Path, file: str, content: bytes | None, message: str) -> None:
    (copy / file).unlink(missing_ok=True)
    if content is not None:
        (copy / file).write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        open_anchor(copy)
    assert "\n" not in caught.value.message


def other_shape(expert: Any) -> dict[str, RawTensor]:
    tensors = {name: expert.tensor(name) for name in expert.spans}
    tensors[GATE] = random_tensor(np.random.PCG64(0), "BF16", (13, 8))
    return tensors


def other_dtype(expert: Any) -> dict[str, RawTensor]:
    tensors = {name: expert.tensor(name) for name in expert.spans}
    return tensors | {GATE: random_tensor(np.random.PCG64(0), "F32", (12, 8))}


def one_less(expert: Any) -> dict[str, RawTensor]:
    return {name: expert.tensor(name) for name in expert.spans if name != GATE}


def one_more(expert: Any) -> dict[str, RawTensor]:
    tensors = {name: expert.tensor(name) for name in expert.spans}
    return tensors | {"layers.2.mlp.gate_proj.weight": tensors[GATE]}


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        (one_less, {}, rf"tensor {GATE} is missing"),
        (one_more, {}, r"tensor 'layers.2.mlp.gate_proj.weight' is extra"),
        (other_shape, {}, rf"tensor {GATE}: shape is \(13, 8\); expected \(12, 8\)"),
        (other_dtype, {}, rf"tensor {GATE}: dtype is F32; expected BF16"),
        (None, {"rank": 2}, r"lora_A is missing"),
        (None, {"name": "public"}, r"name is 'public', which is reserved"),
        (None, {"name": "../evil"}, r"name is '../evil'"),
        (None, {"schema_version": 9}, r"schema_version is 9"),
        (None, {"kind": "merged"}, r"architecture|is missing|is no field"),
    ],
)
def test_experts_that_are_refused(world: World, tmp_path: Path, tensors: Any, changes: Any, message: str) -> None:
    expert = world.experts["code"]
    forged = forge_expert(tmp_path / "forged.st", expert, tensors and tensors(expert), **changes)
    with pytest.raises(BundleError, match=message) as caught:
        open_expert(forged)
    assert caught.value.message.startswith(str(forged))
    assert "\n" not in caught.value.message


UP_A = "layers.0.mlp.up_proj.weight.lora_A"


@pytest.mark.parametrize(
    ("rows", "rank", "message"),
    [
        (4, 3, rf"tensor {UP_A}: shape is \(4, 8\); expected \(3, 8\)"),
        (0, 3, rf"tensor {UP_A}: shape is \(0, 8\); expected \(3, 8\)"),
        (2, 3, r"up_proj.weight.lora_B: shape is \(12, 3\); expected \(12, 2\)"),
        (3, 4, r"rank is 4; expected 3, the highest of its matrices"),
    ],
)
def test_low_rank_experts_that_are_refused(world: World, tmp_path: Path, rows: int, rank: int, message: str) -> None:
    low = make_expert(tmp_path / "low.st", world.anchor, "low", rank=3)
    tensors = {name: low.tensor(name) for name in low.spans}
    tensors[UP_A] = random_tensor(np.random.PCG64(0), tensors[UP_A].dtype, (rows, 8))
    forged = forge_expert(tmp_path / "forged.st", low, tensors, rank=rank)
    with pytest.raises(BundleError, match=message):
        open_expert(forged)


def test_other_metadata_beside_the_manifest_is_refused(world: World, tmp_path: Path) -> None:
    header = read_header(world.experts["code"].path)
    path = tmp_path / "x.st"
    for metadata in ({**header.metadata, "format": "pt"}, {}, {"format": "pt"}):
        data = header_bytes(header.tensors, metadata) + b"".join(span.load() for span in header.tensors.values())
        path.write_bytes(data)
        with pytest.raises(BundleError, match="__metadata__ has the keys"):
            open_expert(path)


def test_readers_accept_any_valid_layout(world: World, tmp_path: Path) -> None:
    expert = world.experts["code"]
    backwards = {name: expert.tensor(name) for name in reversed(expert.spans)}
    other = open_expert(forge_expert(tmp_path / "x.st", expert, backwards))
    assert other.digest == expert.digest
    assert list(other.spans) == list(expert.spans)
    assert other.path.read_bytes() != expert.path.read_bytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_expert_that_is_not_finite_is_not_written(world: World, tmp_path: Path, bad: float) -> None:
    tensors = make_tensors(world.anchor, 1)
    values = np.full((2, 8), bad, np.float32)
    tensors["router.weight"] = RawTensor("F32", (2, 8), from_float32("F32", values))
    with pytest.raises(BundleError, match=r"tensor router.weight: holds NaN or infinity"):
        make_expert(tmp_path / "x.st", world.anchor, "law", tensors=tensors)
    assert list(tmp_path.iterdir()) == []


def test_there_is_nothing(tmp_path: Path) -> None:
    for opened in (open_anchor, open_expert, open_router_file, open_bundle):
        with pytest.raises(UsageError, match="no such"):
            opened(tmp_path / "none")


def test_kinds_are_not_mixed_up(world: World, tmp_path: Path) -> None:
    path = tmp_path / "rows.st"
    info = RouterInfo(kind="hidden", samples=1, encoder=None, trained=False, bias=(0.0, -1.0))
    rows = world.experts["code"].router()
    written = write_router_file(path, anchor=world.anchor, name="law", rows=rows, router=info, overwrite=False)
    assert written == open_router_file(path, world.anchor) == open_bundle(path)
    assert written.rows.data.tobytes() == rows.data.tobytes()
    assert written.info == info
    with pytest.raises(BundleError, match="kind is 'router'; expected 'expert'"):
        open_expert(path)
    with pytest.raises(BundleError, match="kind is 'expert'; expected 'router'"):
        open_router_file(world.experts["code"].path)
    with pytest.raises(BundleError, match=r"shape is \(8, 2\); expected \(2, 8\)"):
        write_router_file(
            tmp_path / "y.st",
            anchor=world.anchor,
            name="law",
            rows=RawTensor("F32", (8, 2), rows.data),
            router=info,
            overwrite=False,
        )
    other = make_anchor(tmp_path / "other", seed=3)
    with pytest.raises(BundleError, match=r"rows.st: anchor.digest is"):
        open_router_file(path, other)
    with pytest.raises(BundleError, match=r"code.st: anchor.digest is .* expected"):
        pair_weights(other, world.experts["code"])


def slow_expand(base: RawTensor, a: RawTensor, b: RawTensor) -> bytes:
    """Law 3 to the letter, one number at a time."""
    w, left, right = (to_float32(t.dtype, t.data).reshape(t.shape) for t in (base, b, a))
    result = w.copy()
    for i in range(w.shape[0]):
        for j in range(w.shape[1]):
            total = w[i, j]
            for r in range(right.shape[0]):
                total = np.float32(total + np.float32(left[i, r] * right[r, j]))
            result[i, j] = total
    return from_float32(base.dtype, result).tobytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("several", [False, True])
def test_a_low_rank_expert_is_expanded_as_law_3_says(
    tmp_path: Path, dtype: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexctl.bundle.lowrank.BLOCK_BYTES", 4 * 8 * 5)
    anchor = make_anchor(tmp_path / "anchor", dtype=dtype)
    tensors = make_tensors(anchor, 5, 3, several_ranks=several)
    expert = make_expert(tmp_path / "low.st", anchor, "low", tensors=tensors, rank=3)
    public = anchor.feed_forward()
    pair = pair_weights(anchor, expert)
    for name, tensor in pair.experts["low"].items():
        a, b = expert.spans[f"{name}.lora_A"], expert.spans[f"{name}.lora_B"]
        expected = slow_expand(public[name].read(), a.read(), b.read())
        assert b"".join(block.tobytes() for block in expand_bytes(public[name], a, b)) == expected
        assert tensor.data.tobytes() == expected


def test_a_pair_has_a_zero_row_and_the_expert_s(world: World) -> None:
    pair = pair_weights(world.anchor, world.experts["code"])
    rows = world.experts["code"].router().data.view(np.float32).reshape(2, 8)
    assert list(pair.experts) == ["public", "code"]
    assert pair.num_experts_per_tok == 2
    for layer, router in enumerate(pair.router):
        assert router.shape == (2, 8)
        assert np.array_equal(router.data.view(np.float32).reshape(2, 8), [np.zeros(8), rows[layer]])
