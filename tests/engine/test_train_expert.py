"""train-expert: what it writes, what it must leave alone, how it goes on after being killed, what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apart
import pyarrow as pa
import pyarrow.csv as pa_csv
import pytest
import standin
import tiny
import torch
from builders import read_directory
from pyarrow import parquet

from flexctl.bundle import Expert, open_anchor, open_expert, open_router_file, pair_weights
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.train_expert import TrainExpertConfig, TrainExpertResult, train_expert
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.evaluation.scoring import score_documents
from flexctl.families import feed_forward_names
from flexctl.model import attention, recompute
from flexctl.model.building import build_model, load_tokenizer, stock_problems
from flexctl.model.tensors import to_torch
from flexctl.routing.rows import bias_of
from flexctl.routing.space import RouterSpace
from flexctl.runtime import SILENT, SilentReporter
from flexctl.steps import open_run
from flexctl.text.corpus import prepare_corpus
from flexctl.text.sample import PublicSample, leading
from flexctl.training import checkpoints, pair

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SMALL = {"max_steps": 6, "seq_len": 32, "batch_tokens": 256, "threads": 1}


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(params=["torch", "blocks"])
def attending(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Settings by which attention trains by torch's kernel, or by blocks."""
    if request.param == "torch":
        yield {}
        return
    lengths, by_blocks = set(), attention.attend_by_blocks

    def watching(query: torch.Tensor, *given: Any) -> torch.Tensor:
        lengths.add(query.shape[2])
        return by_blocks(query, *given)

    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(attention, "attend_by_blocks", watching)
    yield {"dtype": "bfloat16", "seq_len": 64}
    assert lengths == {64}


def train(anchor: Path, data: Path, output: Path | None = None, **settings: Any) -> TrainExpertResult:
    return train_expert(TrainExpertConfig(data=(data,), anchor=anchor, output=output, **{**SMALL, **settings}))


def feed_forward(expert: Expert) -> dict[str, torch.Tensor]:
    return {name: to_torch(expert.tensor(name)) for _, _, name in feed_forward_names(2)}


def rows_of(path: Path) -> torch.Tensor:
    return to_torch(open_expert(path).router())


def test_result_says_what_the_file_says(tmp_path: Path, anchor: Path, texts: Any) -> None:
    settings = {"license": "MIT", "purpose": ("research",), "expires": "2031-05-06", "label": "l", "contact": "c@d"}
    result = train(anchor, texts.code, tmp_path / "x.st", name="mine", **settings)
    expert = open_expert(tmp_path / "x.st")
    manifest = expert.manifest
    assert (result.path, result.digest, result.name) == (tmp_path / "x.st", expert.digest, "mine")
    assert manifest.name == "mine"
    assert result.anchor_digest == manifest.anchor.digest == open_anchor(anchor).digest
    assert result.steps == manifest.training["steps"] == 6
    assert result.tokens + result.public_tokens == 6 * 256
    assert manifest.training["tokens"] == result.tokens
    assert manifest.training["public_tokens"] == result.public_tokens
    assert result.public_tokens == pytest.approx(0.3 * 6 * 256, abs=32)
    assert manifest.training["losses"] == {"final": result.final_loss, "held_out": result.held_out}
    assert result.frozen_verified is manifest.training["frozen_verified"] is True
    assert (manifest.data.license, manifest.data.purposes, manifest.data.expires) == (
        "MIT",
        ("research",),
        "2031-05-06",
    )
    assert (manifest.data.label, manifest.data.contact) == ("l", "c@d")
    assert manifest.data.documents == 38
    assert manifest.data.tokens > 2000
    assert (manifest.router.kind, manifest.router.trained, manifest.privacy) == ("discriminant", False, None)
    assert manifest.router.own_covariance == 0.1
    assert list(manifest.router.bias) == pytest.approx(result.bias)
    assert result.bytes_written == (tmp_path / "x.st").stat().st_size
    assert json.loads((tmp_path / "x.run.json").read_text())["tokens_per_s"] == result.tokens_per_s
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.run.json", "x.st"]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_trains_the_expert_that_its_documents_train(
    tmp_path: Path, anchor: Path, texts: Any, ending: str
) -> None:
    documents = [json.loads(line)["text"] for line in texts.sums.read_text().splitlines()]
    table = pa.table({"body": documents, "id": range(len(documents))})
    path = tmp_path / f"table.{ending}"
    if ending == "csv":
        pa_csv.write_csv(table, path)
    else:
        parquet.write_table(table, path)
    expected = train(anchor, texts.sums, tmp_path / "lines.st", name="x", max_steps=1)
    found = train(anchor, path, tmp_path / "table.st", name="x", max_steps=1, text_field="body")
    assert found.digest == expected.digest
    assert (tmp_path / "table.st").read_bytes() == (tmp_path / "lines.st").read_bytes()
    with pytest.raises(UsageError, match=rf"table\.{ending}: no column 'text'; there are 'body', 'id'"):
        train(anchor, path, tmp_path / "no.st", name="x")


