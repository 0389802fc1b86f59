"""On a CUDA device: what a CPU computes, training and resuming in bfloat16, and the way from expert to answer.

``python -m tests.gpu`` runs them; GPU_TESTS_ON=cpu rehearses them where there is no card.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from flexctl import processes
from flexctl.bundle import open_expert, open_router_file
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.evaluate import EvaluateConfig, evaluate
from flexctl.engine.generate import GenerateConfig, generate
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy
from flexctl.engine.train_expert import TrainExpertConfig, TrainExpertResult, train_expert
from flexctl.engine.tune_router import TuneRouterConfig, tune_router
from flexctl.families import feed_forward_names
from flexctl.model.building import build_model
from flexctl.model.losses import score_tokens
from flexctl.model.routed import exclude, routed_layers, set_top_k
from flexctl.model.tensors import to_torch
from flexctl.routing.space import measure_documents, measure_passages
from flexctl.runtime import SILENT
from flexctl.training import checkpoints, shards
from flexctl.training import train as run
from flexctl.training.loop import LoopSettings, ParameterGroup, _move, new_optimiser
from tests.benchmarks.shapes import Shape
from tests.benchmarks.steps import RandomBatches, pair

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_thread", "in_empty_folder")]

FAMILIES = ("olmo2", "llama", "mistral", "qwen3")


def both(weights: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model on the CPU in float32, and on the card."""
    return (
        build_model(weights, device=torch.device("cpu"), dtype=torch.float32),
        build_model(weights, device=torch.device(DEVICE), dtype=dtype),
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_float32_gives_the_cpu_s_logits(model_type: str) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "a", "b", "c"), top_k=2)
    cpu, card = both(weights, torch.float32)
    ids = tiny.some_tokens()
    for top_k, left_out in ((4, ()), (2, ()), (2, (1,)), (3, (1, 2))):
        for model in (cpu, card):
            set_top_k(model, top_k)
            exclude(model, left_out)
        with torch.no_grad():
            expected, found = cpu(ids).logits, card(ids.to(DEVICE)).logits.cpu()
        assert torch.allclose(found, expected, atol=2e-4), (top_k, left_out, float((found - expected).abs().max()))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_bfloat16_is_near_the_cpu_s_float32(model_type: str) -> None:
    """A cut router chooses others now and then in bfloat16, so there the median token counts."""
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "a", "b"))
    cpu, card = both(weights, torch.bfloat16)
    ids = tiny.some_tokens()
    for top_k in (3, 2):
        set_top_k(cpu, top_k)
        set_top_k(card, top_k)
        with torch.no_grad():
            expected, found = cpu(ids).logits, card(ids.to(DEVICE)).logits.float().cpu()
        error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert float(error.median()) < 0.05
        nll = score_tokens(card, ids[:, :-1].to(DEVICE), ids[:, 1:].to(DEVICE)).mean()
        assert float(nll) == pytest.approx(float(score_tokens(cpu, ids[:, :-1], ids[:, 1:]).mean()), rel=0.03)


