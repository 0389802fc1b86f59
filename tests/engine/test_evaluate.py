"""evaluate: any bundle by the same rule, agreeing with stock Transformers; leaving out equals removing."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import math
import shutil
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from flexctl.bundle import open_anchor, open_expert, open_merged
from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.model.building import build_model, load_tokenizer
from flexctl.runtime import SilentReporter
from flexctl.text.documents import read_documents
from flexctl.text.tokens import frame_documents

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "flexctl/scores"


class Listener(SilentReporter):
    """Keeps what it hears; with ``stop``, is interrupted when a task of this title begins."""

    def __init__(self, stop: str | None = None) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.scored: list[str] = []
        self._stop = stop

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, title: str, total: float, unit: str) -> Any:
        if title == self._stop:
            raise KeyboardInterrupt
        if title.startswith("scoring "):
            self.scored.append(title.removeprefix("scoring "))
        return super().progress(title, total, unit)


def domains(texts: Any) -> tuple[str, ...]:
    return (f"public={texts.public_test}", f"code={texts.code_test}", f"sums={texts.sums_test}")


def score(bundle: Path, texts: Any, **settings: Any) -> EvaluateResult:
    defaults = {"data": domains(texts), "seq_len": 64, "threads": 1}
    return evaluate(EvaluateConfig(bundle=bundle, **{**defaults, **settings}))


def nll(result: EvaluateResult) -> dict[str, float]:
    return {name: figures.nll for name, figures in result.perplexity.items()}


@torch.no_grad()
def stock_nll(directory: Path, texts: Iterable[str], seq_len: int) -> float:
    """By stock Transformers, a window at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    total, targets = 0.0, 0
    for document in frame_documents(load_tokenizer(directory), texts):
        tokens = torch.from_numpy(document.tokens)
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            logits = model(window[None, :-1]).logits[0]
            total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            targets += len(window) - 1
    return total / targets


@pytest.mark.parametrize("seq_len", [16, 5000])
def test_anchor_and_merged_model_score_as_stock_software_scores_them(
    anchor: Path, merged: Path, texts: Any, seq_len: int
) -> None:
    for directory in (anchor, merged):
        found = nll(score(directory, texts, seq_len=seq_len))
        for name, folder in (("public", texts.public_test), ("code", texts.code_test)):
            expected = stock_nll(directory, read_documents([folder]), seq_len)
            assert found[name] == pytest.approx(expected, abs=1e-5)


def test_figures_are_of_the_documents(anchor: Path, texts: Any) -> None:
    result = score(anchor, texts)
    documents = list(read_documents([texts.code_test]))
    figures = result.perplexity["code"]
    assert figures.documents == len(documents) == 8
    assert figures.bytes == sum(len(text.encode()) for text in documents)
    framed = list(frame_documents(load_tokenizer(anchor), documents))
    assert figures.tokens == sum(len(document.tokens) - 1 for document in framed)
    assert figures.perplexity == pytest.approx(math.exp(figures.nll))
    assert figures.bits_per_byte == pytest.approx(figures.nll * figures.tokens / math.log(2) / figures.bytes)
    assert list(result.perplexity) == ["public", "code", "sums"]


def test_batch_size_does_not_matter(merged: Path, texts: Any, empty_cache: Path) -> None:
    one = score(merged, texts, forward_tokens=1)
    shutil.rmtree(empty_cache)
    other = score(merged, texts, forward_tokens=100_000)
    assert nll(one) == pytest.approx(nll(other), abs=1e-5)


def test_anchor_alone(anchor: Path, texts: Any) -> None:
    result = score(anchor, texts)
    assert (result.path, result.digest) == (anchor, open_anchor(anchor).digest)
    assert (result.experts, result.without, result.num_experts_per_tok) == (["public"], [], 1)
    assert result.routing == {name: {"public": 1.0} for name in ("public", "code", "sums")}


