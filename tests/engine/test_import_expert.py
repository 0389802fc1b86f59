"""import-expert: an expert of a checkpoint that was fine-tuned elsewhere, byte for byte, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apart
import pytest
import tiny
from builders import fine_tune, make_expert, read_directory

from flexctl.bundle import RawTensor, open_anchor, open_expert, open_router_file
from flexctl.bundle.anchor import write_tensors
from flexctl.bundle.manifest import digest_of
from flexctl.bundle.stock import checkpoint_spans
from flexctl.bundle.tensors import from_float32, to_float32
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.evaluate import EvaluateConfig, evaluate
from flexctl.engine.import_expert import ImportExpertConfig, ImportExpertResult, import_expert
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.families import FAMILIES, feed_forward_names
from flexctl.runtime import SilentReporter

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

TYPES = [family.dense_type for family in FAMILIES]
FFN = [f"model.{name}" for _, _, name in feed_forward_names(2)]
ATTENTION = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Tensors = dict[str, RawTensor]


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory, anchor: Path, texts: Any) -> Path:
    """Router rows for the anchor, so that an import builds no model."""
    file = tmp_path_factory.mktemp("rows") / "rows.st"
    embed_router(EmbedRouterConfig(data=(texts.code,), anchor=anchor, output=file, threads=1))
    return file


def edit(path: Path, **changes: Any) -> Path:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def take(anchor: Path, dense: Path, data: Path, output: Path | None = None, **settings: Any) -> ImportExpertResult:
    config = ImportExpertConfig(dense=str(dense), data=(data,), anchor=anchor, output=output, threads=1, **settings)
    return import_expert(config)


@contextmanager
def refused(message: str, error: type[FlexctlError] = BundleError) -> Any:
    before = read_directory(Path())
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == error.exit_code
    assert read_directory(Path()) == before


# What it makes.


@pytest.mark.parametrize("model_type", TYPES)
def test_its_weights_are_the_checkpoint_s_in_every_family(
    tmp_path: Path, model_type: str, tokenizer: Any, texts: Any
) -> None:
    """The bytes are; alone it answers as the dense model; it is merged and removed like any other."""
    import torch
    import transformers

    from flexctl.bundle import pair_weights
    from flexctl.model.routed import exclude

    tied = model_type == "qwen3"
    model = tiny.make_dense(tiny.dense_config(model_type, tie_word_embeddings=tied))
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source="base", sample_tokens=2000, threads=1))
    anchor = open_anchor(Path("anchor"))
    dense = fine_tune(Path("base"), tmp_path / "dense")
    result = take(anchor.path, dense, texts.code, Path("x.st"), name="law")
    expert = open_expert(Path("x.st"))
    for name in FFN:
        stored = expert.tensor(name.removeprefix("model.")).data.tobytes()
        assert stored == checkpoint_spans(dense)[name].load() != checkpoint_spans(Path("base"))[name].load()
    assert (result.name, result.changed, result.moved, result.frozen_verified) == ("law", len(FFN), [], True)

    pair = tiny.build(pair_weights(anchor, expert))
    exclude(pair, [0])
    stock = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    tokens = tiny.some_tokens()
    with torch.no_grad():
        assert (pair(tokens).logits - stock(tokens).logits).abs().max() < 1e-4

    make_expert(Path("y.st"), anchor, "sums")
    merge(MergeConfig(experts=(Path("y.st"),), anchor=anchor.path, output=Path("m")))
    before = read_directory(Path("m"))
    merge(MergeConfig(experts=(Path("m"), Path("x.st")), overwrite=True))
    assert verify(VerifyConfig(path=Path("m"), anchor=anchor.path)).ok
    remove(RemoveConfig(names=("law",), source=Path("m"), output=Path("n")))
    assert read_directory(Path("n")) == before


def test_the_file_says_what_the_result_says(tmp_path: Path, anchor: Path, texts: Any) -> None:
    dense = fine_tune(anchor, tmp_path / "dense", FFN[1:4])
    said = {"license": "MIT", "purpose": ("research",), "expires": "2031-05-06", "label": "l", "contact": "c@d"}
    result = take(anchor, dense, texts.code, **said)
    expert = open_expert(tmp_path / "experts" / "code.st")
    manifest = expert.manifest
    assert (result.path, result.digest, result.name) == (expert.path, expert.digest, "code")
    assert result.anchor_digest == manifest.anchor.digest == open_anchor(anchor).digest
    weights = {n: i for n, i in open_anchor(anchor).manifest.tensors.items() if not n.startswith("router_space.")}
    assert result.dense_digest != digest_of(weights)
    assert manifest.training == {
        "imported": {"digest": result.dense_digest, "changed": 3, "moved": 0},
        "seed": 0,
        "losses": result.loss,
        "frozen_verified": True,
    }
    assert (manifest.data.license, manifest.data.purposes, manifest.data.expires) == (
        "MIT",
        ("research",),
        "2031-05-06",
    )
    assert (manifest.data.label, manifest.data.contact) == ("l", "c@d")
    assert manifest.data.documents == result.documents == 40
    assert manifest.data.tokens == result.tokens > 2000
    assert manifest.data.bytes == sum(file.stat().st_size for file in texts.code.iterdir())
    assert (manifest.router.kind, manifest.router.trained, manifest.rank, manifest.privacy) == (
        "discriminant",
        False,
        None,
        None,
    )
    assert list(manifest.router.bias) == result.bias
    assert result.bytes_written == expert.path.stat().st_size
    for place in (tmp_path, anchor, texts.code, Path.home()):
        assert str(place) not in expert.manifest_text
    assert take(anchor, dense, texts.code, Path("again.st"), **said).digest == result.digest


@pytest.mark.parametrize("kind", ["discriminant", "hidden"])
def test_rows_are_those_of_embed_router(tmp_path: Path, anchor: Path, texts: Any, kind: str) -> None:
    dense = fine_tune(anchor, tmp_path / "dense")
    computed = take(anchor, dense, texts.code, Path("a.st"), router=kind)
    file = Path("rows.st")
    embed_router(EmbedRouterConfig(data=(texts.code,), anchor=anchor, output=file, router=kind, threads=1))
    given = take(anchor, dense, texts.code, Path("b.st"), router=str(file))
    assert given.digest == computed.digest
    assert open_expert(Path("b.st")).router().data.tobytes() == open_router_file(file).rows.data.tobytes()
    assert open_expert(Path("b.st")).manifest.router == open_expert(Path("a.st")).manifest.router
    assert computed.loss is not None
    assert given.loss is None


def test_losses_are_those_of_evaluate(tmp_path: Path, anchor: Path, texts: Any) -> None:
    """Of the anchor and of the pair; a fine-tuned model that is no better than the anchor is warned of."""
    from flexctl.text.documents import read_documents, sample_halves

    dense = fine_tune(anchor, tmp_path / "dense")
    listener = Listener()
    config = ImportExpertConfig(dense=str(dense), data=(texts.code,), anchor=anchor, output=Path("x.st"), threads=1)
    result = import_expert(config, listener)
    _, unseen = sample_halves(read_documents([texts.code]), 512, 0)
    Path("unseen.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in unseen))

    def loss(bundle: Path) -> float:
        found = evaluate(EvaluateConfig(data=("x=unseen.jsonl",), bundle=bundle, anchor=anchor, threads=1))
        return found.perplexity["x"].nll

    assert result.loss is not None
    assert result.loss["anchor"] == pytest.approx(loss(anchor), abs=1e-5)
    assert result.loss["pair"] == pytest.approx(loss(Path("x.st")), abs=1e-5)
    assert result.loss["dense"] != pytest.approx(result.loss["pair"], abs=1e-3)
    assert any("no help on its own text" in warning for warning in listener.warnings) == (
        result.loss["pair"] >= result.loss["anchor"]
    )
    assert result.warnings == listener.warnings


def test_sharded_and_from_the_command_line(
    tmp_path: Path, anchor: Path, texts: Any, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flexctl.cli.app import main

    whole = fine_tune(anchor, tmp_path / "whole")
    flags = ["--data", str(texts.code), "--anchor", str(anchor), "--router", str(rows)]
    assert main(["import-expert", str(whole), *flags, "-o", "a.st"]) == 0
    assert capsys.readouterr().out.startswith("Imported expert code: a.st: 6 tensors differ from the anchor's, ")
    shutil.copytree(whole, "sharded")
    tensors = {name: span.read() for name, span in checkpoint_spans(whole).items()}
    Path("sharded/model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        write_tensors(Path("sharded") / file, {name: tensors[name] for name in tensors if files[name] == file})
    Path("sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert main(["import-expert", "sharded", *flags, "-o", "b.st", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path("a.st").read_bytes() == Path("b.st").read_bytes()
    assert {"name", "anchor_digest", "dense_digest", "digest", "moved", "loss", "frozen_verified"} <= set(found)
    assert main(["import-expert", "sharded", *flags, "-o", "b.st"]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_other_dtypes_of_anchor_and_checkpoint_alike(tmp_path: Path, checkpoint: Path, texts: Any, dtype: str) -> None:
    import torch
    import transformers

    name = {"BF16": torch.bfloat16, "F16": torch.float16}[dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=name)
    shutil.copytree(checkpoint, "base", ignore=shutil.ignore_patterns("model*"))
    model.save_pretrained("base")
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source="base", sample_tokens=2000, threads=1))
    dense = fine_tune(Path("base"), tmp_path / "dense")
    take(Path("anchor"), dense, texts.code_test, Path("x.st"))
    expert = open_expert(Path("x.st"))
    assert {expert.tensor(name.removeprefix("model.")).dtype for name in FFN} == {dtype}
    with refused(f"dtype is F32; the anchor's is {dtype}") as caught:
        take(Path("anchor"), checkpoint, texts.code_test, Path("y.st"))
    assert {"BF16": "bfloat16", "F16": "float16"}[dtype] in str(caught.value.hint)


# Other weights that moved.


def test_other_weights_that_moved_are_refused_by_name(tmp_path: Path, anchor: Path, texts: Any, rows: Path) -> None:
    moved = [ATTENTION, "model.layers.1.self_attn.o_proj.weight", "model.norm.weight", HEAD]
    dense = fine_tune(anchor, tmp_path / "dense", [*FFN, *moved])
    with refused(
        r"4 other weights \(lm_head.weight, model.layers.0.self_attn.q_proj.weight, .* and 1 more\)"
    ) as caught:
        take(anchor, dense, texts.code, Path("x.st"), router=str(rows))
    assert "`ffn_only`" in str(caught.value.hint)
    one = fine_tune(anchor, tmp_path / "one", [*FFN, ATTENTION])
    with refused(r"1 other weight \(model.layers.0.self_attn.q_proj.weight\)"):
        take(anchor, one, texts.code, Path("x.st"), dry_run=True)


def test_ffn_only_leaves_them_behind_and_measures_what_is_lost(
    tmp_path: Path, anchor: Path, texts: Any, rows: Path
) -> None:
    dense = fine_tune(anchor, tmp_path / "dense", [*FFN, ATTENTION, HEAD])
    listener = Listener()
    config = ImportExpertConfig(
        dense=str(dense), data=(texts.code,), anchor=anchor, output=Path("x.st"), ffn_only=True, threads=1
    )
    result = import_expert(config, listener)
    assert (result.moved, result.frozen_verified) == ([HEAD, ATTENTION], False)
    manifest = open_expert(Path("x.st")).manifest
    assert manifest.training["frozen_verified"] is False
    assert manifest.training["imported"]["moved"] == 2
    assert result.loss is not None
    assert result.loss == manifest.training["losses"]
    said = f"loss {result.loss['dense']:.3f} as it was, {result.loss['pair']:.3f} beside the anchor's weights"
    assert any("what they learned is lost" in warning and said in warning for warning in listener.warnings)
    same = fine_tune(anchor, tmp_path / "same")
    clean = take(anchor, same, texts.code, Path("y.st"))
    assert clean.digest == result.digest
    assert clean.loss is not None
    assert clean.loss["pair"] == pytest.approx(result.loss["pair"], abs=1e-6)
    assert abs(clean.loss["dense"] - result.loss["dense"]) > 1e-3
    unmeasured = take(anchor, dense, texts.code, Path("z.st"), ffn_only=True, router=str(rows))
    assert unmeasured.loss is None
    assert "was not measured" in unmeasured.warnings[0]


def test_a_checkpoint_whose_feed_forward_weights_never_moved_is_refused(
    tmp_path: Path, anchor: Path, texts: Any
) -> None:
    with refused("are all the anchor's own"):
        take(anchor, anchor, texts.code, Path("x.st"))
    dense = fine_tune(anchor, tmp_path / "dense", [HEAD])
    with refused("are all the anchor's own"):
        take(anchor, dense, texts.code, Path("x.st"), ffn_only=True)


def test_a_tied_head_may_be_in_either_s_files_but_not_differ(tokenizer: Any, texts: Any) -> None:
    tiny.make_dense(tiny.dense_config("llama", tie_word_embeddings=True)).save_pretrained("base")
    tokenizer.save_pretrained("base")

    def with_head(tensors: Tensors) -> Tensors:
        return {**tensors, HEAD: tensors[EMBEDDING]}

    fine_tune(Path("base"), Path("with"), change=with_head)
    fine_tune(Path("base"), Path("base-with"), [], change=with_head)
    fine_tune(Path("base"), Path("without"))
    for base in ("base", "base-with"):
        source = InitAnchorConfig(data=(texts.public_test,), source=base, output=Path(f"{base}-anchor"), threads=1)
        init_anchor(source)
        for dense in ("with", "without"):
            result = take(Path(f"{base}-anchor"), Path(dense), texts.code_test, Path(f"{base}-{dense}.st"))
            assert result.moved == []
    digests = {open_expert(path).digest for path in Path().glob("base-with*.st")}
    assert len(digests) == 1
    fine_tune(Path("with"), Path("torn"), [HEAD])
    with refused(r"1 other weight \(lm_head.weight\)"):
        take(Path("base-anchor"), Path("torn"), texts.code_test, Path("x.st"))


# Refusals.


def drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def put(name: str, value: Callable[[RawTensor], RawTensor], new: str | None = None) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, new or name: value(tensors[name])}


def reshaped(tensor: RawTensor) -> RawTensor:
    return RawTensor(tensor.dtype, tensor.shape[::-1], tensor.data)


def with_value(value: float) -> Callable[[RawTensor], RawTensor]:
    def change(tensor: RawTensor) -> RawTensor:
        numbers = to_float32(tensor.dtype, tensor.data)
        numbers[7] = value
        return RawTensor(tensor.dtype, tensor.shape, from_float32(tensor.dtype, numbers))

    return change


def in_float16(tensor: RawTensor) -> RawTensor:
    return RawTensor("F16", tensor.shape, from_float32("F16", to_float32(tensor.dtype, tensor.data)))


TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (drop(FFN[0]), r"dense: tensor model.layers.0.mlp.gate_proj.weight is missing"),
    (drop(ATTENTION), r"q_proj.weight is missing"),
    (put(FFN[2], reshaped), r"down_proj.weight: shape is \(48, 32\); expected \(32, 48\)"),
    (put(ATTENTION, reshaped, "model.layers.0.self_attn.q_proj.bias"), r"q_proj.bias' is extra"),
    (put(FFN[1], with_value(float("nan"))), r"model.safetensors: tensor model.layers.0.mlp.up_proj.weight: holds NaN"),
    (put(ATTENTION, with_value(float("inf"))), r"q_proj.weight: holds NaN or infinity"),
    (put(FFN[1], in_float16), r"up_proj.weight: dtype is F16; the anchor's is F32"),
]


@pytest.mark.parametrize(("change", "message"), TENSORS, ids=[message for _, message in TENSORS])
def test_wrong_tensors(anchor: Path, texts: Any, rows: Path, change: Any, message: str) -> None:
    dense = fine_tune(anchor, Path("dense"), change=change)
    with refused(message):
        take(anchor, dense, texts.code, Path("x.st"), router=str(rows), ffn_only=True)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "llama"}, r"dense/config.json: model_type is 'llama'; the anchor's is 'olmo2'"),
    ({"model_type": "gpt2"}, r"model_type is 'gpt2'"),
    ({"intermediate_size": 64}, r"intermediate_size is 64; the anchor's is 48"),
    ({"num_key_value_heads": 4}, r"num_key_value_heads is 4; the anchor's is 2"),
    ({"rms_norm_eps": 1e-6}, r"rms_norm_eps is 1e-06"),
    ({"tie_word_embeddings": True}, r"tie_word_embeddings is True"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, r"rope_parameters is .*7\.0"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGS, ids=[message for _, message in CONFIGS])
def test_another_architecture(anchor: Path, texts: Any, changes: dict[str, Any], message: str) -> None:
    dense = edit(fine_tune(anchor, Path("dense")), **changes)
    with refused(message):
        take(anchor, dense, texts.code, Path("x.st"), ffn_only=True)


def test_what_a_fine_tune_may_change_in_its_config(anchor: Path, texts: Any, rows: Path) -> None:
    changes = {"eos_token_id": 5, "max_position_embeddings": 4096, "use_cache": False, "transformers_version": "4.1"}
    dense = edit(fine_tune(anchor, Path("dense")), **changes)
    assert take(anchor, dense, texts.code, Path("x.st"), router=str(rows)).digest


def test_another_tokenizer(anchor: Path, texts: Any, rows: Path) -> None:
    dense = fine_tune(anchor, Path("dense"))
    file = dense / "tokenizer.json"
    rules = json.loads(file.read_text())
    cut = {**rules, "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}
    file.write_text(json.dumps(cut, indent=1))
    assert take(anchor, dense, texts.code, Path("a.st"), router=str(rows)).digest
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    file.write_text(json.dumps(rules))
    with refused("its tokenizer makes other tokens than the anchor's"):
        take(anchor, dense, texts.code, Path("x.st"), router=str(rows))
    file.write_text("{}")
    with refused("dense: its tokenizer cannot be read"):
        take(anchor, dense, texts.code, Path("x.st"), router=str(rows))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dense / name).unlink()
    assert take(anchor, dense, texts.code, Path("b.st"), router=str(rows)).digest


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"dense": "nowhere"}, "'nowhere' is neither a directory nor a repository"),
    ({"anchor": Path("nowhere")}, "nowhere"),
    ({"data": (Path("nowhere"),)}, "nowhere does not exist"),
    ({"expires": "next year"}, "expires: 'next year'"),
    ({"expires": "20310506"}, "expires"),
    ({"router": "magic"}, "router: 'magic'"),
    ({"router": "missing.st"}, "missing.st"),
    ({"router": "encoder"}, "no sentence encoder"),
    ({"threads": 0}, "threads"),
    ({"device": "toaster"}, "device"),
    ({"dtype": "int4"}, "dtype"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS, ids=[says for _, says in SETTINGS])
def test_wrong_settings(anchor: Path, texts: Any, settings: dict[str, Any], says: str) -> None:
    dense = fine_tune(anchor, Path("dense"))
    defaults = {"dense": str(dense), "data": (texts.code,), "anchor": anchor, "output": Path("x.st")}
    with refused(says, UsageError):
        import_expert(ImportExpertConfig(**{**defaults, **settings}))


def test_names_that_are_none_and_text_that_is_too_little(anchor: Path, texts: Any, tmp_path: Path) -> None:
    dense = fine_tune(anchor, Path("dense"))
    with refused("reserved", UsageError):
        take(anchor, dense, texts.code, name="public")
    Path("a.txt").write_text("one passage")
    with refused("passages are too few", UsageError):
        take(anchor, dense, tmp_path / "a.txt")


def test_rows_of_another_anchor(tmp_path: Path, checkpoint: Path, texts: Any, rows: Path) -> None:
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(checkpoint), sample_tokens=2000, threads=1))
    dense = fine_tune(checkpoint, tmp_path / "dense")
    with refused(r"rows\.st: anchor\.digest"):
        take(Path("anchor"), dense, texts.code, Path("x.st"), router=str(rows))


# Manners.


def test_a_dry_run_compares_every_weight_and_writes_nothing(anchor: Path, texts: Any) -> None:
    dense = fine_tune(anchor, Path("dense"), FFN[:2])
    before = read_directory(Path())
    result = take(anchor, dense, texts.code, dry_run=True)
    assert (result.dry_run, result.digest, result.changed) == (True, None, 2)
    assert read_directory(Path()) == before


def test_an_expert_that_exists_is_replaced_only_when_told(anchor: Path, texts: Any, rows: Path) -> None:
    dense = fine_tune(anchor, Path("dense"))
    first = take(anchor, dense, texts.code, Path("x.st"), router=str(rows))
    other = fine_tune(anchor, Path("other"), FFN[:1])
    with refused("x.st exists", UsageError):
        take(anchor, other, texts.code, Path("x.st"), router=str(rows))
    second = take(anchor, other, texts.code, Path("x.st"), router=str(rows), overwrite=True)
    assert open_expert(Path("x.st")).digest == second.digest != first.digest


def test_a_source_that_changes_on_the_way_is_noticed(
    anchor: Path, texts: Any, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexctl.engine import import_expert as module

    dense = fine_tune(anchor, Path("dense"))
    compared = module.compare_dense

    def then_changed(*arguments: Any) -> Any:
        found = compared(*arguments)
        span = checkpoint_spans(dense)[FFN[0]]
        with span.path.open("r+b") as file:
            file.seek(span.start)
            file.write(b"\1")
        return found

    monkeypatch.setattr(module, "compare_dense", then_changed)
    with pytest.raises(
        BundleError, match=r"dense/model\.safetensors: tensor model\S+gate_proj\.weight: its bytes are not"
    ):
        take(anchor, dense, texts.code, Path("out/x.st"), router=str(rows))
    assert not Path("out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from flexctl.bundle import expert
from flexctl.engine.import_expert import ImportExpertConfig, import_expert

def killing(*_):
    os.kill(os.getpid(), signal.SIGKILL)

expert.hash_spans = killing
dense, data, anchor, rows = sys.argv[1:]
import_expert(ImportExpertConfig(
    dense=dense, data=(Path(data),), anchor=Path(anchor), router=rows, output=Path("out/x.st"), threads=1
))
"""


def test_killed_before_it_is_proven_there_is_no_expert(anchor: Path, texts: Any, rows: Path) -> None:
    dense = fine_tune(anchor, Path("dense"))
    apart.killed(KILLED, dense, texts.code, anchor, rows, said=Path("said"))
    assert not Path("out/x.st").exists()
    take(anchor, dense, texts.code, Path("out/x.st"), router=str(rows))
    assert sorted(os.listdir("out")) == ["x.run.json", "x.st"]