@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_a_layer_s_experts_run_at_once_as_one_by_one_and_wait_for_nothing(model_type: str, top_k: int) -> None:
    weights = tiny.make_weights(tiny.dense_config(model_type), ("public", "a", "b", "c"), top_k=top_k)
    card = build_model(weights, device=torch.device(DEVICE), dtype=torch.bfloat16)
    exclude(card, [2])
    for block in routed_layers(card):
        if block.together is None:
            pytest.skip("this device has no kernel for all experts at once")
        for tokens in (2, 3, 300):
            inputs = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens)).to(DEVICE).bfloat16()
            block(inputs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                found = block(inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            together, block.together = block.together, None
            expected, block.together = block(inputs), together
            close = 0.03 * float(expected.abs().max())
            torch.testing.assert_close(found, expected, rtol=0.03, atol=close)


def train(anchor: Path, data: Path, output: Path, **settings: Any) -> TrainExpertResult:
    defaults = {"max_steps": 6, "seq_len": 32, "batch_tokens": 256, "threads": 1, "device": DEVICE}
    return train_expert(
        TrainExpertConfig(data=(data,), anchor=anchor, output=output, **{**defaults, "dtype": "bfloat16", **settings})
    )


def weights_of(path: Path) -> torch.Tensor:
    """All feed-forward weights of a full expert of the tiny anchor, in one vector."""
    expert = open_expert(path)
    return torch.cat([to_torch(expert.tensor(name)).flatten().float() for _, _, name in feed_forward_names(2)])


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_training_learns_and_leaves_what_is_frozen(
    tmp_path: Path, anchor: Path, texts: Any, dtype: str, rank: int | None
) -> None:
    result = train(anchor, texts.code, tmp_path / "x.st", dtype=dtype, rank=rank, max_steps=12)
    assert result.frozen_verified
    assert result.held_out["own"]["after"] < result.held_out["own"]["before"]


def test_float32_trains_the_cpu_s_expert(tmp_path: Path, anchor: Path, texts: Any) -> None:
    card = train(anchor, texts.code, tmp_path / "card.st", dtype="float32", name="x")
    cpu = train(anchor, texts.code, tmp_path / "cpu.st", dtype="float32", name="x", device="cpu")
    assert card.final_loss == pytest.approx(cpu.final_loss, rel=1e-4)
    moved = weights_of(tmp_path / "cpu.st") - weights_of(tmp_path / "card.st")
    assert float(moved.norm() / weights_of(tmp_path / "cpu.st").norm()) < 1e-3


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_bfloat16_run_that_was_interrupted_goes_on(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, micro_batch: int
) -> None:
    """Its losses are those of a straight run; bit for bit is promised on CPUs alone."""
    settings: dict[str, Any] = {"checkpoint_steps": 1, "micro_batch": micro_batch, "name": "x"}
    straight = train(anchor, texts.code, tmp_path / "straight.st", **settings)
    is_due = checkpoints.Checkpoints.is_due

    def stopping(self: Any, step: int, steps: int) -> bool:
        if step == 3:
            raise KeyboardInterrupt
        return is_due(self, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "is_due", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(anchor, texts.code, tmp_path / "x.st", **settings)
    resumed = train(anchor, texts.code, tmp_path / "x.st", resume=True, **settings)
    assert resumed.final_loss == pytest.approx(straight.final_loss, rel=1e-3)
    expected = weights_of(tmp_path / "straight.st")
    assert float((weights_of(tmp_path / "x.st") - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 and later")
def test_a_step_of_bfloat16_gradients_is_that_of_the_same_in_float32() -> None:
    """Bit for bit: norm, clip and weights, of tensors that one kernel takes and of those that it takes in parts."""
    sizes = [(1,), (3, 5), (257, 1023), (2048, 8192), *[(64, 160)] * 40]
    settings = LoopSettings(steps=4, lr=1e-3, warmup_steps=1, micro_batch=1, weight_decay=0.1)
    norms: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    weights = {}
    for stays in (True, False):
        generator = torch.Generator(DEVICE).manual_seed(1)
        made = [torch.nn.Parameter(torch.randn(size, generator=generator, device=DEVICE)) for size in sizes]
        optimiser = new_optimiser([ParameterGroup(parameters=made)], settings)
        for scale in (1e-5, 1e-3, 1.0):
            for parameter in made:
                gradient = scale * torch.randn(parameter.shape, generator=generator, device=DEVICE)
                parameter.grad_dtype = None
                parameter.grad = gradient.bfloat16() if stays else gradient.bfloat16().float()
            norms[stays].append(_move(made, settings.max_grad_norm, optimiser))
            assert all(parameter.grad is None for parameter in made)
        weights[stays] = [parameter.detach() for parameter in made]
    assert norms[True] == norms[False]
    assert norms[True][0] < settings.max_grad_norm < norms[True][1]
    assert all(torch.equal(one, other) for one, other in zip(weights[True], weights[False], strict=True))


def test_an_anchor_is_annealed_and_measured(tmp_path: Path, checkpoint: Path, texts: Any) -> None:
    settings: dict[str, Any] = {"sample_tokens": 4_000, "seq_len": 64, "batch_tokens": 512, "lr": 4e-3}
    result = init_anchor(
        InitAnchorConfig(
            source=str(checkpoint),
            data=(texts.public,),
            output=tmp_path / "anchor",
            anneal_tokens=20_000,
            device=DEVICE,
            **settings,
        )
    )
    assert result.loss is not None
    assert result.loss < 5.0
    assert all(0 < spread < 1 for spread in result.constant_std)


def test_router_rows_are_the_cpu_s(tmp_path: Path, anchor: Path, texts: Any) -> None:
    rows = {}
    for where, device in (("here", "cpu"), ("card", DEVICE)):
        path = tmp_path / f"{where}.st"
        embed_router(EmbedRouterConfig(data=(texts.code,), anchor=anchor, output=path, device=device, dtype="float32"))
        rows[where] = to_torch(open_router_file(path).rows)
    assert torch.allclose(rows["here"], rows["card"], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_private_run_is_the_cpu_s_claim(tmp_path: Path, anchor: Path, texts: Any, rank: int | None) -> None:
    """Noise is drawn anew, so that weights differ; what is told of the run does not."""
    pytest.importorskip("dp_accounting")
    guarantee = {"dp_epsilon": 30.0, "dp_delta": 1e-3, "dp_documents": 40, "dp_noise_multiplier": 0.5}
    settings: dict[str, Any] = {**guarantee, "dp_row_epsilon": 8.0, "max_steps": 3, "micro_batch": 16, "rank": rank}
    card = train(anchor, texts.code, tmp_path / "card.st", name="x", **settings)
    cpu = train(anchor, texts.code, tmp_path / "cpu.st", name="x", device="cpu", **settings)
    assert card.frozen_verified
    assert card.privacy is not None
    assert card.privacy == cpu.privacy
    assert 0 < card.privacy.epsilon <= 30


def test_merge_evaluate_tune_and_generate(tmp_path: Path, anchor: Path, texts: Any) -> None:
    experts = []
    for name in ("code", "sums"):
        train(anchor, getattr(texts, name), tmp_path / f"{name}.st", max_steps=12, name=name)
        experts.append(tmp_path / f"{name}.st")
    merged = tmp_path / "merged"
    merge(MergeConfig(experts=tuple(experts), anchor=anchor, output=merged))
    bits: dict[tuple[str, str], float] = {}
    for device, dtype in (("cpu", "float32"), (DEVICE, "float32"), (DEVICE, "bfloat16")):
        for without in ((), ("code",)):
            found = evaluate(
                EvaluateConfig(
                    bundle=merged, data=(f"code={texts.code_test}",), device=device, dtype=dtype, without=without
                )
            )
            bits[f"{device} {without}", dtype] = found.perplexity["code"].bits_per_byte
        for without in ((), ("code",)):
            expected = bits[f"cpu {without}", "float32"]
            close = 1e-4 if dtype == "float32" else 2e-2
            assert bits[f"{device} {without}", dtype] == pytest.approx(expected, rel=close)
    answers = {
        generate(
            GenerateConfig(bundle=merged, prompt="def value(", max_new_tokens=12, device=device, dtype="float32")
        ).text
        for device in ("cpu", DEVICE)
    }
    assert len(answers) == 1
    assert generate(GenerateConfig(bundle=merged, prompt="def value(", max_new_tokens=12, device=DEVICE)).tokens
    crawl = {"public": texts.public, "anchor": anchor, "device": DEVICE}
    proxies = tuple(
        select_proxy(
            SelectProxyConfig(data=(getattr(texts, name),), count=12, output=tmp_path / f"{name}-proxy", **crawl)
        ).path
        for name in ("code", "sums")
    )
    settings: dict[str, Any] = {"max_steps": 2, "seq_len": 32, "batch_tokens": 192}
    tuned = tune_router(TuneRouterConfig(merged=merged, proxy=proxies, output=tmp_path / "tuned", **crawl, **settings))
    assert set(tuned.tuned_with) == {"code", "sums"}


class Watched(RandomBatches):
    """Batches that let the card say when the CPU waits for it, from the third step to the last."""

    def batch(self, step: int) -> torch.Tensor:
        if step == 2:
            torch.cuda.set_sync_debug_mode("warn")
        return super().batch(step)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_step_of_training_does_not_wait_for_the_card(rank: int | None) -> None:
    """Once a forward pass Transformers looks whether sequences are packed; nothing else may wait."""
    shape = Shape(layers=2, hidden=64, heads=4, inner=128, vocab=512, batch=4, seq_len=32)
    made = pair(shape, torch.device(DEVICE), torch.bfloat16, rank)
    settings = LoopSettings(steps=8, lr=1e-3, warmup_steps=1, micro_batch=4, autocast=torch.bfloat16)
    if DEVICE == "cpu":
        pytest.skip("there is no card to wait for")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run(made.model, made.groups, Watched(shape), settings, reporter=SILENT, match=made.match)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    # Six steps are watched; at the end all losses are fetched at once.
    assert len(waits) <= 6 + 2, sorted(set(waits))


@pytest.mark.parametrize("measure", [measure_documents, measure_passages])
def test_measuring_router_inputs_waits_for_the_card_once_a_batch_at_most(
    measure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Transformers looks whether sequences are packed; what was found is fetched when all is through."""
    model = build_model(tiny.make_weights(tiny.dense_config()), device=torch.device(DEVICE), dtype=torch.float32)
    if DEVICE == "cpu":
        pytest.skip("there is no card to wait for")
    documents = [tiny.some_tokens(1, 20, seed=seed)[0] for seed in range(6)]
    monkeypatch.setattr("flexctl.routing.space.BATCH_TOKENS", 24)
    measure(model, documents)
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            measure(model, documents)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= len(documents) + 2, sorted(set(waits))


def test_a_checkpoint_in_parts_is_copied_off_the_card_before_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the run's own words over NCCL and the writing thread's over gloo, as where there are several cards."""
    monkeypatch.setattr(shards, "_goes_on", lambda _: True)
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    processes._meet(0, 1, DEVICE)
    try:
        world = processes._Together(0, 1, DEVICE)
        weight = torch.nn.Parameter(torch.randn(2000, 1000, device=DEVICE))
        kept = weight.detach().cpu().clone()
        writing = shards.begin_shards(tmp_path / "x.shards", {"a": 1}, {"0.parameter": weight.detach()}, world)
        for _ in range(50):
            world.sum(weight.detach().add_(1))
        writing.end()
        assert shards.about_shards(tmp_path / "x.shards") == {"a": 1}
        found = shards.read_shards(tmp_path / "x.shards", [weight], world)["0.parameter"]
        assert torch.equal(found.cpu(), kept)
    finally:
        torch.distributed.destroy_process_group()
