"""init-anchor: the checkpoint stays what it was, the rest follows from the public text, and refusals leave nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flexctl.bundle import open_anchor, open_router_file, store
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.init_anchor import InitAnchorConfig, InitAnchorResult, init_anchor
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.model import presets
from flexctl.model.building import load_tokenizer
from flexctl.routing.space import RouterSpace, fit_space, measure_inputs
from flexctl.runtime import SilentReporter
from flexctl.steps import calibration
from flexctl.text.documents import read_documents
from flexctl.text.sample import PublicSample
from flexctl.training import loop

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


def make(texts: Any, output: Path | None, **settings: Any) -> InitAnchorResult:
    defaults = {"data": (texts.public,), "sample_tokens": 3000, "threads": 1}
    return init_anchor(InitAnchorConfig(output=output, **{**defaults, **settings}))


class Listener(SilentReporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def state_of(path: Path) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return dict(model.state_dict())


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture
def sharded(tmp_path: Path, checkpoint: Path) -> Path:
    """The same checkpoint in bfloat16 and several files."""
    folder = tmp_path / "sharded"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB")
    load_tokenizer(checkpoint).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def test_stock_checkpoint_is_taken_as_it_is(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    result = make(texts, tmp_path / "anchor", source=str(checkpoint))
    assert same_state(state_of(tmp_path / "anchor"), state_of(checkpoint))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "anchor" / name).read_bytes() == (checkpoint / name).read_bytes()
    anchor = open_anchor(tmp_path / "anchor")
    assert (result.digest, result.path) == (anchor.digest, tmp_path / "anchor")
    assert result.name == anchor.manifest.name == "tiny-olmo2"
    assert (result.model_type, result.vocab_size) == ("olmo2", tiny.VOCAB_SIZE)
    assert (result.hidden_size, result.num_hidden_layers) == (32, 2)
    assert result.num_parameters == sum(value.numel() for value in state_of(checkpoint).values())
    assert (result.tokens, result.loss) == (0, None)
    assert anchor.manifest.architecture.dtype == "F32"
    assert anchor.manifest.moe_config["model_type"] == "flex_olmo"


def test_sharded_bfloat16_checkpoint_keeps_its_files_and_dtype(tmp_path: Path, texts: Any, sharded: Path) -> None:
    make(texts, tmp_path / "anchor", source=str(sharded))
    anchor = open_anchor(tmp_path / "anchor")
    assert anchor.manifest.architecture.dtype == "BF16"
    assert anchor.manifest.moe_config["dtype"] == "bfloat16"
    weights = sorted(path.name for path in sharded.glob("model*"))
    assert [path.name for path in sorted((tmp_path / "anchor").glob("model*"))] == weights
    assert same_state(state_of(tmp_path / "anchor"), state_of(sharded))
    assert all(raw.dtype == "BF16" for raw in anchor.weights().shared.values())
    assert {raw.dtype for raw in anchor.router_space().values()} == {"F32"}


def test_same_inputs_give_the_same_digest_and_others_do_not(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    def digest(name: str, **settings: Any) -> str | None:
        return make(texts, tmp_path / name, source=str(checkpoint), **settings).digest

    first = digest("a")
    assert digest("b") == first
    assert digest("c", seed=1) != first
    assert digest("d", data=(texts.public_test,)) != first


def test_other_kinds_of_text_are_measured_and_leave_nothing_else(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    make(texts, tmp_path / "plain", source=str(checkpoint))
    kinds = {"source": str(checkpoint), "calibrate": (texts.code, texts.sums)}
    make(texts, tmp_path / "varied", **kinds)
    plain, varied = (open_anchor(tmp_path / name) for name in ("plain", "varied"))
    assert varied.digest != plain.digest
    before, after = plain.router_space(), varied.router_space()
    changed = {name for name, raw in before.items() if after[name].data.tobytes() != raw.data.tobytes()}
    assert set(after) == set(before)
    assert {name.split(".")[-1] for name in changed} == {"variety_factor", "variety_diagonal"}
    assert varied.public_sample()["tokens"].data.tobytes() == plain.public_sample()["tokens"].data.tobytes()
    assert make(texts, tmp_path / "other", **{**kinds, "calibrate": (texts.code,)}).digest != varied.digest

    rows = {}
    for name in ("plain", "varied"):
        output = tmp_path / f"{name}.st"
        embed_router(EmbedRouterConfig(data=(texts.sums_test,), anchor=tmp_path / name, output=output))
        rows[name] = open_router_file(output).rows.data.tobytes()
    assert rows["plain"] != rows["varied"]
    assert verify(VerifyConfig(path=tmp_path / "varied")).ok
    for dry_run in (False, True):
        with pytest.raises(UsageError, match=r"^calibrate: .*nowhere does not exist"):
            make(texts, tmp_path / "x", source=str(checkpoint), calibrate=(tmp_path / "nowhere",), dry_run=dry_run)


def test_another_kind_of_text_may_be_called_anything(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    digests = set()
    for name in ("other", "public text as code"):
        shutil.copytree(texts.code, name)
        calibrate = (Path(name),)
        digests.add(make(texts, tmp_path / f"of {name}", source=str(checkpoint), calibrate=calibrate).digest)
    assert len(digests) == 1


def test_too_little_text_of_another_kind_is_refused_before_any_work(tmp_path: Path, texts: Any) -> None:
    Path("short.txt").write_text("One document.")
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"^calibrate: short\.txt has too little text"):
            make(texts, tmp_path / "x", preset="nano", calibrate=(Path("short.txt"),), dry_run=dry_run)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_character_of_public_text_is_too_little(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    Path("one.txt").write_text("a")
    with pytest.raises(UsageError, match="too little public text"):
        make(texts, tmp_path / "x", source=str(checkpoint), data=(Path("one.txt"),))
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]
    assert not (tmp_path / "x").exists()


def test_sample_and_router_space_are_of_the_public_text(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    result = make(texts, tmp_path / "anchor", source=str(checkpoint))
    anchor = open_anchor(tmp_path / "anchor")
    sample = PublicSample.from_tensors(anchor.public_sample())
    documents = set(read_documents([texts.public]))
    drawn = list(sample.texts(load_tokenizer(checkpoint)))
    assert set(drawn) <= documents
    assert 3000 <= result.sample_tokens == anchor.public_sample()["tokens"].shape[0] < 3600

    model = tiny.build(anchor.weights())
    stream = sample.stream()
    rows = [torch.from_numpy(stream.sequence(i, 256)[:-1]) for i in range(stream.num_sequences(256))]
    expected = fit_space(measure_inputs(model, [torch.stack(rows)]))
    found = RouterSpace.from_tensors(anchor.router_space())
    for part in ("mean", "diagonal"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-4, atol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(found.covariance(layer), expected.covariance(layer), rtol=1e-4, atol=1e-4)
    assert len(result.constant_std) == 2
    assert all(0 < std < 1 for std in result.constant_std)


def test_annealing_trains_the_source_on_the_public_text(anchor: Path, checkpoint: Path) -> None:
    """The session's anchor was made so."""
    run = json.loads((anchor / "run.json").read_text())
    assert run["tokens"] == 78 * 512
    assert run["loss"] < 3.5
    assert not same_state(state_of(anchor), state_of(checkpoint))
    assert (anchor / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()


def test_annealing_keeps_the_dtype_and_stays_silent(
    tmp_path: Path,
    texts: Any,
    sharded: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capfd.readouterr()
    caplog.clear()
    settings = {"anneal_tokens": 600, "seq_len": 32, "batch_tokens": 128, "lr": 1e-3}
    result = make(texts, tmp_path / "anchor", source=str(sharded), **settings)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert result.tokens == 640
    assert result.loss is not None
    state = state_of(tmp_path / "anchor")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    assert open_anchor(tmp_path / "anchor").config["dtype"] == "bfloat16"
    assert not same_state(state, state_of(sharded))


def test_annealing_keeps_how_the_source_generates(tmp_path: Path, texts: Any, source: Path) -> None:
    edit(source / "generation_config.json", temperature=0.7, do_sample=True)
    make(texts, tmp_path / "anchor", source=str(source), anneal_tokens=600, seq_len=32, batch_tokens=128)
    kept = [path / "generation_config.json" for path in (tmp_path / "anchor", source)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_annealing_keeps_a_head_that_is_not_the_embedding_whatever_the_config_says(
    tmp_path: Path, texts: Any, source: Path
) -> None:
    """As Transformers loads it; a head that is the embedding once more stays tied."""
    state = load_file(source / "model.safetensors")
    edit(source / "config.json", tie_word_embeddings=True)
    found = []
    for head in (state["lm_head.weight"], state["model.embed_tokens.weight"]):
        save_file({**state, "lm_head.weight": head.clone()}, source / "model.safetensors", {"format": "pt"})
        make(texts, tmp_path / "a", source=str(source), anneal_tokens=600, seq_len=32, batch_tokens=128, overwrite=True)
        found.append(open_anchor(tmp_path / "a").weights().shared)
    assert [("lm_head.weight" in shared) for shared in found] == [True, False]


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    nano = dataclasses.replace(
        presets.PRESETS["nano"],
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        vocab_size=300,
        seq_len=32,
        batch_tokens=128,
        max_tokens=1500,
    )
    monkeypatch.setitem(presets.PRESETS, "nano", nano)


@pytest.mark.usefixtures("tiny_preset")
def test_from_scratch_in_a_new_workspace(tmp_path: Path, texts: Any) -> None:
    result = make(texts, None, preset="nano")
    assert result.path == tmp_path / "anchor"
    assert (result.name, result.model_type, result.vocab_size) == ("nano-anchor", "olmo2", 300)
    assert result.tokens == 12 * 128
    assert result.loss is not None
    assert 3 < result.loss < 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor", "flexctl.toml"]
    assert 'anchor = "anchor"' in (tmp_path / "flexctl.toml").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")
    assert model.config.model_type == "olmo2"
    assert not model.config.tie_word_embeddings
    assert model.config.rms_norm_eps == 1e-5
    loaded = load_tokenizer(tmp_path / "anchor")
    assert loaded.decode(loaded("Some text.")["input_ids"]) == "Some text."


@pytest.mark.usefixtures("tiny_preset")
def test_from_scratch_repeats_itself_and_a_given_place_needs_no_workspace(tmp_path: Path, texts: Any) -> None:
    one = make(texts, tmp_path / "one", preset="nano", name="mine")
    other = make(texts, tmp_path / "other", preset="nano", name="mine")
    assert one.digest == other.digest
    assert make(texts, tmp_path / "third", preset="nano", seed=1).digest != one.digest
    assert not (tmp_path / "flexctl.toml").exists()


@pytest.mark.usefixtures("tiny_preset")
def test_stopped_and_resumed_gives_the_same_digest(tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(texts, tmp_path / "straight", preset="nano").digest
    loop_report, steps = loop._report, iter(range(1, 100))

    def stop(*args: Any) -> None:
        loop_report(*args)
        if next(steps) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_report", stop)
    with pytest.raises(KeyboardInterrupt):
        make(texts, tmp_path / "anchor", preset="nano", checkpoint_steps=4)
    assert not (tmp_path / "anchor").exists()
    result = make(texts, tmp_path / "anchor", preset="nano", resume=True)
    assert result.digest == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["anchor", "straight"]


def test_dry_run_says_what_it_would_do_and_writes_nothing(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    scratch = make(texts, None, preset="micro", dry_run=True)
    assert (scratch.path, scratch.digest, scratch.dry_run) == (tmp_path / "anchor", None, True)
    assert scratch.tokens == presets.PRESETS["micro"].max_tokens
    assert scratch.vocab_size == presets.PRESETS["micro"].vocab_size
    taken = make(texts, None, source=str(checkpoint), dry_run=True)
    assert (taken.tokens, taken.vocab_size, taken.name) == (0, tiny.VOCAB_SIZE, "tiny-olmo2")
    assert list(tmp_path.iterdir()) == []


def test_existing_anchor_is_replaced_only_when_told(tmp_path: Path, texts: Any, checkpoint: Path) -> None:
    first = make(texts, tmp_path / "anchor", source=str(checkpoint))
    with pytest.raises(UsageError, match="exists") as caught:
        make(texts, tmp_path / "anchor", source=str(checkpoint), seed=1)
    assert "`overwrite`" in str(caught.value.hint)
    assert open_anchor(tmp_path / "anchor").digest == first.digest
    second = make(texts, tmp_path / "anchor", source=str(checkpoint), seed=1, overwrite=True)
    assert open_anchor(tmp_path / "anchor").digest == second.digest != first.digest


def only_config(folder: Path, **config: Any) -> str:
    """A checkpoint of a config and nothing else: who reads on fails with another message."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "olmo2", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_unfit_source_is_refused_by_its_field_before_anything_is_read(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, texts: Any, config: dict[str, Any], field: str
) -> None:
    source = only_config(tmp_path_factory.mktemp("unfit"), **config)
    with pytest.raises(BundleError) as caught:
        make(texts, None, source=source)
    assert "config.json" in caught.value.message
    assert field in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"anneal_tokens": 5}, "anneal_tokens"),
        ({"source": "SOURCE", "max_tokens": 5}, "max_tokens"),
        ({"data": (Path("nowhere"),)}, "nowhere does not exist"),
        ({"preset": "nano", "threads": 0}, "threads"),
        ({"preset": "nano", "lr": -1.0}, "lr: -1.0 is not above 0"),
        ({"preset": "nano", "sample_tokens": 0}, "sample_tokens"),
        ({"anneal_tokens": -1}, "anneal_tokens: -1 is below 0"),
        ({"preset": "nano", "device": "toaster"}, "device"),
        ({"preset": "nano", "dtype": "int4"}, "dtype"),
    ],
)
@pytest.mark.usefixtures("tiny_preset")
def test_wrong_settings_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, texts: Any, checkpoint: Path, settings: dict[str, Any], says: str
) -> None:
    if settings.get("source") == "SOURCE":
        settings = {**settings, "source": str(checkpoint)}
    with pytest.raises(FlexctlError) as caught:
        make(texts, None, **settings)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert not (tmp_path / "anchor").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A copy of the checkpoint to make something of."""
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("source") / "copy"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_an_anchor_among_its_own_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "a.txt").write_text("a few words")
    with pytest.raises(UsageError, match="would be among the text of") as caught:
        init_anchor(InitAnchorConfig(data=(tmp_path / "public",), output=tmp_path / "public" / "anchor"))
    assert caught.value.field == "output"
    assert not (tmp_path / "public" / "anchor").exists()


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_a_token_beyond_the_embedding_is_refused_before_the_work(
    tmp_path: Path, texts: Any, source: Path, end: bool, dry_run: bool
) -> None:
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"eos_token": "<|over|>"} if end else {"extra_special_tokens": ["<|over|>"]})
    tokenizer.save_pretrained(source)
    with pytest.raises(BundleError) as caught:
        make(texts, None, source=str(source), dry_run=dry_run)
    assert "token '<|over|>' has id 320; expected below config.json's vocab_size, 320" in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_special_id_beyond_the_embedding_is_refused_before_the_work(
    tmp_path: Path, texts: Any, source: Path, dry_run: bool
) -> None:
    edit(source / "config.json", pad_token_id=999)
    with pytest.raises(BundleError, match=r"config\.json: pad_token_id is 999; expected below vocab_size, 320"):
        make(texts, None, source=str(source), dry_run=dry_run)
    assert list(tmp_path.iterdir()) == []


def test_a_sentencepiece_model_alone_says_what_reads_it(
    texts: Any, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    with pytest.raises(UsageError, match=r"tokenizer\.model alone, which needs sentencepiece and protobuf") as caught:
        make(texts, None, source=str(source), dry_run=True)
    assert str(caught.value.hint).startswith("pip install sentencepiece protobuf")


def test_a_sentencepiece_model_becomes_a_tokenizer_that_all_can_read(tmp_path: Path, texts: Any, source: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = iter(list(read_documents([texts.public])))
    model = str(source / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=model, vocab_size=90, minloglevel=2)
    (source / "tokenizer.json").unlink()
    named = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    make(texts, tmp_path / "anchor", source=str(source))
    assert (tmp_path / "anchor/tokenizer.json").is_file()
    text = next(iter(read_documents([texts.public_test])))
    both = [load_tokenizer(path)(text)["input_ids"] for path in (source, tmp_path / "anchor")]
    assert both[0] == both[1]
    assert same_state(state_of(tmp_path / "anchor"), state_of(source))


def test_the_router_space_is_of_the_weights_that_are_taken(tmp_path: Path, texts: Any, source: Path) -> None:
    """Shards with an index beside one file: the file counts, as it does for Transformers."""
    plain = make(texts, tmp_path / "plain", source=str(source), name="same").digest
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight += 0.5
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, source)
    listener = Listener()
    config = InitAnchorConfig(
        data=(texts.public,), source=str(source), output=tmp_path / "a", sample_tokens=3000, name="same", threads=1
    )
    assert init_anchor(config, listener).digest == plain
    assert same_state(state_of(tmp_path / "a"), state_of(source))
    (warning,) = listener.warnings
    assert "model-00001-of" in warning
    assert "left out, no part of an anchor" in warning


def test_what_is_not_taken_is_said_before_the_work(texts: Any, source: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    model.config.tie_word_embeddings = True
    model.save_pretrained(source)
    edit(source / "config.json", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (source / "tokenizer_x.py").write_text("raise SystemExit")
    (source / "tokenizer (copy).json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    listener = Listener()
    init_anchor(InitAnchorConfig(data=(texts.public,), source=str(source), dry_run=True), listener)
    code, names, head, vllm = listener.warnings
    assert "config.json: auto_map names code ({'AutoModelForCausalLM': 'modeling_x.X'})" in code
    assert "additional_chat_templates/, tokenizer (copy).json, tokenizer_x.py: left out" in names
    assert "tie_word_embeddings is true and lm_head.weight is not the embedding" in head
    assert "vLLM" in vllm


def test_weights_that_are_not_finite_leave_nothing(tmp_path: Path, texts: Any, sharded: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(sharded, dtype="auto")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    load_tokenizer(sharded).save_pretrained(broken)
    with pytest.raises(BundleError):
        make(texts, tmp_path / "anchor", source=str(broken))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "sharded"]


@pytest.mark.parametrize(
    ("writer", "error"),
    [(transformers.PreTrainedModel, SafetensorError), (transformers.PreTrainedTokenizerBase, Exception)],
)
def test_what_the_system_does_not_let_be_written_names_the_place_and_leaves_nothing(
    tmp_path: Path, texts: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, writer: Any, error: Any
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("what a library in Rust says (os error 28)")

    monkeypatch.setattr(writer, "save_pretrained", refuse)
    with pytest.raises(OSError, match="No space left on device") as caught:
        make(texts, tmp_path / "anchor", source=str(checkpoint), anneal_tokens=64, seq_len=32, batch_tokens=64)
    assert caught.value.filename == str(tmp_path / ".anchor.work" / "checkpoint")
    assert [item.name for item in tmp_path.rglob("*")] == []


@pytest.mark.usefixtures("tiny_preset")
@pytest.mark.parametrize("way", ["beside", "mount", "here"])
def test_an_empty_folder_becomes_the_anchor(
    tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Also one that must stay the folder that it is; the work then goes on inside a mount, where the room is."""
    expected = make(texts, tmp_path / "straight", preset="nano").digest
    target = tmp_path / "volume"
    target.mkdir()
    folder, work = target.stat().st_ino, tmp_path / ".volume.work"
    if way == "mount":
        monkeypatch.setattr(store, "_is_mount", lambda path: path == target)
        work = target / ".volume.work"
    elif way == "here":
        monkeypatch.chdir(target)
    assert make(texts, Path() if way == "here" else target, preset="nano", dry_run=True).dry_run
    loop_report, steps = loop._report, iter(range(1, 100))

    def stop(*args: Any) -> None:
        loop_report(*args)
        if next(steps) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_report", stop)
    with pytest.raises(KeyboardInterrupt):
        make(texts, Path() if way == "here" else target, preset="nano", checkpoint_steps=4)
    assert (work / "checkpoints").is_dir()
    found = make(texts, Path() if way == "here" else target, preset="nano", resume=True)
    assert found.digest == expected
    assert (target.stat().st_ino == folder) == (way != "beside")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["straight", "volume"]
    assert all(check.ok for check in verify(VerifyConfig(path=target)).checks)


@pytest.mark.parametrize(("hidden_size", "tokens"), [(64, 32_768), (128, 32_768), (576, 147_456), (2048, 262_144)])
def test_wider_anchors_are_calibrated_on_more_text(hidden_size: int, tokens: int) -> None:
    assert calibration._tokens(hidden_size) == tokens
