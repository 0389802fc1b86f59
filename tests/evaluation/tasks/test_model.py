"""The model behind the harness's interface: what the harness's own Transformers model gives on the stock directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from flexctl.errors import UsageError
from flexctl.model.building import load_tokenizer
from flexctl.model.routed import exclude, set_top_k
from flexctl.runtime import SILENT

harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    ("Question: who walked to the harbour?\nAnswer:", " the miller"),
    ("Question: who walked to the harbour?\nAnswer:", " a sailor without a word"),
    ("the old king ", "looked at"),
    ("", "The teacher dreamed of the winter market."),
    ("def value_index(self", ", value):\n    return"),
    ("the harbour " * 60, "a quiet village"),
]
LONG = "The miller walked to the harbour before the rain began. " * 20


def ours(model: Any, tokenizer: Any, batch_tokens: int = 4096) -> Any:
    from flexctl.evaluation.tasks.model import HarnessModel

    return HarnessModel(model, tokenizer, batch_tokens=batch_tokens, reporter=SILENT)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=given, idx=0) for given in arguments]


@pytest.fixture(scope="module")
def weights() -> Any:
    return tiny.make_weights(tiny.dense_config(), ("public", "code", "sums"), top_k=2)


@pytest.fixture
def model(weights: Any) -> Any:
    return tiny.build(weights)


@pytest.fixture(scope="module")
def stock(merged: Path) -> Any:
    """The harness's Transformers model of the merged directory."""
    pytest.importorskip("accelerate", reason="the harness's own Transformers model needs it")
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.CRITICAL)
    return HFLM(pretrained=str(merged), device="cpu", dtype="float32", batch_size=2)


@pytest.fixture(scope="module")
def built(merged: Path) -> Any:
    from flexctl.bundle.runnable import open_runnable

    runnable = open_runnable(merged, merged)
    return ours(tiny.build(runnable.weights), load_tokenizer(runnable.tokenizer), batch_tokens=300)


def test_log_likelihoods_are_the_harness_s_own(stock: Any, built: Any) -> None:
    found = built.loglikelihood(requests("loglikelihood", PAIRS))
    expected = stock.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_whole_texts_are_the_harness_s_own(stock: Any, built: Any) -> None:
    texts = [(LONG,), ("The miller.",)]
    found = built.loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert found == pytest.approx(
        stock.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True), abs=1e-3
    )


@pytest.mark.parametrize("until", [["."], [" the", "\n"], ["nowhere"]])
def test_greedy_answers_are_the_harness_s_own(stock: Any, built: Any, until: list[str]) -> None:
    settings = {"until": until, "max_gen_toks": 24, "do_sample": False}
    prompts = [("the old king", settings), ("Question: who?\nAnswer:", settings), (LONG, settings), ("42 +", settings)]
    found = built.generate_until(requests("generate_until", prompts))
    assert found == stock.generate_until(requests("generate_until", prompts), disable_tqdm=True)
    assert any(found)
    assert not any(end in text for text in found for end in until)


def test_batches_do_not_matter(model: Any, tokenizer: Any) -> None:
    one, many = ours(model, tokenizer, 1), ours(model, tokenizer, 100_000)
    pairs = requests("loglikelihood", PAIRS)
    totals = [[total for total, _ in lm.loglikelihood(pairs)] for lm in (one, many)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    prompts = requests("generate_until", [(prompt or "a", {"max_gen_toks": 8}) for prompt, _ in PAIRS])
    assert one.generate_until(prompts) == many.generate_until(prompts)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_leaving_out_equals_removing(weights: Any, model: Any, tokenizer: Any, top_k: int) -> None:
    set_top_k(model, top_k)
    whole = ours(model, tokenizer).loglikelihood(requests("loglikelihood", PAIRS))
    exclude(model, [1])
    masked = ours(model, tokenizer)
    removed = ours(tiny.build(tiny.without(weights, "code", top_k)), tokenizer)
    pairs = requests("loglikelihood", PAIRS)
    totals = [[total for total, _ in lm.loglikelihood(pairs)] for lm in (masked, removed)]
    assert totals[0] == pytest.approx(totals[1], abs=1e-4)
    assert totals[0] != pytest.approx([total for total, _ in whole], abs=1e-2)
    prompts = requests("generate_until", [("the old king", {"max_gen_toks": 12})])
    assert masked.generate_until(prompts) == removed.generate_until(prompts)


def test_answers_longer_than_the_model_are_scored_whole(model: Any, tokenizer: Any) -> None:
    """In pieces that fit, each after what stands before it: never cut."""
    lm = ours(model, tokenizer)
    ((total, _),) = lm.loglikelihood(requests("loglikelihood", [("Tell me:", " " + LONG)]))
    context, tokens = tokenizer("Tell me:")["input_ids"], tokenizer("Tell me: " + LONG)["input_ids"]
    expected, start = 0.0, len(context)
    while start < len(tokens):
        end = min(start + tiny.CONTEXT, len(tokens))
        window = torch.tensor(tokens[:end][-(tiny.CONTEXT + 1) :])
        with torch.no_grad():
            scores = model(window[None, :-1]).logits[0].log_softmax(-1)
        expected += float(scores.gather(1, window[1:, None])[-(end - start) :].sum())
        start = end
    assert len(tokens) > 2 * tiny.CONTEXT
    assert total == pytest.approx(expected, abs=1e-3)


def test_answer_without_a_token_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="adds no token to 'the old king'"):
        ours(model, tokenizer).loglikelihood(requests("loglikelihood", [("the old king", "")]))


def test_progress_goes_to_the_reporter(model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    from flexctl.evaluation.tasks.model import HarnessModel

    told: list[tuple[str, float, str]] = []
    done: list[float] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def advance(self, amount: float, **_: Any) -> None:
            done.append(amount)

    class Listener:
        def progress(self, title: str, total: float, unit: str) -> Bar:
            told.append((title, total, unit))
            return Bar()

    capfd.readouterr()
    lm = HarnessModel(model, tokenizer, batch_tokens=64, reporter=Listener())  # type: ignore[arg-type]
    lm.title = "wet"
    lm.loglikelihood(requests("loglikelihood", PAIRS))
    assert [(title, unit) for title, _, unit in told] == [("wet", "tokens")]
    assert sum(done) == told[0][1] > 0
    assert len(done) > 1
    done.clear()
    lm.generate_until(requests("generate_until", [("the old king", {"max_gen_toks": 4})]))
    assert told[1] == ("wet", 1, "answers")
    assert done == [1]
    assert capfd.readouterr() == ("", "")