def test_manifest_holds_nothing_of_the_machine(tmp_path: Path, anchor: Path, texts: Any) -> None:
    train(anchor, texts.code, tmp_path / "x.st", public=texts.public_test)
    text = open_expert(tmp_path / "x.st").manifest_text
    for place in (tmp_path, anchor, texts.code, texts.public_test, Path.home(), Path(sys.executable).parent):
        assert str(place) not in text


def test_it_learns_its_own_text_and_keeps_public_text(experts: dict[str, Path], anchor: Path) -> None:
    public = {name: to_torch(raw) for name, raw in open_anchor(anchor).weights().experts["public"].items()}
    for path in experts.values():
        expert = open_expert(path)
        before_after = expert.manifest.training["losses"]["held_out"]
        assert before_after["own"]["after"] < before_after["own"]["before"] - 0.02
        assert before_after["public"]["after"] < before_after["public"]["before"] + 0.05
        assert not any(torch.equal(tensor, public[name]) for name, tensor in feed_forward(expert).items())


def test_bias_is_at_most_zero_and_is_that_of_the_rows(experts: dict[str, Path], anchor: Path) -> None:
    space = RouterSpace.from_tensors(open_anchor(anchor).router_space())
    for path in experts.values():
        bias = bias_of(rows_of(path), space)
        assert bias.max() <= 1e-5
        assert bias.min() < -0.05
        assert list(open_expert(path).manifest.router.bias) == pytest.approx(bias.tolist(), abs=1e-6)


def test_same_inputs_give_the_same_digest_and_another_seed_does_not(tmp_path: Path, anchor: Path, texts: Any) -> None:
    """Law 5. The name of file and expert do not count."""
    first = train(anchor, texts.code, tmp_path / "a" / "x.st")
    assert train(anchor, texts.code, tmp_path / "b" / "y.st", name="other").digest == first.digest
    assert train(anchor, texts.code, tmp_path / "c" / "x.st", seed=1).digest != first.digest
    assert train(anchor, texts.code, tmp_path / "d" / "x.st", seed=-1).digest != first.digest


def test_jsonl_in_a_workspace_makes_an_expert_of_its_name(tmp_path: Path, anchor: Path, texts: Any) -> None:
    (tmp_path / "flexctl.toml").write_text(f'[workspace]\nanchor = "{anchor}"\n')
    result = train_expert(TrainExpertConfig(data=(texts.sums,), **SMALL))
    assert result.path == tmp_path / "experts" / "sums.st"
    assert result.name == "sums"
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == ["sums.run.json", "sums.st"]


def test_what_will_not_serve_is_warned_of_before_the_work(anchor: Path, texts: Any) -> None:
    listener = Listener()
    settings: Any = {"expires": "2020-01-31", "seq_len": 129, "dry_run": True}
    train_expert(TrainExpertConfig(data=(texts.code,), anchor=anchor, **settings), listener)
    assert listener.warnings == [
        "a sequence has 129 tokens; the model is made for 128 (max_position_embeddings)",
        "`expires`: 2020-01-31 is past; merge will refuse the expert",
    ]


def test_folder_name_is_slugged(tmp_path: Path, anchor: Path, texts: Any) -> None:
    assert train(anchor, texts.public_test, tmp_path / "x.st").name == "public-test"


