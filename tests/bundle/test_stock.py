"""Stock checkpoints: the weights that Transformers loads, the files that are data, nothing that points to code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import fine_tune, make_anchor, make_checkpoint, simple_moe_config

from flexctl.bundle import open_anchor, open_merged, write_anchor
from flexctl.bundle.anchor import write_tensors
from flexctl.bundle.codec import canonical_json, encode
from flexctl.bundle.manifest import MANIFEST_FILE, digest_of
from flexctl.bundle.stock import (
    checkpoint_spans,
    head_differs,
    is_data_file,
    is_stock_file,
    left_out,
    named_code,
    read_dense_config,
    unread_weights,
)
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError

GATE = "model.layers.0.mlp.gate_proj.weight"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def anchor_of(checkpoint: Path, path: Path) -> Path:
    """An anchor of a checkpoint, with the router space and public sample of another one."""
    other = make_anchor(path.with_name("other"))
    write_anchor(
        path,
        checkpoint=checkpoint,
        name="mine",
        moe_config=simple_moe_config(read_dense_config(checkpoint)),
        router_space=other.router_space(),
        public_sample=other.public_sample(),
        overwrite=False,
    )
    return path


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """Shards with an index, and one file with other weights."""
    folder = make_checkpoint(tmp_path / "both", shards=2)
    shutil.copy(fine_tune(folder, tmp_path / "tuned") / "model.safetensors", folder)
    return folder


def test_one_file_goes_before_shards_and_their_index(both: Path, tmp_path: Path) -> None:
    spans = checkpoint_spans(both)
    assert {span.path for span in spans.values()} == {both / "model.safetensors"}
    assert unread_weights(both) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    anchor = open_anchor(anchor_of(both, tmp_path / "anchor"))
    assert bytes(anchor.tensor(GATE).data) == spans[GATE].load()
    assert sorted(path.name for path in anchor.path.glob("model*")) == [
        "model.safetensors",
        "model.safetensors.index.json",
    ]


def test_a_stale_index_is_of_no_account(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "stale", shards=2)
    shutil.copy(fine_tune(folder, tmp_path / "tuned") / "model.safetensors", folder)
    for shard in folder.glob("model-*"):
        shard.unlink()
    anchor = anchor_of(folder, tmp_path / "anchor")
    weight_map = json.loads((anchor / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == {"model.safetensors"}
    assert verify(VerifyConfig(path=anchor)).ok


@pytest.mark.parametrize("file", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_that_config_json_names_goes_before_all(both: Path, tmp_path: Path, file: str) -> None:
    index = both / "model.safetensors.index.json"
    if file.endswith("json"):
        index.rename(both / file)
    else:
        write_tensors(both / file, {name: span.read() for name, span in checkpoint_spans(both).items()})
    edit(both / "config.json", transformers_weights=file)
    spans = checkpoint_spans(both)
    assert {span.path.name for span in spans.values()} == (
        {file} if file.endswith("tensors") else {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    )
    anchor = open_anchor(anchor_of(both, tmp_path / "anchor"))
    assert "transformers_weights" not in json.loads((anchor.path / "config.json").read_text())
    assert bytes(anchor.tensor(GATE).data) == spans[GATE].load()


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../x.safetensors", 3, ".hidden.safetensors"])
def test_config_json_names_nothing_but_safetensors_beside_it(tmp_path: Path, named: Any) -> None:
    folder = make_checkpoint(tmp_path / "base")
    edit(folder / "config.json", transformers_weights=named)
    with pytest.raises(BundleError, match=r"config\.json: transformers_weights"):
        checkpoint_spans(folder)


def test_an_index_names_nothing_but_safetensors(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base", shards=2)
    (folder / "model-00001-of-00002.safetensors").rename(folder / "weights.pkl")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002.safetensors", "weights.pkl"))
    with pytest.raises(BundleError, match=r"weight_map names the file 'weights\.pkl'; expected safetensors alone"):
        checkpoint_spans(folder)


@pytest.mark.parametrize(
    ("prefix", "hint"),
    [
        ("module.", "model.module.save_pretrained"),
        ("_orig_mod.", "model._orig_mod.save_pretrained"),
        ("base_model.model.", "merge_and_unload"),
        ("thing.", "without the wrapper"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_wrappers_prefix_is_named(tmp_path: Path, prefix: str, hint: str, tied: bool) -> None:
    base = make_checkpoint(tmp_path / "base", tied=tied)
    wrapped = fine_tune(base, tmp_path / "wrapped", (), lambda ts: {prefix + name: t for name, t in ts.items()})
    with pytest.raises(BundleError, match=f"names begin with '{prefix}'") as caught:
        checkpoint_spans(wrapped)
    assert hint in str(caught.value.hint)


def test_a_head_that_is_not_the_embedding_is_seen(tmp_path: Path) -> None:
    def head(change: str) -> Callable[[Any], Any]:
        return lambda tensors: {**tensors, "lm_head.weight": tensors[change]}

    base = make_checkpoint(tmp_path / "base", tied=True)
    embedding = "model.embed_tokens.weight"
    same = fine_tune(base, tmp_path / "same", (), head(embedding))
    other = fine_tune(base, tmp_path / "other", (), lambda ts: {**ts, "lm_head.weight": ts[GATE]})
    assert [head_differs(checkpoint_spans(path)) for path in (base, same, other)] == [False, False, True]


@pytest.mark.parametrize(
    "name",
    ["tokenizer_x.py", "vocab.pkl", "tokenizer.so", "tokenizer", "merges.sh", "chat_template.py", "tokenizer (1).json"],
)
def test_code_and_pickles_are_no_stock_files(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "base")
    (folder / name).write_text("pass\n")
    (folder / "additional_chat_templates").mkdir()
    assert not is_stock_file(name)
    assert left_out(folder) == sorted([name, "additional_chat_templates/"])
    anchor = anchor_of(folder, tmp_path / "anchor")
    assert not (anchor / name).exists()
    assert name not in open_anchor(anchor).manifest.files


def test_what_a_checkpoint_has_for_its_tokenizer_is_stock() -> None:
    for name in (
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("chat_template.json", "chat_template.jinja", "tokenizer.4.0.0.json"),
    ):
        assert is_stock_file(name)
        assert is_data_file(name)


@pytest.mark.parametrize("kind", ["anchor", "merged"])
def test_a_bundle_that_lists_code_is_refused(tmp_path: Path, kind: str) -> None:
    """Its digest is right, as whoever made it meant it: the name alone tells."""
    bundle = make_anchor(tmp_path / "anchor")
    if kind == "merged":
        merge(MergeConfig(experts=(), anchor=bundle.path, output=tmp_path / "merged"))
    manifest: Any = bundle.manifest if kind == "anchor" else open_merged(tmp_path / "merged").manifest
    files = {**manifest.files, "tokenizer_x.py": "0" * 64}
    said = {**encode(manifest), "files": files, "digest": digest_of(manifest.tensors, files)}
    (tmp_path / kind / MANIFEST_FILE).write_bytes(canonical_json(said))
    (tmp_path / kind / "tokenizer_x.py").write_text("pass\n")
    result = verify(VerifyConfig(path=tmp_path / kind))
    assert not result.ok
    assert "files lists 'tokenizer_x.py'; expected data files alone" in result.checks[0].detail


def test_fields_that_point_to_code_go(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "base")
    plain = anchor_of(folder, tmp_path / "plain")
    edit(folder / "config.json", auto_map={"AutoConfig": "x.X"}, custom_pipelines={"p": {"impl": "x.P"}})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]})
    assert named_code(folder) == {
        "config.json: auto_map": {"AutoConfig": "x.X"},
        "config.json: custom_pipelines": {"p": {"impl": "x.P"}},
        "tokenizer_config.json: auto_map": {"AutoTokenizer": ["x.X", None]},
    }
    assert "auto_map" not in read_dense_config(folder)
    shutil.rmtree(tmp_path / "other-checkpoint")
    shutil.rmtree(tmp_path / "other")
    anchor = anchor_of(folder, tmp_path / "anchor")
    for file in ("config.json", "tokenizer_config.json"):
        assert json.loads((anchor / file).read_text()) == json.loads((plain / file).read_text())
    merge(MergeConfig(experts=(), anchor=anchor, output=tmp_path / "merged"))
    assert not [path for path in (tmp_path / "merged").glob("*.json") if "auto_map" in path.read_text()]


@pytest.mark.parametrize(
    ("field", "value", "fine"),
    [
        ("pad_token_id", 999, False),
        ("bos_token_id", 32, False),
        ("eos_token_id", [2, 32], False),
        ("pad_token_id", 32, False),
        ("pad_token_id", -33, False),
        ("pad_token_id", -1, True),
        ("pad_token_id", 0, True),
        ("pad_token_id", 31, True),
        ("pad_token_id", None, True),
        ("eos_token_id", [2, 31], True),
    ],
)
def test_special_ids_are_below_vocab_size(tmp_path: Path, field: str, value: Any, fine: bool) -> None:
    folder = make_checkpoint(tmp_path / "base", vocab=32)
    edit(folder / "config.json", **{field: value})
    if fine:
        assert read_dense_config(folder)[field] == value
    else:
        with pytest.raises(BundleError, match=rf"config\.json: {field} is -?\d+; expected below vocab_size, 32"):
            read_dense_config(folder)
