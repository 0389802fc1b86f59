"""evaluate --baselines: all that the ingredients allow, scored like the bundle; what is missing is named."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tiny
import torch
from classifier import fit_classifier, save_classifier
from upcycled import save_mixture, upcycle

from flexctl.bundle import open_merged
from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.errors import BundleError, UsageError
from flexctl.evaluation import scoring
from flexctl.evaluation.baselines import (
    CLASSIFIER_FILE,
    Baselines,
    Ingredients,
    PromptClassifier,
    comparing,
    find_ingredients,
    mixing,
    prompt,
)
from flexctl.evaluation.domains import Domain
from flexctl.model.building import build_model, load_tokenizer
from flexctl.routing.space import measure_documents
from flexctl.runtime import SILENT, Reporter, SilentReporter
from flexctl.text.documents import read_documents
from flexctl.text.tokens import Framed, frame_documents, frame_passages

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

Score = Callable[..., tuple[int, dict[str, Any]]]
"""Scores all baselines on one text: how many did not come from the cache, and the figures."""

ORACLES = ("weighted soup", "btm", "perplexity routing", "prompt routing")


def bundle_of(anchor: Path) -> Any:
    from flexctl.bundle import open_anchor

    return build_model(open_anchor(anchor).weights(), device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, anchor: Path, texts: Any) -> Path:
    """Two dense experts, an untrained mixture under the name of one that was trained, and a classifier."""
    root = tmp_path_factory.mktemp("dense")
    for name in ("code", "sums"):
        init_anchor(
            InitAnchorConfig(
                data=(getattr(texts, name),),
                source=str(anchor),
                output=root / name,
                anneal_tokens=6_000,
                sample_tokens=500,
                seq_len=64,
                batch_tokens=512,
                lr=2e-3,
                threads=1,
            )
        )
    model, tokenizer = bundle_of(anchor), load_tokenizer(anchor)
    embedded = {
        name: measure_documents(model, frame_passages(tokenizer, list(read_documents([getattr(texts, name)]))[:20]))
        for name in ("public", "code", "sums")
    }
    save_classifier(fit_classifier(embedded), root / CLASSIFIER_FILE)
    upcycle(model, 3, 2, seed=0)
    save_mixture(model, root / "unrestricted", tokenizer)
    return root


def compare(bundle: Path, folder: Path, texts: Any, reporter: Reporter = SILENT, **settings: Any) -> EvaluateResult:
    data = (f"public={texts.public_test}", f"code={texts.code_test}", f"sums={texts.sums_test}")
    config = {"data": data, "bundle": bundle, "seq_len": 64, "threads": 1, "baselines": folder}
    return evaluate(EvaluateConfig(**{**config, **settings}), reporter)


@pytest.fixture(scope="module")
def result(merged: Path, folder: Path, texts: Any) -> EvaluateResult:
    return compare(merged, folder, texts)


def test_every_baseline_is_there_and_the_missing_are_named(result: EvaluateResult) -> None:
    both = [f"{name}{suffix}" for suffix in ("", " oracle") for name in ORACLES]
    whole = ["public only", "dense code", "dense sums", "soup", "ties", "dare", "unrestricted"]
    assert set(result.baselines) == {*both, *whole}
    assert all(list(domains) == ["public", "code", "sums"] for domains in result.baselines.values())
    assert set(result.baselines_missing) == {"btx", "unrestricted-2x"}
    assert "docs/baselines.md" in result.baselines_missing["btx"]


def test_whole_models_score_as_evaluate_scores_them(
    result: EvaluateResult, anchor: Path, folder: Path, texts: Any
) -> None:
    for bundle, name in ((anchor, "public only"), (folder / "code", "dense code")):
        alone = compare(bundle, folder, texts, baselines=None).perplexity
        for domain, score in alone.items():
            assert result.baselines[name][domain] == pytest.approx(score.bits_per_byte, abs=1e-5)
    for domain, bits in result.baselines["public only"].items():
        assert result.baselines["unrestricted"][domain] == pytest.approx(bits, abs=0.01)


def test_each_dense_expert_is_best_at_home_and_routing_finds_it(result: EvaluateResult) -> None:
    found = result.baselines
    for home in ("code", "sums"):
        assert found[f"dense {home}"][home] < found["public only"][home] - 0.02
        best = min(found[name][home] for name in ("public only", "dense code", "dense sums"))
        assert best == found[f"dense {home}"][home]
        assert found["perplexity routing oracle"][home] <= best + 1e-6
        assert found["prompt routing oracle"][home] == pytest.approx(best, abs=0.02)
        assert found["public only"][home] > found["prompt routing"][home] >= found["prompt routing oracle"][home]
        assert found["btm oracle"][home] < found["btm"][home] + 1e-6
        assert found["weighted soup oracle"][home] < found["soup"][home]


def test_without_earlier_text_weights_are_equal_and_routes_are_public(merged: Path, folder: Path, texts: Any) -> None:
    found = compare(merged, folder, texts, seq_len=5_000).baselines
    assert found["weighted soup"] == pytest.approx(found["soup"], abs=1e-5)
    assert found["perplexity routing"] == found["prompt routing"] == found["public only"]
    assert found["btm"]["code"] < found["public only"]["code"]


def made_of(**changes: Any) -> Ingredients:
    """Ingredients in memory: an anchor, a dense expert, a mixture and a classifier, none of them trained."""
    config = tiny.dense_config()
    ingredients = {
        "anchor": tiny.make_weights(config),
        "dense": {"sums": tiny.make_weights(config, seed=1)},
        "mixtures": {"btx": tiny.make_weights(config, ("public", "expert-1"))},
        "classifier": classifier_of(0),
        "missing": {},
    }
    return Ingredients(**{**ingredients, **changes})


def classifier_of(seed: int) -> PromptClassifier:
    generator = torch.Generator().manual_seed(seed)
    return fit_classifier({name: torch.randn(9, 2, 32, generator=generator) for name in ("public", "sums")})


SETTINGS: dict[str, Any] = {
    "seq_len": 64,
    "batch_tokens": 512,
    "top_k": 1,
    "device": torch.device("cpu"),
    "dtype": torch.float32,
    "reporter": SILENT,
}


class TestCache:
    """A baseline is scored again when, and only when, something that decides its figures changed."""

    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    @pytest.fixture
    def domain(self, tmp_path: Path) -> Domain:
        domain = Domain(name="a", path=tmp_path / "a.txt")
        domain.path.write_text("1 + 1 = 2")
        return domain

    @pytest.fixture
    def score(self, tokenizer: Any, domain: Domain) -> Score:
        def score(ingredients: Ingredients, **changes: Any) -> tuple[int, dict[str, Any]]:
            baselines = Baselines(ingredients, tokenizer, **{**SETTINGS, **changes})
            found = baselines.score([domain])
            assert baselines.count == len(found) == 14
            return 14 - baselines.recalled, {name: row["a"].per_document.tolist() for name, row in found.items()}

        return score

    def test_a_repetition_builds_no_model(self, score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
        new, first = score(made_of())
        assert new == 14
        monkeypatch.setattr(comparing, "build_model", None)
        assert score(made_of(), batch_tokens=7) == (0, first)

    @pytest.mark.parametrize(
        ("ingredient", "scored_again"),
        [
            ({"mixtures": {"btx": tiny.make_weights(tiny.dense_config(), ("public", "expert-1"), top_k=1)}}, 1),
            ({"dense": {"sums": tiny.make_weights(tiny.dense_config(), seed=2)}}, 13),
            ({"classifier": classifier_of(1)}, 10),
        ],
    )
    def test_another_ingredient(self, score: Score, ingredient: dict[str, Any], scored_again: int) -> None:
        score(made_of())
        assert score(made_of(**ingredient))[0] == scored_again

    @pytest.mark.parametrize(
        ("setting", "scored_again"), [({"top_k": 2}, 10), ({"seq_len": 4}, 14), ({"dtype": torch.bfloat16}, 14)]
    )
    def test_another_setting(self, score: Score, setting: dict[str, Any], scored_again: int) -> None:
        score(made_of())
        assert score(made_of(), **setting)[0] == scored_again

    def test_another_temperature_and_other_software(self, score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
        score(made_of())
        monkeypatch.setattr(comparing, "TEMPERATURE", 0.2)
        assert score(made_of())[0] == 10
        monkeypatch.setattr(comparing, "software_versions", lambda: {"torch": "0.0.1"})
        assert score(made_of())[0] == 14

    def test_other_text(self, score: Score, domain: Domain) -> None:
        score(made_of())
        domain.path.write_text("1 + 2 = 3")
        assert score(made_of())[0] == 14

    def test_one_whole_model_at_a_time_is_in_memory(self, score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
        models: list[weakref.ref[Any]] = []
        alive = []

        def build(*given: Any, **settings: Any) -> Any:
            alive.append(sum(model() is not None for model in models))
            model = build_model(*given, **settings)
            models.append(weakref.ref(model))
            return model

        monkeypatch.setattr(comparing, "build_model", build)
        score(made_of())
        soup_ties_dare_and_btx, public_and_sums = [0, 0, 0, 0], [0, 1]
        assert alive == soup_ties_dare_and_btx + public_and_sums


def test_a_repeated_evaluation_takes_baselines_from_the_cache(
    merged: Path, folder: Path, texts: Any, result: EvaluateResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listener(SilentReporter):
        notes: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    monkeypatch.setattr(comparing, "build_model", None)
    assert compare(merged, folder, texts, Listener()).baselines == result.baselines
    whole, baselines = 3, 3 * 15
    assert Listener.notes[-1].startswith(f"all {whole + baselines} passes are from the cache")


def test_documents_are_read_anew_and_never_kept(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With passes that look at 16 windows at a time, no more than three times as many documents are in memory."""
    texts = tmp_path / "a.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{number} + 1 = {number + 1}"}) + "\n" for number in range(100)))
    in_memory: set[int] = set()
    counts: list[int] = []

    def watched(*given: Any) -> Iterator[Framed]:
        for document in frame_documents(*given):
            in_memory.add(len(counts))
            weakref.finalize(document.tokens, in_memory.discard, len(counts))
            counts.append(len(in_memory))
            yield document

    monkeypatch.setattr(comparing, "frame_documents", watched)
    for module, name in ((scoring, "_SORTED_TOGETHER"), (mixing, "_TOGETHER"), (prompt, "_TOGETHER")):
        monkeypatch.setattr(module, name, 16)
    found = Baselines(made_of(mixtures={}), tokenizer, **SETTINGS).score([Domain(name="a", path=texts)])
    assert len(found) == 13
    cut, whole, alone, mixed, embedded = 1, 3, 2, 4, 1
    assert len(counts) == 100 * (cut + whole + alone + mixed + embedded)
    assert 16 <= max(counts) <= 48