@pytest.mark.parametrize(
    ("settings", "steps", "share"),
    [
        ({"public_mix": 0.0}, 6, 0.0),
        ({"public_mix": 0.5}, 6, 0.5),
        ({"max_steps": None, "max_tokens": 1000, "public_mix": 0.0}, 4, 0.0),
        ({"max_steps": 2, "max_tokens": 100_000}, 2, 0.3),
    ],
)
def test_budget_counts_the_owner_s_tokens(
    tmp_path: Path, anchor: Path, texts: Any, settings: dict[str, Any], steps: int, share: float
) -> None:
    result = train(anchor, texts.code, tmp_path / "x.st", **settings)
    assert result.steps == steps
    assert result.public_tokens == int(steps * 8 * share + 1e-9) * 32
    assert result.tokens == steps * 256 - result.public_tokens


def test_epochs_are_passes_over_the_owner_s_text(tmp_path: Path, anchor: Path, texts: Any) -> None:
    once, thrice = (
        train(anchor, texts.code_test, tmp_path / f"{n}.st", epochs=n, max_steps=None, batch_tokens=64, public_mix=0.0)
        for n in (1, 3)
    )
    size = open_expert(once.path).manifest.data.tokens
    assert once.tokens == pytest.approx(size, abs=64)
    assert thrice.tokens == pytest.approx(3 * size, abs=64)


def test_other_public_text_is_used_when_given(tmp_path: Path, anchor: Path, texts: Any) -> None:
    anchors_own = train(anchor, texts.code, tmp_path / "a.st")
    given = train(anchor, texts.code, tmp_path / "b.st", public=texts.public_test)
    assert given.digest != anchors_own.digest
    assert given.public_tokens == anchors_own.public_tokens
    assert given.held_out["public"]["before"] != anchors_own.held_out["public"]["before"]


def test_a_single_document_holds_nothing_out_and_says_so(tmp_path: Path, anchor: Path) -> None:
    (tmp_path / "one.txt").write_text(" ".join(tiny.make_texts("code", 30)))
    listener = Listener()
    config = TrainExpertConfig(data=(tmp_path / "one.txt",), anchor=anchor, output=tmp_path / "x.st", **SMALL)
    result = train_expert(config, listener)
    assert set(result.held_out) == {"public"}
    assert any("single document" in warning for warning in listener.warnings)


def test_rows_stay_as_the_router_file_has_them(tmp_path: Path, anchor: Path, texts: Any) -> None:
    given = tmp_path / "rows.st"
    embed_router(EmbedRouterConfig(data=(texts.code,), anchor=anchor, router="hidden", output=given))
    train(anchor, texts.code, tmp_path / "x.st", router=str(given))
    assert torch.equal(rows_of(tmp_path / "x.st"), to_torch(open_router_file(given).rows))
    assert open_expert(tmp_path / "x.st").manifest.router == open_router_file(given).info


def test_rows_follow_from_the_text_and_the_share_of_its_own_covariance(
    tmp_path: Path, anchor: Path, texts: Any
) -> None:
    """Anybody who has the text can make them again; training leaves no trace in them."""
    settings = {"own_covariance": 0.3, "seed": 2}
    train(anchor, texts.code, tmp_path / "short.st", **settings)
    train(anchor, texts.code, tmp_path / "long.st", **settings, max_steps=2, lr=1e-3)
    train(anchor, texts.code, tmp_path / "other.st", seed=2)
    short, long, other = (tmp_path / f"{name}.st" for name in ("short", "long", "other"))
    assert torch.equal(rows_of(short), rows_of(long))
    assert not torch.equal(rows_of(short), rows_of(other))
    assert open_expert(short).manifest.router.own_covariance == 0.3


def test_router_file_of_another_anchor_is_refused(tmp_path: Path, anchor: Path, texts: Any, checkpoint: Path) -> None:
    other = tmp_path / "other"
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(checkpoint), output=other, sample_tokens=2000))
    embed_router(EmbedRouterConfig(data=(texts.code,), anchor=other, output=tmp_path / "rows.st"))
    with pytest.raises(BundleError, match=r"rows\.st: anchor\.digest"):
        train(anchor, texts.code, tmp_path / "x.st", router=str(tmp_path / "rows.st"))
    assert not list(tmp_path.glob("x*")) + list(tmp_path.glob(".*"))