def test_expert_beside_its_anchor(anchor: Path, experts: dict[str, Path], texts: Any) -> None:
    alone = nll(score(anchor, texts))
    result = score(experts["code"], texts, anchor=anchor)
    assert (result.path, result.digest) == (experts["code"], open_expert(experts["code"]).digest)
    assert (result.experts, result.num_experts_per_tok) == (["public", "code"], 2)
    assert nll(result)["code"] < alone["code"] - 0.02
    assert result.routing["code"]["code"] > result.routing["public"]["code"]
    left = score(experts["code"], texts, anchor=anchor, without=("code",))
    assert nll(left) == pytest.approx(alone, abs=1e-5)


def test_expert_finds_its_anchor_in_the_workspace(
    tmp_path: Path, anchor: Path, merged: Path, experts: dict[str, Path], texts: Any
) -> None:
    (tmp_path / "flexctl.toml").write_text(f'[workspace]\nanchor = "{anchor}"\nmerged = "{merged}"\n')
    expected = score(experts["code"], texts, anchor=anchor)
    assert nll(score(experts["code"], texts)) == nll(expected)
    found = evaluate(EvaluateConfig(data=domains(texts), seq_len=64))
    assert (found.path, found.digest) == (merged, open_merged(merged).digest)


def test_merged_model(merged: Path, anchor: Path, texts: Any) -> None:
    result = score(merged, texts)
    assert (result.digest, result.experts) == (open_merged(merged).digest, ["public", "code", "sums"])
    assert result.num_experts_per_tok == 3
    for shares in result.routing.values():
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-6)
    for name in ("code", "sums"):
        assert max(result.routing, key=lambda domain: result.routing[domain][name]) == name
        assert nll(result)[name] < nll(score(anchor, texts))[name] - 0.02
    assert result.post_norm_ratio is not None
    assert len(result.post_norm_ratio) == 2
    assert all(ratio > 0 for ratio in result.post_norm_ratio)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_leaving_out_equals_removing(
    tmp_path: Path, anchor: Path, experts: dict[str, Path], texts: Any, top_k: int
) -> None:
    """Law 9 through files: k = min(requested, remaining) both ways, and merging without the expert is the same."""
    whole = tmp_path / "merged"
    merge(MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=whole, top_k=top_k))
    left_out = score(whole, texts, without=("code",))
    remove(RemoveConfig(names=("code",), source=whole, output=tmp_path / "removed"))
    removed = score(tmp_path / "removed", texts)
    assert left_out.num_experts_per_tok == removed.num_experts_per_tok == min(top_k, 2)
    assert nll(left_out) == pytest.approx(nll(removed), abs=1e-5)
    assert left_out.without == ["code"]
    assert left_out.experts == ["public", "code", "sums"]
    for name, shares in left_out.routing.items():
        assert shares["code"] == 0.0
        assert shares["sums"] == pytest.approx(removed.routing[name]["sums"], abs=1e-5)


def test_windows_longer_than_the_model_is_made_for_are_warned_of(merged: Path, texts: Any) -> None:
    listener = Listener()
    evaluate(EvaluateConfig(data=domains(texts)[:1], bundle=merged, seq_len=129), listener)
    assert listener.warnings == ["a sequence has 129 tokens; the model is made for 128 (max_position_embeddings)"]


def test_top_k_is_obeyed_and_clamped_with_a_warning(merged: Path, texts: Any) -> None:
    found = {k: score(merged, texts, top_k=k) for k in (1, 2, 3)}
    assert [result.num_experts_per_tok for result in found.values()] == [1, 2, 3]
    assert nll(found[1]) != nll(found[2]) != nll(found[3])
    listener = Listener()
    config = EvaluateConfig(data=domains(texts), bundle=merged, seq_len=64, top_k=9, without=("sums",))
    result = evaluate(config, listener)
    assert result.num_experts_per_tok == 2
    assert len(listener.warnings) == 1
    assert "`top_k`: 9" in listener.warnings[0]