def test_experts_left_out_of_the_bundle_are_left_out_of_the_baselines(merged: Path, folder: Path, texts: Any) -> None:
    found = compare(merged, folder, texts, without=("sums",), data=(f"code={texts.code_test}",))
    assert "dense sums" not in found.baselines
    assert found.baselines["soup"]["code"] < found.baselines["public only"]["code"]


def test_anchor_is_compared_with_every_dense_expert(anchor: Path, folder: Path, texts: Any) -> None:
    found = compare(anchor, folder, texts, data=(f"code={texts.code_test}",))
    assert {"dense code", "dense sums", "soup"} <= set(found.baselines)


def test_what_lacks_an_ingredient_is_missing(tmp_path: Path, merged: Path, folder: Path, texts: Any) -> None:
    some = tmp_path / "some"
    shutil.copytree(folder / "code", some / "code")
    found = compare(merged, some, texts, data=(f"code={texts.code_test}",))
    assert set(found.baselines) == {"public only", "dense code"}
    assert found.baselines_missing["dense sums"].startswith("flexctl init-anchor ANCHOR --data TEXT --anneal-tokens N")
    assert {"btx", "unrestricted", "unrestricted-2x", "prompt routing"} < set(found.baselines_missing)
    assert compare(merged, some, texts, baselines=None, data=(f"code={texts.code_test}",)).baselines_missing == {}


