"""The whole path on real text with default flags: experts help where they should and harm nobody. Takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.train_expert import TrainExpertConfig, train_expert

TEXT = Path(__file__).parents[2] / "shared" / "data" / "flexmix-mini"
OWNERS = ("code", "math", "news")
MAX_TOKENS = 150_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TEXT / "public").is_dir(), reason="there is no ../shared/data/flexmix-mini"),
    pytest.mark.usefixtures("one_thread", "in_empty_folder"),
]


def score(bundle: Path | None = None) -> EvaluateResult:
    data = tuple(f"{name}={TEXT / name / 'test.jsonl'}" for name in ("public", *OWNERS))
    return evaluate(EvaluateConfig(data=data, bundle=bundle))


def bits(result: EvaluateResult) -> dict[str, float]:
    return {name: figures.bits_per_byte for name, figures in result.perplexity.items()}


def test_life_of_three_experts(tmp_path: Path) -> None:
    init_anchor(InitAnchorConfig(data=(TEXT / "public" / "train.jsonl",), preset="nano"))
    for name in OWNERS:
        trained = train_expert(TrainExpertConfig(data=(TEXT / name / "train.jsonl",), name=name, max_tokens=MAX_TOKENS))
        assert trained.held_out["own"]["after"] < trained.held_out["own"]["before"]
        assert max(trained.bias) <= 1e-5
    merge(MergeConfig(experts=tuple(tmp_path / "experts" / f"{name}.st" for name in OWNERS)))
    before, after = score(tmp_path / "anchor"), score()
    print("\nbits per byte", bits(before), bits(after), after.routing)

    mean = {
        stage: sum(found[name] for name in OWNERS)
        for stage, found in (("before", bits(before)), ("after", bits(after)))
    }
    assert mean["after"] < 0.85 * mean["before"]
    assert bits(after)["public"] <= 1.03 * bits(before)["public"]
    for name in ("code", "math"):
        assert bits(after)[name] < 0.9 * bits(before)[name]
        assert max(after.routing, key=lambda domain: after.routing[domain][name]) == name

    _, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(loading.values())

    remove(RemoveConfig(names=("math",)))
    removed = bits(score())
    assert removed["math"] > bits(after)["math"]
    assert removed["math"] <= 1.03 * bits(before)["math"]
    assert removed["code"] == pytest.approx(bits(after)["code"], rel=0.03)