def test_bfloat16_is_near_float32(merged: Path, texts: Any) -> None:
    exact, rounded = (nll(score(merged, texts, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rounded == pytest.approx(exact, abs=0.02)
    assert rounded != exact


def bits(result: EvaluateResult) -> dict[str, float]:
    return {name: figures.bits_per_byte for name, figures in result.perplexity.items()}


def test_ablation_and_sweep_are_the_runs_that_they_stand_for(merged: Path, texts: Any, empty_cache: Path) -> None:
    found = score(merged, texts, ablate=True, sweep_top_k=True)
    shutil.rmtree(empty_cache)
    for name in ("code", "sums"):
        assert found.ablation[name] == bits(score(merged, texts, without=(name,)))
    for k in (1, 2, 3):
        assert found.top_k[k] == bits(score(merged, texts, top_k=k))
    assert (list(found.ablation), list(found.top_k)) == (["code", "sums"], [1, 2, 3])
    assert found.ablation["code"]["code"] > bits(found)["code"] + 0.02


def test_what_is_left_out_stays_out_of_the_ablation(merged: Path, texts: Any) -> None:
    listener = Listener()
    settings = {"without": ("code",), "top_k": 1, "ablate": True, "sweep_top_k": True, "seq_len": 64}
    found = evaluate(EvaluateConfig(data=(f"a={texts.code_test}",), bundle=merged, **settings), listener)
    assert (list(found.ablation), list(found.top_k)) == (["sums"], [1, 2])
    assert found.top_k[1] == bits(found)
    once = ["a without code, 1 active", "a without code, sums, 1 active", "a without code, 2 active"]
    assert listener.scored == once


def test_intervals_are_those_of_the_documents(merged: Path, texts: Any) -> None:
    found = score(merged, texts)
    for figures in found.perplexity.values():
        low, high = figures.bits_per_byte_low, figures.bits_per_byte_high
        assert low is not None
        assert high is not None
        assert low < figures.bits_per_byte < high < low + 0.5
    (one,) = score(merged, texts, data=(f"a={texts.code_test / '000.py'}",)).perplexity.values()
    assert (one.bits_per_byte_low, one.bits_per_byte_high) == (None, None)


def test_routing_layer_by_layer(merged: Path, texts: Any) -> None:
    found = score(merged, texts)
    for domain, experts in found.routing_layers.items():
        assert [sum(layer) for layer in zip(*experts.values(), strict=True)] == pytest.approx([1, 1], abs=1e-9)
        for name, shares in experts.items():
            assert sum(shares) / 2 == pytest.approx(found.routing[domain][name], abs=1e-9)


def test_agreement_is_told_where_experts_are_cut(merged: Path, texts: Any) -> None:
    assert score(merged, texts).router_agreement == {}
    found = score(merged, texts, top_k=1).router_agreement
    assert list(found) == ["public", "code", "sums"]
    assert all(0.9 < share <= 1 for share in found.values())


def test_a_model_beside_itself_does_not_differ(merged: Path, texts: Any) -> None:
    found = score(merged, texts, compare=merged).compare
    assert found is not None
    assert (found.path, found.digest, found.moved) == (merged, open_merged(merged).digest, [])
    for row in found.domains.values():
        assert (row.difference, row.difference_low, row.difference_high) == (0.0, 0.0, 0.0)
        assert (row.documents_better, row.documents_worse) == (0, 0)


def test_comparison_with_the_anchor(merged: Path, anchor: Path, texts: Any) -> None:
    found = score(merged, texts, compare=anchor)
    alone = bits(score(anchor, texts))
    assert found.compare is not None
    for name, row in found.compare.domains.items():
        assert row.bits_per_byte == alone[name]
        assert row.difference == bits(found)[name] - alone[name]
        assert row.difference_low is not None
        assert row.difference_high is not None
        assert row.difference_low <= row.difference <= row.difference_high
    assert found.compare.domains["code"].documents_better == 8
    assert found.compare.moved[0].words


def test_of_two_models_one_at_a_time_is_in_memory(
    merged: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexctl.evaluation import passes

    models: list[weakref.ref[Any]] = []

    def build(*given: Any, **settings: Any) -> Any:
        gc.collect()
        assert all(model() is None for model in models)
        model = build_model(*given, **settings)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(passes, "build_model", build)
    score(merged, texts, compare=anchor, ablate=True)
    assert len(models) == 2


def test_a_line_a_document(tmp_path: Path, merged: Path, texts: Any) -> None:
    file = tmp_path / "new/samples.jsonl"
    found = score(merged, texts, samples=file)
    assert found.samples == file
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for name, folder in (("public", texts.public_test), ("code", texts.code_test), ("sums", texts.sums_test)):
        mine, figures = [record for record in records if record["domain"] == name], found.perplexity[name]
        documents = list(read_documents([folder]))
        assert [record["index"] for record in mine] == list(range(8))
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in documents]
        assert [record["sha256"] for record in mine] == hashes
        assert [record["bytes"] for record in mine] == [len(text.encode()) for text in documents]
        assert sum(record["tokens"] for record in mine) == figures.tokens
        total = sum(record["nll"] * record["tokens"] for record in mine)
        assert total == pytest.approx(figures.nll * figures.tokens)
        bits_total = sum(record["bits_per_byte"] * record["bytes"] for record in mine)
        assert bits_total == pytest.approx(figures.bits_per_byte * figures.bytes)
        for expert, share in found.routing[name].items():
            weighted = sum(record["experts"][expert] * record["tokens"] for record in mine)
            assert weighted / figures.tokens == pytest.approx(share, abs=1e-9)
        assert not any(text[:40] in file.read_text() for text in documents)


def test_samples_replace_nothing_unasked(tmp_path: Path, merged: Path, texts: Any) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_text("precious")
    listener = Listener()
    config = EvaluateConfig(data=domains(texts), bundle=merged, seq_len=64, samples=file)
    with pytest.raises(UsageError, match=r"samples: .*samples\.jsonl exists"):
        evaluate(config, listener)
    assert (listener.scored, file.read_text()) == ([], "precious")
    score(merged, texts, samples=file, overwrite=True)
    assert len(file.read_text().splitlines()) == 24


class TestCache:
    """A pass is scored again when, and only when, something that decides its figures changed."""

    @pytest.fixture
    def mine(self, tmp_path: Path, merged: Path, texts: Any) -> dict[str, Any]:
        shutil.copytree(merged, tmp_path / "merged")
        shutil.copytree(texts.code_test, tmp_path / "code")
        shutil.copytree(texts.sums_test, tmp_path / "sums")
        return {"data": ("code=code", "sums=sums"), "bundle": Path("merged"), "seq_len": 64, "threads": 1}

    def scored(self, mine: dict[str, Any], **settings: Any) -> list[str]:
        listener = Listener()
        evaluate(EvaluateConfig(**{**mine, **settings}), listener)
        return listener.scored

    def test_a_repetition_builds_no_model(self, mine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        from flexctl.evaluation import passes

        first = evaluate(EvaluateConfig(**mine))
        monkeypatch.setattr(passes, "build_model", None)
        monkeypatch.setattr(passes, "load_tokenizer", None)
        listener = Listener()
        again = evaluate(EvaluateConfig(**mine), listener)
        assert dataclasses.replace(again, peak_rss_bytes=0) == dataclasses.replace(first, peak_rss_bytes=0)
        assert listener.notes == [
            "all 2 passes are from the cache: model, text and settings are those of an earlier run"
        ]
        assert self.scored(mine, forward_tokens=77, threads=1) == []

    def test_more_is_asked_for_later(self, mine: dict[str, Any]) -> None:
        assert self.scored(mine) == ["code, 3 active", "sums, 3 active"]
        without = ["code without code", "sums without code", "code without sums", "sums without sums"]
        assert self.scored(mine, ablate=True) == [f"{title}, 2 active" for title in without]
        swept = ["code, 1 active", "sums, 1 active", "code, 2 active", "sums, 2 active"]
        assert self.scored(mine, ablate=True, sweep_top_k=True) == swept

    @pytest.mark.parametrize("change", [{"seq_len": 32}, {"dtype": "bfloat16"}, {"top_k": 2}, {"without": ("code",)}])
    def test_other_settings(self, mine: dict[str, Any], change: dict[str, Any]) -> None:
        self.scored(mine)
        assert len(self.scored(mine, **change)) == 2

    def test_another_byte_of_text(self, mine: dict[str, Any]) -> None:
        self.scored(mine)
        file = Path("code/003.py")
        file.write_text(file.read_text().replace("return", "retern", 1))
        assert self.scored(mine) == ["code, 3 active"]

    def test_the_same_text_elsewhere(self, mine: dict[str, Any]) -> None:
        self.scored(mine)
        Path("code").rename("moved")
        assert self.scored(mine, data=("other=moved",)) == []

    def test_another_model(self, mine: dict[str, Any], anchor: Path, experts: dict[str, Path]) -> None:
        self.scored(mine)
        assert len(self.scored(mine, bundle=anchor)) == 2
        assert len(self.scored(mine, bundle=experts["code"], anchor=anchor)) == 2
        assert len(self.scored(mine, bundle=experts["sums"], anchor=anchor)) == 2

    def test_another_byte_of_the_model_is_refused(self, mine: dict[str, Any]) -> None:
        self.scored(mine)
        file = Path("merged/model-expert-code.safetensors")
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
        with pytest.raises(BundleError, match=r"model-expert-code\.safetensors: tensor") as caught:
            self.scored(mine)
        assert caught.value.exit_code == 3

    def test_other_software(self, mine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        from flexctl.evaluation import passes

        self.scored(mine)
        monkeypatch.setattr(passes, "software_versions", lambda: {"torch": "0.0.1"})
        assert len(self.scored(mine)) == 2

    def test_an_interrupted_run_goes_on(self, mine: dict[str, Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            evaluate(EvaluateConfig(**mine, ablate=True), Listener(stop="scoring code without sums, 2 active"))
        listener = Listener()
        evaluate(EvaluateConfig(**mine, ablate=True), listener)
        assert listener.scored == ["code without sums, 2 active", "sums without sums, 2 active"]
        assert listener.notes[0].startswith("4 of 6 passes are from the cache")

    def test_text_that_changes_meanwhile_is_refused(self, mine: dict[str, Any], empty_cache: Path) -> None:
        class Meddler(Listener):
            def progress(self, title: str, total: float, unit: str) -> Any:
                if title.startswith("scoring sums"):
                    Path("sums/more.txt").write_text("more")
                return super().progress(title, total, unit)

        with pytest.raises(UsageError, match="sums changed while it was read"):
            evaluate(EvaluateConfig(**mine), Meddler())
        assert len(list(empty_cache.iterdir())) == 1


def test_a_dry_run_scores_and_writes_nothing(tmp_path: Path, merged: Path, texts: Any, empty_cache: Path) -> None:
    listener = Listener()
    settings = {"ablate": True, "compare": merged, "samples": Path("s.jsonl"), "dry_run": True, "seq_len": 64}
    found = evaluate(EvaluateConfig(bundle=merged, data=domains(texts), **settings), listener)
    assert (found.dry_run, found.passes, list(found.data)) == (True, 12, ["public", "code", "sums"])
    assert (found.perplexity, found.results, listener.scored) == ({}, None, [])
    assert list(tmp_path.iterdir()) == []
    assert not empty_cache.exists()


def test_time_left_counts_text_scored_and_the_passes_to_come(merged: Path, texts: Any) -> None:
    class Bars(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.bars: list[list[float]] = []

        @contextmanager
        def progress(self, title: str, total: float, unit: str) -> Iterator[Any]:
            assert unit in ("bytes", "files")
            if title.startswith("scoring "):
                self.bars.append([total])
            yield self

        def advance(self, amount: float) -> None:
            if self.bars:
                self.bars[-1].append(amount)

    bars = Bars()
    data = (f"code={texts.code_test}",)
    settings = {"ablate": True, "seq_len": 64, "forward_tokens": 64, "threads": 1}
    size = evaluate(EvaluateConfig(bundle=merged, data=data, **settings), bars).perplexity["code"].bytes
    assert [(total, before) for total, before, *_ in bars.bars] == [
        (3 * size, 0),
        (3 * size, size),
        (3 * size, 2 * size),
    ]
    for _, _, *steps in bars.bars:
        assert sum(steps) == pytest.approx(size)
        assert len(steps) > 10


class TestResults:
    """results.json beside the bundle: figures, digests and settings, and nothing that is private or varies."""

    @pytest.fixture
    def mine(self, tmp_path: Path, merged: Path, texts: Any) -> dict[str, Any]:
        shutil.copytree(merged, tmp_path / "merged", ignore=shutil.ignore_patterns("results.json"))
        return {"data": (f"code={texts.code_test}",), "bundle": Path("merged"), "seq_len": 64}

    def test_what_stands_there(self, mine: dict[str, Any], anchor: Path) -> None:
        found = evaluate(EvaluateConfig(**mine, ablate=True, sweep_top_k=True, compare=anchor))
        assert found.results == Path("merged/results.json")
        text = found.results.read_text()
        results = json.loads(text)
        assert results["digest"] == open_merged(Path("merged")).digest
        assert results["settings"] == {"seq_len": 64, "device": "cpu", "dtype": "float32", "special_as_text": False}
        assert results["software"]["torch"]
        assert results["data"] == found.data
        assert results["perplexity"]["code"] == dataclasses.asdict(found.perplexity["code"])
        assert results["ablation"] == found.ablation
        assert list(results["top_k"]) == ["1", "2", "3"]
        assert results["compare"]["digest"] == open_anchor(anchor).digest
        assert found.compare is not None
        assert not any(moved.words in text for moved in found.compare.moved)
        assert str(Path.cwd()) not in text
        assert str(anchor) not in text

    def test_the_same_figures_are_the_same_bytes(self, mine: dict[str, Any], empty_cache: Path) -> None:
        evaluate(EvaluateConfig(**mine))
        first = Path("merged/results.json").read_bytes()
        shutil.rmtree(empty_cache)
        evaluate(EvaluateConfig(**mine))
        assert Path("merged/results.json").read_bytes() == first

    def test_the_bundle_still_verifies(self, mine: dict[str, Any]) -> None:
        evaluate(EvaluateConfig(**mine))
        assert verify(VerifyConfig(path=Path("merged"))).ok

    def test_beside_an_expert(
        self, tmp_path: Path, experts: dict[str, Path], anchor: Path, mine: dict[str, Any]
    ) -> None:
        expert = Path(shutil.copy(experts["code"], tmp_path))
        found = evaluate(EvaluateConfig(**{**mine, "bundle": expert, "anchor": anchor}))
        assert found.results == tmp_path / "code.results.json"
        assert json.loads(found.results.read_text())["digest"] == open_expert(expert).digest

    @pytest.mark.parametrize("change", [{"without": ("code",)}, {"top_k": 1}])
    def test_not_for_another_model_than_the_bundle(self, mine: dict[str, Any], change: dict[str, Any]) -> None:
        assert evaluate(EvaluateConfig(**mine, **change)).results is None
        assert not Path("merged/results.json").exists()

    def test_a_place_that_cannot_be_written_is_a_note(
        self, mine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from flexctl.evaluation import records

        def refuse(*_given: Any, **_settings: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(records, "new_file", refuse)
        listener = Listener()
        assert evaluate(EvaluateConfig(**mine), listener).results is None
        assert listener.notes == ["merged/results.json: is not written (Permission denied)"]


def test_jsonl_and_folder_of_the_same_text_score_the_same(tmp_path: Path, anchor: Path, texts: Any) -> None:
    lines = [json.dumps({"text": text}) for text in read_documents([texts.code_test])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    result = score(anchor, texts, data=(f"folder={texts.code_test}", f"lines={tmp_path / 'a.jsonl'}"))
    assert nll(result)["folder"] == pytest.approx(nll(result)["lines"], abs=1e-6)


def test_config_without_optional_fields(tmp_path: Path, checkpoint: Path, texts: Any) -> None:
    """A config.json that a person wrote may leave to the class what the class knows."""
    from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor

    source = tmp_path / "short"
    shutil.copytree(checkpoint, source)
    config = json.loads((source / "config.json").read_text())
    for name in ("rms_norm_eps", "max_position_embeddings", "rope_parameters", "initializer_range"):
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    path = tmp_path / "anchor"
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(source), output=path, sample_tokens=2000))
    result = score(path, texts, seq_len=None)
    assert result.post_norm_ratio is not None


def test_nothing_is_said_or_written(
    tmp_path: Path,
    merged: Path,
    texts: Any,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    capfd.readouterr()
    score(merged, texts)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"data": ("",)}, "is not NAME=PATH"),
    ({"data": ("=FOLDER",)}, "is not NAME=PATH"),
    ({"data": ("a=",)}, "is not NAME=PATH"),
    ({"data": ("FOLDER", "FOLDER")}, "'code-test' is given twice"),
    ({"data": ("a=FOLDER", "a=FOLDER")}, "'a' is given twice"),
    ({"data": ("a=nowhere",)}, "nowhere does not exist"),
    ({"data": ()}, "nothing to evaluate on"),
    ({"without": ("nobody",)}, "nobody"),
    ({"without": ("public",)}, "public"),
    ({"bundle": Path("nowhere")}, "nowhere"),
    ({"top_k": 0}, "top_k: 0 is not above 0"),
    ({"seq_len": 0}, "seq_len"),
    ({"forward_tokens": 0}, "forward_tokens"),
    ({"threads": 0}, "threads"),
    ({"device": "toaster"}, "device"),
    ({"dtype": "int4"}, "dtype"),
]


@pytest.mark.parametrize(("settings", "says"), REFUSALS, ids=[f"{i}" for i in range(len(REFUSALS))])
def test_wrong_settings_are_refused_in_one_line(merged: Path, texts: Any, settings: dict[str, Any], says: str) -> None:
    if "data" in settings:
        settings = {"data": tuple(item.replace("FOLDER", str(texts.code_test)) for item in settings["data"])}
    defaults = {"data": domains(texts), "bundle": merged}
    with pytest.raises(UsageError) as caught:
        evaluate(EvaluateConfig(**{**defaults, **settings}))
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_folder_without_text_is_refused(tmp_path: Path, anchor: Path, texts: Any) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(UsageError, match="no document with text"):
        score(anchor, texts, data=(f"a={tmp_path / 'blank.txt'}",))


def test_router_file_is_no_model(tmp_path: Path, anchor: Path, texts: Any) -> None:
    from flexctl.engine.embed_router import EmbedRouterConfig, embed_router

    embed_router(EmbedRouterConfig(data=(texts.code,), anchor=anchor, output=tmp_path / "rows.st"))
    with pytest.raises(UsageError, match="router file"):
        score(tmp_path / "rows.st", texts, anchor=anchor)


def test_expert_of_another_anchor_is_refused(
    tmp_path: Path, experts: dict[str, Path], checkpoint: Path, texts: Any
) -> None:
    from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor

    other = tmp_path / "other"
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source=str(checkpoint), output=other, sample_tokens=2000))
    with pytest.raises(BundleError, match=r"anchor\.digest") as caught:
        score(experts["code"], texts, anchor=other)
    assert caught.value.exit_code == 3


def test_directory_that_is_no_bundle_is_refused(checkpoint: Path, texts: Any) -> None:
    with pytest.raises(FlexctlError):
        score(checkpoint, texts)
