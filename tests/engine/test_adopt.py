"""adopt: a mixture that somebody else merged, taken apart, merged again and rid of an expert; what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from builders import make_expert, read_directory
from conftest import Texts

from flexctl.bundle import open_anchor, open_expert
from flexctl.bundle.anchor import write_tensors
from flexctl.bundle.card import anchor_card
from flexctl.bundle.stock import checkpoint_spans, indexed_spans
from flexctl.bundle.tensors import RawTensor, to_float32
from flexctl.cli.app import main
from flexctl.engine.adopt import AdoptConfig, AdoptResult, adopt
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.families import family_of
from flexctl.runtime import SilentReporter

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

NAMES = ("law", "code", "math")
GATE = "model.layers.0.mlp.gate.weight"


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def take(mixture: str = "moe", output: str = "w", **settings: Any) -> AdoptResult:
    settings = {"names": (",".join(NAMES),), "threads": 1} | settings
    return adopt(AdoptConfig(mixture=mixture, output=Path(output), **settings))


def merged(taken: AdoptResult, output: str = "merged", without: str | None = None) -> Path:
    files = tuple(expert.path for expert in taken.experts if expert.name != without)
    merge(MergeConfig(experts=files, anchor=taken.path, output=Path(output), top_k=taken.num_experts_per_tok))
    return Path(output)


def logits(path: Path | str, dtype: str = "float32") -> Any:
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model.eval()(tiny.some_tokens()).logits.float()


@contextmanager
def refused(message: str, error: type[FlexctlError] = BundleError) -> Any:
    before = read_directory(Path())
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert "\n" not in caught.value.message
    assert read_directory(Path()) == before


# What it makes.


@pytest.mark.parametrize("packed", [False, True], ids=["per-expert", "packed"])
@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_merged_again_it_is_the_same_model_and_removing_is_exact(kind: str, packed: bool) -> None:
    """In float32, with another public expert than the first; and without one, what a stock model without it says."""
    import torch
    import transformers

    stock = tiny.make_mixture(Path("moe"), kind, packed=packed)
    taken = take(public_expert=1)
    assert (taken.model_type, taken.mixture_type) == (tiny.MIXTURES[kind][0], kind.split("-")[0])
    assert [(expert.name, expert.index) for expert in taken.experts] == [("law", 0), ("code", 2), ("math", 3)]
    again = merged(taken)
    assert (logits(again) - logits("moe")).abs().max() < 1e-5
    assert verify(VerifyConfig(path=again, anchor=taken.path)).ok

    remove(RemoveConfig(names=("code",), source=again, output=Path("less")))
    assert read_directory(Path("less")) == read_directory(merged(taken, "never", without="code"))
    kept = [0, 1, 3]
    state = {name: value[kept] if ".experts." in name or name.endswith("gate.weight") else value
             for name, value in stock.state_dict().items()}  # fmt: skip
    counts = {"num_experts": 3, "num_local_experts": 3}
    without = transformers.AutoModelForCausalLM.from_config(type(stock.config)(**stock.config.to_dict() | counts))
    without.load_state_dict(state)
    with torch.no_grad():
        assert (logits("less") - without.eval()(tiny.some_tokens()).logits).abs().max() < 1e-5


def test_an_expert_is_replaced_where_no_public_text_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_mixture(Path("moe"), "mixtral")
    taken = take()
    merged(taken, "w/merged")
    newer = make_expert(Path("w/law-2.st"), open_anchor(taken.path), name="law", seed=7)
    monkeypatch.chdir("w")
    config = ReplaceConfig(name="law", expert=Path("law-2.st"), accept=("law",))
    assert replace(config).new_digest == newer.digest


@pytest.mark.parametrize("kind", ["flex_olmo", "mixtral", "qwen3_moe"])
def test_rows_of_bfloat16_are_shifted_exactly(kind: str) -> None:
    """They are kept in float32. A model that runs in bfloat16 rounds them once, by no more than it rounds the rest."""
    tiny.make_mixture(Path("moe"), kind, dtype="bfloat16")
    taken = take()
    spans = checkpoint_spans(Path("moe"))
    for layer in range(2):
        router = spans[family_of(taken.model_type).router_name(layer)]
        rows = to_float32(router.dtype, router.load()).astype(np.float64).reshape(router.shape)
        for expert in taken.experts:
            found = to_float32("F32", open_expert(expert.path).router().data).reshape(2, -1)[layer]
            assert np.array_equal(found.astype(np.float64), rows[expert.index] - rows[0])
    again = merged(taken)
    exact = logits("moe")
    assert (logits(again) - exact).abs().max() < 1e-5
    ours, theirs = ((logits(path, "bfloat16") - exact).abs().mean() for path in (again, "moe"))
    assert ours < 1.5 * theirs


def test_weights_are_the_checkpoint_s_bytes_and_digests_know_no_layout() -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    tiny.make_mixture(Path("packed"), "flex_olmo", packed=True)
    taken, spans = take(), checkpoint_spans(Path("moe"))
    expert, anchor = open_expert(taken.experts[1].path), open_anchor(taken.path)
    for name in anchor.feed_forward():
        layer, projection = int(name.split(".")[1]), name.split(".")[3]
        keys = [f"model.layers.{layer}.mlp.experts.{index}.{projection}.weight" for index in (0, 2)]
        assert anchor.feed_forward()[name].load() == spans[keys[0]].load()
        assert expert.spans[name].load() == spans[keys[1]].load()
    assert all(span.load() == spans[name].load() for name, span in anchor.shared().items())
    # Sharded and in the other layout, it is the same.
    names = list(spans)
    for shard in range(3):
        mine = {name: spans[name].read() for name in names[shard::3]}
        Path("sharded").mkdir(exist_ok=True)
        write_tensors(Path("sharded") / f"model-{shard}.safetensors", mine)
    weight_map = {name: f"model-{shard}.safetensors" for shard in range(3) for name in names[shard::3]}
    Path("sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert len(indexed_spans(Path("sharded/model.safetensors.index.json"))) == len(names)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(Path("moe") / file, "sharded")
    for other in ("packed", "sharded"):
        same = take(other, f"w-{other}", name="moe")
        assert (same.digest, same.mixture_digest) == (taken.digest, taken.mixture_digest)
        assert [item.digest for item in same.experts] == [item.digest for item in taken.experts]
        assert read_directory(same.path) == read_directory(taken.path)


def test_what_nobody_can_say_is_left_open_and_marked() -> None:
    tiny.make_mixture(Path("moe"), "mixtral", num_experts_per_tok=3)
    taken = take(license="Apache-2.0")
    manifest = open_expert(taken.experts[0].path).manifest
    data = manifest.data
    assert (data.documents, data.tokens, data.bytes, data.label, data.expires, data.contact) == (None,) * 6
    assert (data.license, data.purposes) == ("Apache-2.0", ())
    assert open_anchor(taken.path).manifest.license == "Apache-2.0"
    assert manifest.training == {
        "adopted": {
            "digest": taken.mixture_digest,
            "model_type": "mixtral",
            "expert": 1,
            "public_expert": 0,
            "num_experts": 4,
            "num_experts_per_tok": 3,
        }
    }
    assert (manifest.router.kind, manifest.router.samples, manifest.router.bias) == ("adopted", 0, (0.0, 0.0))
    take(output="other")
    assert open_expert(Path("other/experts/law.st")).manifest.data.license is None


def test_the_workspace_merges_it_as_it_was(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.make_mixture(Path("moe"), "mixtral", num_experts_per_tok=3)
    assert main(["adopt", "moe", "--names", "law,code", "--names", "math", "-o", "w"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == "Merge again: flexctl merge w/experts/*.st --anchor w/anchor --top-k 3"
    assert "the anchor is a llama, as sliding_window of this mixtral is None" in err
    monkeypatch.chdir("w")
    assert main(["merge", *map(str, sorted(Path("experts").glob("*.st"))), "-q"]) == 0
    assert json.loads(Path("merged/config.json").read_text())["num_experts_per_tok"] == 3
    assert (logits("merged") - logits("../moe")).abs().max() < 1e-5
    listener = Listener()
    adopt(AdoptConfig(mixture="../moe", names=NAMES, overwrite=True, threads=1), listener)
    assert listener.said[-1] == "merge with `top_k` 3, as the checkpoint has it"


# What its anchor can do.


def test_without_public_text_nothing_can_be_trained_against_it(texts: Texts) -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    taken = take()
    assert taken.sample_tokens == 0
    for dry_run in (True, False):
        with refused("w/anchor: has neither router space nor public sample, as it was adopted without public text"):
            train_expert(TrainExpertConfig(data=(texts.code,), anchor=taken.path, dry_run=dry_run))
    result = merge(MergeConfig(experts=(taken.experts[0].path,), anchor=taken.path, output=Path("m")))
    assert result.expected_routing is None
    with pytest.raises(BundleError, match="adopted without public text"):
        open_anchor(taken.path).public_sample()
    with pytest.raises(BundleError, match="adopted without public text"):
        open_anchor(taken.path).router_space()
    assert "nothing can be trained against it" in anchor_card(open_anchor(taken.path).manifest, "a/b", None)


def test_with_public_text_it_is_an_anchor_like_any_other(texts: Texts, tokenizer: Any) -> None:
    tiny.make_mixture(Path("moe"), "qwen3_moe")
    tokenizer.save_pretrained("moe")
    taken = take(data=(texts.public_test,))
    assert taken.sample_tokens > 1000
    rows = embed_router(EmbedRouterConfig(data=(texts.code,), anchor=taken.path, output=Path("r.st"), threads=1))
    assert rows.digest
    # It is what init-anchor makes of that expert as a dense checkpoint.
    shutil.copytree(taken.path, "dense", ignore=shutil.ignore_patterns("flexctl.json", "router-space*", "public-*"))
    init_anchor(InitAnchorConfig(source="dense", name="moe", data=(texts.public_test,), output=Path("same"), threads=1))
    assert open_anchor(Path("same")).digest == taken.digest
    result = merge(MergeConfig(experts=(taken.experts[0].path,), anchor=taken.path, output=Path("m")))
    assert result.expected_routing is not None


# What it refuses.


def test_public_text_without_text_is_refused_before_any_work(tokenizer: Any) -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    tokenizer.save_pretrained("moe")
    Path("empty.txt").write_text(" \n")
    with refused("^data: no document with text in empty.txt", UsageError):
        take(data=(Path("empty.txt"),))


def edit(**changes: Any) -> None:
    path = Path("moe/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def retensor(change: Callable[[dict[str, RawTensor]], None]) -> None:
    tensors = {name: span.read() for name, span in checkpoint_spans(Path("moe")).items()}
    tensors = {name: RawTensor(raw.dtype, raw.shape, np.array(raw.data)) for name, raw in tensors.items()}
    change(tensors)
    Path("moe/model.safetensors").unlink()
    write_tensors(Path("moe/model.safetensors"), tensors)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False; a mixture that can be taken apart has True"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; .* has 1"),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; .* has \[\]"),
        ({"attention_bias": True}, "attention_bias is True; .* has False"),
        ({"use_sliding_window": True}, "use_sliding_window is True; .* has False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"shared_expert_intermediate_size": 48}, "shared_expert_intermediate_size is 48; a shared expert runs on"),
        ({"n_shared_experts": 1}, "n_shared_experts is 1; a shared expert runs on every token"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'; mixtures of these types can be taken apart: flex_o"),
        ({"model_type": "qwen3"}, "model_type is 'qwen3'; mixtures of these types"),
        ({"num_local_experts": "4"}, "num_local_experts is '4'; expected a whole number"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None; expected a whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small'; expected a number above 0"),
        ({"attention_dropout": "x"}, "json: attention_dropout is 'x', which qwen3_moe models cannot have"),
        ({"bos_token_id": {}}, "json: bos_token_id is {}, which qwen3_moe models cannot have"),
        ({"dtype": "x"}, "json: Transformers refuses it as that of a qwen3_moe model: module 'torch' has no attribute"),
        ({"dtype": []}, "json: Transformers refuses it as that of a qwen3_moe model: list index"),
        ({"rope_scaling": {"rope_type": "x", "factor": 2}}, "json: no qwen3 model can be made of it .KeyError: .x"),
        ({"hidden_size": 10**30}, "hidden_size is 10+; expected at most 2147483647"),
        ({"num_attention_heads": 1000, "head_dim": None}, "num_attention_heads is 1000, more than hidden_size, 32"),
        ({"num_local_experts": 5}, "tensor model.layers.0.mlp.gate.weight: shape is .4, 32.; expected .5, 32."),
        ({"moe_intermediate_size": 48}, "shape is .24, 32.; expected .48, 32."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_fields_that_cannot_be_taken_apart(fields: dict[str, Any], says: str) -> None:
    tiny.make_mixture(Path("moe"), "qwen3_moe")
    edit(**fields)
    names = ("a,b,c,d",) if fields.get("num_local_experts") == 5 else NAMES
    for dry_run in (True, False):
        with refused(says):
            take(names=names, dry_run=dry_run)


def test_a_flex_olmo_that_divides_by_the_sum() -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo", norm_topk_prob=True)
    with refused("norm_topk_prob is True; a mixture that can be taken apart has False"):
        take()


def extra(name: str, dtype: str = "F32") -> Callable[[dict[str, RawTensor]], None]:
    size = {"F32": 4, "U8": 1, "F8_E4M3": 1}[dtype]
    return lambda tensors: tensors.update({name: RawTensor(dtype, (4,), np.zeros(4 * size, np.uint8))})


def narrow(tensors: dict[str, RawTensor]) -> None:
    """One expert gets a narrower matrix."""
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name] = RawTensor("F32", (20, 32), tensors[name].data[: 20 * 32 * 4])


@pytest.mark.parametrize(
    ("change", "says", "hint"),
    [
        (extra("model.layers.0.mlp.shared_expert.gate_proj.weight"), "shared_expert.* is extra", "a shared expert"),
        (extra("model.layers.0.mlp.gate.e_score_correction_bias"), "e_score_correction_bias is extra", "biases"),
        (extra("model.layers.0.mlp.experts.0.up_proj.weight_scale_inv"), "weight_scale_inv is extra", "dequantise"),
        (extra("model.layers.1.mlp.gate_proj.weight"), "layers.1.mlp.gate_proj.weight is extra", "without experts"),
        (extra("model.layers.0.mlp.experts.0.up_proj.qweight", "U8"), "dtype is U8; expected F32", "dequantise"),
        (lambda tensors: tensors.pop(GATE), f"tensor {GATE} is missing", None),
        (lambda tensors: tensors.pop("model.norm.weight"), "tensor model.norm.weight is missing", None),
        (narrow, r"layers.1.mlp.experts.2.up_proj.weight: shape is \(20, 32\); expected \(24, 32\)", None),
    ],
    ids=["shared expert", "bias", "scales", "dense layer", "quantised", "no router", "no norm", "unequal"],
)
def test_tensors_that_cannot_be_taken_apart(
    change: Callable[[dict[str, RawTensor]], None], says: str, hint: str | None
) -> None:
    tiny.make_mixture(Path("moe"), "qwen3_moe")
    retensor(change)
    for dry_run in (True, False):
        with refused(says) as caught:
            take(dry_run=dry_run)
        assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("settings", "says", "error"),
    [
        ({"names": ()}, "^names: 0 for 3 experts: moe has 4, and expert 0 becomes the public one", UsageError),
        ({"names": ("a,b,c,d",)}, "^names: 4 for 3 experts", UsageError),
        ({"names": ("a,b,a",)}, "^names: 'a' is there twice", UsageError),
        ({"names": ("a,b,public",)}, "^names: is 'public', which is reserved", UsageError),
        ({"names": ("a,b,",)}, "^names: is ''; expected 1 to 63", UsageError),
        ({"public_expert": 4}, "^public_expert: 4 is no expert of moe: it has 4, from 0 to 3", UsageError),
        ({"data": (Path("nowhere"),)}, "^data: nowhere does not exist", UsageError),
        ({"data": (Path(__file__),)}, "moe: has no tokenizer", BundleError),
    ],
)
def test_settings_are_refused_before_any_work(settings: dict[str, Any], says: str, error: type[FlexctlError]) -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    for dry_run in (True, False):
        with refused(says, error):
            take(dry_run=dry_run, **settings)


def test_targets_are_kept_unless_told() -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    plan = take(dry_run=True)
    assert (plan.digest, plan.experts[0].digest, [*Path().iterdir()]) == (None, None, [Path("moe")])
    first = take()
    with refused("w/anchor: exists already", UsageError):
        take()
    shutil.rmtree("w/anchor")
    with refused("w/experts/law.st exists already", UsageError):
        take()
    assert take(overwrite=True).digest == first.digest
    assert sorted(item.name for item in Path("w").iterdir()) == ["anchor", "experts", "flexctl.toml"]


def test_a_merged_model_of_ours_and_the_other_way_round() -> None:
    tiny.make_mixture(Path("moe"), "flex_olmo")
    merged(take())
    with refused("merged/flexctl.json: is a bundle's manifest"):
        take("merged")
    with refused("moe/flexctl.json: is missing; config.json is that of a mixture of experts") as caught:
        remove(RemoveConfig(names=("law",), source=Path("moe")))
    assert "flexctl adopt moe" in str(caught.value.hint)
    with pytest.raises(BundleError, match="model_type is 'flex_olmo'") as caught:
        init_anchor(InitAnchorConfig(source="moe", data=(Path("moe"),), output=Path("x"), threads=1))
    assert "flexctl adopt" in str(caught.value.hint)


def test_a_number_that_is_none() -> None:
    tiny.make_mixture(Path("moe"), "mixtral")

    def spoil(tensors: dict[str, RawTensor]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"].data[:4] = [0, 0, 192, 127]

    retensor(spoil)
    with refused("moe/model.safetensors: tensor model.layers.1.block_sparse_moe.gate.weight: holds NaN or infinity"):
        take()
    assert not Path("w").exists()