def test_wrong_folders_are_refused(tmp_path: Path, merged: Path, folder: Path, texts: Any) -> None:
    with pytest.raises(UsageError, match="nowhere is no directory"):
        compare(merged, tmp_path / "nowhere", texts)
    swapped = tmp_path / "swapped"
    shutil.copytree(folder / "unrestricted", swapped / "code")
    with pytest.raises(BundleError, match="expected a dense model in a folder of this name"):
        compare(merged, swapped, texts)
    other = tmp_path / "other"
    shutil.copytree(folder / "code", other / "code")
    words = json.loads((other / "code" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "code" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(BundleError, match="its vocabulary is not the anchor's"):
        compare(merged, other, texts)
    few = tmp_path / "few"
    few.mkdir()
    generator = torch.Generator().manual_seed(0)
    classifier = fit_classifier({n: torch.randn(9, 2, 32, generator=generator) for n in ("public", "code")})
    save_classifier(classifier, few / CLASSIFIER_FILE)
    with pytest.raises(BundleError, match="tells public, code apart; expected public, code, sums"):
        find_ingredients(few, open_merged(merged).weights(), ["public", "code", "sums"], merged)


def test_command_shows_the_table(merged: Path, folder: Path, texts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from flexctl.cli.app import main

    arguments = [str(merged), "--data", f"code={texts.code_test}", "--seq-len", "64", "--baselines", str(folder), "-q"]
    assert main(["evaluate", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "this bundle" in shown
    assert "btm oracle" in shown
    assert "missing: btx" in shown