@pytest.fixture
def bfloat16_anchor(tmp_path: Path, checkpoint: Path, texts: Any) -> Path:
    import transformers

    from flexctl.model.building import load_tokenizer

    source = tmp_path / "bfloat16"
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(source)
    load_tokenizer(checkpoint).save_pretrained(source)
    path = tmp_path / "bfloat16-anchor"
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(source), output=path, sample_tokens=2000))
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_expert_of_a_bfloat16_anchor_is_rounded_once_at_the_end(
    tmp_path: Path, bfloat16_anchor: Path, texts: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: dict[str, torch.Tensor] = {}
    rounding = pair.Pair.round_weights

    def watched(which: pair.Pair, name: str, public: Any) -> dict[str, torch.Tensor]:
        for layer, module in enumerate(which.experts):
            for part, parameter in module.named_parameters():
                exact[f"layers.{layer}.mlp.{part}"] = parameter.detach().clone()
        return rounding(which, name, public)

    monkeypatch.setattr(pair.Pair, "round_weights", watched)
    result = train(bfloat16_anchor, texts.code, tmp_path / "x.st", dtype=dtype)
    expert = open_expert(tmp_path / "x.st")
    for name, tensor in feed_forward(expert).items():
        assert tensor.dtype == torch.bfloat16
        assert exact[name].dtype == torch.float32
        assert not torch.equal(exact[name], exact[name].bfloat16().float())
        assert torch.equal(tensor, exact[name].bfloat16())
    assert expert.router().dtype == "F32"
    assert result.held_out["own"]["after"] < result.held_out["own"]["before"]


KILLED = """
import os, signal, sys
from pathlib import Path
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.training import checkpoints

is_due = checkpoints.Checkpoints.is_due

def killing(self, step, steps):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return is_due(self, step, steps)

checkpoints.Checkpoints.is_due = killing
data, anchor, output = map(Path, sys.argv[1:])
train_expert(TrainExpertConfig(data=(data,), anchor=anchor, output=output, checkpoint_steps=2, **SETTINGS))
"""


@pytest.fixture
def killed(tmp_path: Path, anchor: Path, texts: Any) -> Path:
    """Where a run was killed after its fifth of six steps, the last checkpoint being the fourth's."""
    output = tmp_path / "killed" / "x.st"
    script = KILLED.replace("SETTINGS", repr(SMALL))
    apart.killed(script, texts.code, anchor, output, said=tmp_path / "said")
    assert not output.exists()
    return output


def test_killed_and_resumed_gives_the_same_digest(tmp_path: Path, anchor: Path, texts: Any, killed: Path) -> None:
    """Law 6, also past a newest checkpoint that is broken, and only with the same settings."""
    expected = train(anchor, texts.code, tmp_path / "straight.st")
    work = killed.parent / ".x.work" / "checkpoints"
    assert [path.name for path in sorted(work.iterdir())] == [
        "checkpoint-00000002.safetensors",
        "checkpoint-00000004.safetensors",
    ]
    for changes in (
        {"lr": 1e-3},
        {"micro_batch": 3},
        {"public": texts.public_test},
        {"own_covariance": 0.5},
        {"seed": 3},
    ):
        with pytest.raises(UsageError, match="that run had"):
            train(anchor, texts.code, killed, resume=True, checkpoint_steps=2, **changes)
    with pytest.raises(UsageError, match="that run had"):
        train(anchor, texts.public_test, killed, resume=True, checkpoint_steps=2, name="code")
    assert len(list(work.iterdir())) == 2

    newest = work / "checkpoint-00000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    listener = Listener()
    config = TrainExpertConfig(
        data=(texts.code,), anchor=anchor, output=killed, resume=True, checkpoint_steps=2, **SMALL
    )
    result = train_expert(config, listener)
    assert any("passed over" in warning for warning in listener.warnings)
    assert any("after step 2" in note for note in listener.notes)
    assert result.digest == expected.digest
    assert open_expert(killed).manifest.training == open_expert(expected.path).manifest.training
    assert sorted(path.name for path in killed.parent.iterdir()) == ["x.run.json", "x.st"]


def test_interrupted_run_keeps_its_checkpoints(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, attending: dict[str, Any]
) -> None:
    expected = train(anchor, texts.code, tmp_path / "straight.st", **attending).digest
    is_due = checkpoints.Checkpoints.is_due

    def stopping(self: Any, step: int, steps: int) -> bool:
        if step == 3:
            raise KeyboardInterrupt
        return is_due(self, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "is_due", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(anchor, texts.code, tmp_path / "x.st", checkpoint_steps=1, **attending)
    assert not (tmp_path / "x.st").exists()
    resumed = train(anchor, texts.code, tmp_path / "x.st", checkpoint_steps=1, resume=True, **attending)
    assert resumed.digest == expected
    assert sorted(path.name for path in tmp_path.iterdir() if "straight" not in path.name) == ["x.run.json", "x.st"]


def held_out_losses(anchor: Path, expert: Path, data: Path, work: Path) -> dict[str, float]:
    """What the pair in a file scores on the text that training held out."""
    opened, made_for = open_expert(expert), open_anchor(anchor)
    model = build_model(pair_weights(made_for, opened), device=torch.device("cpu"), dtype=torch.float32)
    work.mkdir()
    own = prepare_corpus([data], load_tokenizer(anchor), work, seed=0, reporter=SILENT).held_out
    public = PublicSample.from_tensors(made_for.public_sample()).held_out
    assert own is not None
    parts = {"own": leading(own, 4_096), "public": leading(public, 4_096)}
    return {name: score_documents(model, parts[name], seq_len=32, batch_tokens=8192).nll for name in parts}


class Titles(SilentReporter):
    """Which texts are scored."""

    def __init__(self) -> None:
        self.scored: list[str] = []

    def progress(self, title: str, total: float, unit: str) -> Any:
        if title.startswith("scoring held-out text, "):
            self.scored.append(title.rsplit(" ", 1)[1])
        return super().progress(title, total, unit)


def test_public_text_is_scored_before_training_once_for_all_owners(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the anchor makes of it is the same for each; what anybody makes of an owner's text is never kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found, scored = {}, {}
    for name, data, changes in (
        ("code", texts.code, {}),
        ("sums", texts.sums, {}),
        ("rank", texts.code, {"rank": 2}),
        ("short", texts.code, {"seq_len": 16}),
    ):
        titles = Titles()
        config = TrainExpertConfig(data=(data,), anchor=anchor, output=tmp_path / f"{name}.st", **{**SMALL, **changes})
        found[name], scored[name] = train_expert(config, titles).held_out, titles.scored
    assert scored["code"] == scored["short"] == ["own", "public", "own", "public"]
    assert scored["sums"] == scored["rank"] == ["own", "own", "public"]
    assert found["code"]["public"]["before"] == found["sums"]["public"]["before"] == found["rank"]["public"]["before"]
    assert found["code"]["own"]["before"] != found["sums"]["own"]["before"]
    assert len(list((tmp_path / "cache" / "flexctl" / "scores").iterdir())) == 2


@pytest.mark.parametrize("which", ["float32", "bfloat16"])
def test_a_low_rank_expert_is_small_learns_and_reports_what_will_be_served(
    tmp_path: Path, anchor: Path, texts: Any, which: str, request: pytest.FixtureRequest
) -> None:
    made_for = anchor if which == "float32" else request.getfixturevalue("bfloat16_anchor")
    full = train(made_for, texts.code, tmp_path / "full.st")
    result = train(made_for, texts.code, tmp_path / "x.st", rank=3, max_steps=12, lr=4e-3)
    expert = open_expert(result.path)
    assert (result.rank, expert.manifest.rank, full.rank) == (3, 3, None)
    assert expert.manifest.tensors["layers.1.mlp.down_proj.weight.lora_A"].shape == (3, 48)
    assert expert.manifest.tensors["layers.1.mlp.down_proj.weight.lora_B"].shape == (32, 3)
    dtypes = {info.dtype for name, info in expert.manifest.tensors.items() if "lora" in name}
    assert dtypes == {"F32" if which == "float32" else "BF16"}
    weights = sum(span.stop - span.start for name, span in expert.spans.items() if "lora" in name)
    fulls = sum(span.stop - span.start for name, span in open_expert(full.path).spans.items() if "mlp" in name)
    assert weights / fulls == pytest.approx(3 * (48 + 32) / (48 * 32))
    assert result.bytes_written < full.bytes_written
    assert result.frozen_verified
    assert result.held_out["own"]["after"] < result.held_out["own"]["before"] - 0.02
    found = held_out_losses(made_for, result.path, texts.code, tmp_path / "work")
    assert {name: losses["after"] for name, losses in result.held_out.items()} == pytest.approx(found, abs=1e-6)


def test_a_low_rank_run_that_was_interrupted_goes_on_to_the_same_digest(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laws 5 and 6."""
    expected = train(anchor, texts.code, tmp_path / "straight.st", rank=2).digest
    assert train(anchor, texts.code, tmp_path / "again.st", rank=2).digest == expected
    assert train(anchor, texts.code, tmp_path / "other.st", rank=2, seed=1).digest != expected
    is_due = checkpoints.Checkpoints.is_due

    def stopping(self: Any, step: int, steps: int) -> bool:
        if step == 3:
            raise KeyboardInterrupt
        return is_due(self, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "is_due", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(anchor, texts.code, tmp_path / "x.st", checkpoint_steps=1, rank=2)
    for rank in (None, 3):
        with pytest.raises(UsageError, match="that run had rank = 2"):
            train(anchor, texts.code, tmp_path / "x.st", checkpoint_steps=1, rank=rank, resume=True)
    assert train(anchor, texts.code, tmp_path / "x.st", checkpoint_steps=1, rank=2, resume=True).digest == expected


def test_a_low_rank_expert_merges_with_a_full_one_and_either_goes_again(
    tmp_path: Path, anchor: Path, texts: Any, experts: dict[str, Path]
) -> None:
    """Laws 1 and 2, and stock Transformers takes the result."""
    low = train(anchor, texts.sums, tmp_path / "low.st", name="low", rank=4).path
    full = experts["code"]

    def merged(name: str, *files: Path) -> Path:
        merge(MergeConfig(experts=files, anchor=anchor, output=tmp_path / name))
        return tmp_path / name

    both, alone, low_alone = merged("both", full, low), merged("full", full), merged("low", low)
    assert read_directory(merged("turned", low, full)) == read_directory(both)
    for gone, left in (("low", alone), ("code", low_alone)):
        remove(RemoveConfig(names=(gone,), source=both, output=tmp_path / f"without-{gone}"))
        assert read_directory(tmp_path / f"without-{gone}") == read_directory(left)
    assert stock_problems(both) == []


def test_dry_run_checks_and_writes_nothing(tmp_path: Path, anchor: Path, texts: Any) -> None:
    result = train(anchor, texts.code, None, dry_run=True)
    assert (result.path, result.digest, result.dry_run) == (tmp_path / "experts" / "code.st", None, True)
    assert result.anchor_digest == open_anchor(anchor).digest
    assert list(tmp_path.iterdir()) == []


def test_existing_expert_is_replaced_only_when_told(tmp_path: Path, anchor: Path, texts: Any) -> None:
    first = train(anchor, texts.code, tmp_path / "x.st")
    with pytest.raises(UsageError, match="exists") as caught:
        train(anchor, texts.code, tmp_path / "x.st", seed=1)
    assert "`overwrite`" in str(caught.value.hint)
    assert open_expert(tmp_path / "x.st").digest == first.digest
    second = train(anchor, texts.code, tmp_path / "x.st", seed=1, overwrite=True)
    assert open_expert(tmp_path / "x.st").digest == second.digest != first.digest


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"anchor": Path("nowhere")}, "nowhere"),
    ({"data": (Path("nowhere"),)}, "nowhere does not exist"),
    ({"name": "public"}, "public"),
    ({"name": "Not A Name"}, "Not A Name"),
    ({"expires": "next year"}, "expires: 'next year'"),
    ({"expires": "2027-02-30"}, "expires"),
    ({"public_mix": 1.0}, "public_mix"),
    ({"public_mix": -0.1}, "public_mix"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_steps": -1}, "max_steps"),
    ({"epochs": 0}, "epochs"),
    ({"lr": float("nan")}, "lr"),
    ({"seq_len": 0}, "seq_len"),
    ({"batch_tokens": 0}, "batch_tokens"),
    ({"micro_batch": 0}, "micro_batch"),
    ({"checkpoint_steps": 0}, "checkpoint_steps"),
    ({"threads": 0}, "threads"),
    ({"warmup_steps": -1}, "warmup_steps"),
    ({"own_covariance": -0.1}, "own_covariance"),
    ({"own_covariance": 1.0}, "own_covariance"),
    ({"rank": 0}, "rank: 0"),
    ({"rank": 20}, "rank: 20 is no smaller than full matrices of 48 x 32; the highest that is smaller is 19"),
    ({"rank": 1000}, "the highest that is smaller is 19"),
    ({"public_match": -1.0}, "public_match"),
    ({"router": "magic"}, "router"),
    ({"router": "missing.st"}, "missing.st"),
    ({"router": "encoder"}, "encoder"),
    ({"public": Path("nowhere")}, "nowhere does not exist"),
    ({"device": "toaster"}, "device"),
    ({"dtype": "int4"}, "dtype"),
]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("settings", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_wrong_settings_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, anchor: Path, texts: Any, settings: dict[str, Any], says: str, dry_run: bool
) -> None:
    defaults = {"data": (texts.code,), "anchor": anchor, "dry_run": dry_run, **SMALL}
    with pytest.raises(FlexctlError) as caught:
        train_expert(TrainExpertConfig(**{**defaults, **settings}))
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2
    assert list(tmp_path.rglob("*")) == []


def test_too_little_text_is_refused(tmp_path: Path, anchor: Path) -> None:
    (tmp_path / "a.txt").write_text("too short")
    with pytest.raises(UsageError, match="do not fill one sequence"):
        train(anchor, tmp_path / "a.txt", tmp_path / "out" / "x.st")
    assert not (tmp_path / "out").exists()


def test_an_expert_among_its_own_text_is_refused(tmp_path: Path, anchor: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a few words")
    for dry_run in (False, True):
        with pytest.raises(UsageError, match="would be among the text of") as caught:
            train(anchor, tmp_path / "corpus", tmp_path / "corpus" / "made" / "x.st", dry_run=dry_run)
        assert caught.value.field == "output"
    assert not (tmp_path / "corpus" / "made").exists()


def test_diverging_run_is_refused_and_writes_no_expert(tmp_path: Path, anchor: Path, texts: Any) -> None:
    with pytest.raises(FlexctlError, match=r"loss became|NaN|infinity") as caught:
        train(anchor, texts.code, tmp_path / "x.st", lr=1e30, warmup_steps=0)
    assert caught.value.exit_code in (1, 3)
    assert not (tmp_path / "x.st").exists()


def test_frozen_tensors_that_moved_are_noticed(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law 4: nothing is written."""
    round_weights = pair.Pair.round_weights

    def moving(self: pair.Pair, *given: Any) -> Any:
        with torch.no_grad():
            frozen.model.norm.weight[0] += 1e-6
        return round_weights(self, *given)

    built: list[Any] = []
    adding = pair.add_expert

    def watching(model: Any, *about: Any) -> Any:
        nonlocal frozen
        frozen = model
        built.append(model)
        return adding(model, *about)

    frozen: Any = None
    monkeypatch.setattr(pair, "add_expert", watching)
    monkeypatch.setattr(pair.Pair, "round_weights", moving)
    with pytest.raises(FlexctlError, match=r"1 frozen tensors moved in training, model\.norm\.weight"):
        train(anchor, texts.code, tmp_path / "x.st")
    assert built
    assert not (tmp_path / "x.st").exists()


def test_training_says_nothing_without_a_reporter(
    tmp_path: Path,
    anchor: Path,
    texts: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capfd.readouterr()
    train(anchor, texts.code, tmp_path / "x.st")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_training_in_bfloat16_writes_the_anchor_s_dtype(tmp_path: Path, anchor: Path, texts: Any) -> None:
    result = train(anchor, texts.code, tmp_path / "code.st", dtype="bfloat16", lr=5e-3, max_steps=12)
    expert = open_expert(result.path)
    assert {info.dtype for info in expert.manifest.tensors.values()} == {"F32"}
    assert result.held_out["own"]["after"] < result.held_out["own"]["before"]


@pytest.mark.parametrize("rank", [None, 2])
def test_recomputing_layers_keeps_less_and_changes_nothing(
    tmp_path: Path,
    anchor: Path,
    texts: Any,
    monkeypatch: pytest.MonkeyPatch,
    rank: int | None,
    attending: dict[str, Any],
) -> None:
    expected = train(anchor, texts.code, tmp_path / "kept.st", name="x", rank=rank, **attending)
    forwards: list[bool] = []
    run = recompute._run

    def watching(*given: Any, **named: Any) -> Any:
        forwards.append(torch.is_grad_enabled())
        return run(*given, **named)

    monkeypatch.setattr(recompute, "_run", watching)
    found = train(anchor, texts.code, tmp_path / "recomputed.st", name="x", rank=rank, recompute=True, **attending)
    assert found.digest == expected.digest
    assert forwards.count(True) == 2 * 6


@pytest.mark.parametrize("rank", [None, 2])
def test_kernels_train_the_same_and_the_run_says_so(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, rank: int | None
) -> None:
    plain = train(anchor, texts.code, tmp_path / "plain.st", name="x", rank=rank)
    assert json.loads((tmp_path / "plain.run.json").read_text())["kernels"] is None
    asked_for = []

    def find(device: torch.device, autocast: torch.dtype | None, _reporter: Any) -> Any:
        asked_for.append((device.type, autocast))
        return standin.kernels()

    monkeypatch.setattr("flexctl.model.find_kernels", find, raising=False)
    listener = Listener()
    settings: dict[str, Any] = {**SMALL, "data": (texts.code,), "anchor": anchor, "name": "x", "rank": rank}
    found = train_expert(TrainExpertConfig(output=tmp_path / "x.st", **settings), listener)
    assert asked_for == [("cpu", None)]
    assert "a stand-in runs rotary embeddings, networks and loss" in listener.notes
    assert json.loads((tmp_path / "x.run.json").read_text())["kernels"] == "a stand-in"
    assert found.frozen_verified
    assert found.final_loss == pytest.approx(plain.final_loss, rel=1e-5)
    assert found.held_out["own"]["after"] == pytest.approx(plain.held_out["own"]["after"], rel=1e-4)
    resumed = train_expert(TrainExpertConfig(output=tmp_path / "x.st", resume=True, **settings), SILENT)
    assert resumed.digest == found.digest


def test_several_processes_ask_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexctl.model.find_kernels", lambda *_: standin.kernels(), raising=False)
    for size, name in ((1, "a stand-in"), (2, None)):
        machine = SimpleNamespace(device=torch.device("cuda"), autocast=torch.bfloat16)
        given: Any = SimpleNamespace(world=SimpleNamespace(size=size), machine=machine, reporter=SILENT)
        kernels = open_run._kernels(given)
        assert (kernels and kernels.name) == name


def test_a_run_goes_on_where_kernels_are_installed_and_were_not(
    anchor: Path, texts: Any, killed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexctl.model.find_kernels", lambda *_: standin.kernels(), raising=False)
    listener = Listener()
    settings: dict[str, Any] = {**SMALL, "data": (texts.code,), "anchor": anchor, "output": killed}
    result = train_expert(TrainExpertConfig(resume=True, **settings), listener)
    assert result.steps == 6
    assert any("after step 4" in note for note in listener.notes)
    assert "a stand-in runs rotary embeddings, networks and loss" in listener.notes
