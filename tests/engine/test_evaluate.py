"""evaluate: any bundle by the same rule, agreeing with stock Transformers; leaving out equals removing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
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
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.model.building import load_tokenizer
from flexctl.runtime import SilentReporter
from flexctl.training.documents import read_documents
from flexctl.training.tokens import frame_documents

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


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
            assert found[name] == pytest.approx(expected, abs=1e-4)


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


def test_batch_size_does_not_matter(merged: Path, texts: Any) -> None:
    one, other = (score(merged, texts, batch_tokens=size) for size in (1, 100_000))
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


def test_top_k_is_obeyed_and_clamped_with_a_warning(merged: Path, texts: Any) -> None:
    found = {k: score(merged, texts, top_k=k) for k in (1, 2, 3)}
    assert [result.num_experts_per_tok for result in found.values()] == [1, 2, 3]
    assert nll(found[1]) != nll(found[2]) != nll(found[3])
    listener = Listener()
    config = EvaluateConfig(data=domains(texts), bundle=merged, seq_len=64, top_k=9, without=("sums",))
    result = evaluate(config, listener)
    assert result.num_experts_per_tok == 2
    assert len(listener.warnings) == 1
    assert "--top-k: 9" in listener.warnings[0]


def test_bfloat16_is_near_float32(merged: Path, texts: Any) -> None:
    exact, rounded = (nll(score(merged, texts, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rounded == pytest.approx(exact, abs=0.02)
    assert rounded != exact


def test_jsonl_and_folder_of_the_same_text_score_the_same(tmp_path: Path, anchor: Path, texts: Any) -> None:
    lines = [json.dumps({"text": text}) for text in read_documents([texts.code_test])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    result = score(anchor, texts, data=(f"folder={texts.code_test}", f"lines={tmp_path / 'a.jsonl'}"))
    assert nll(result)["folder"] == pytest.approx(nll(result)["lines"], abs=1e-6)


def test_config_without_optional_fields(tmp_path: Path, checkpoint: Path, texts: Any) -> None:
    """A config.json that a person wrote may leave to the class what the class knows."""
    import shutil

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
    ({"data": ("FOLDER",)}, "is not NAME=PATH"),
    ({"data": ("=FOLDER",)}, "is not NAME=PATH"),
    ({"data": ("a=",)}, "is not NAME=PATH"),
    ({"data": ("a=FOLDER", "a=FOLDER")}, "'a' is given twice"),
    ({"data": ("a=nowhere",)}, "nowhere does not exist"),
    ({"data": ()}, "nothing to evaluate on"),
    ({"without": ("nobody",)}, "nobody"),
    ({"without": ("public",)}, "public"),
    ({"bundle": Path("nowhere")}, "nowhere"),
    ({"top_k": 0}, "--top-k: 0 is not above 0"),
    ({"seq_len": 0}, "--seq-len"),
    ({"batch_tokens": 0}, "--batch-tokens"),
    ({"threads": 0}, "--threads"),
    ({"device": "toaster"}, "--device"),
    ({"dtype": "int4"}, "--dtype"),
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
