"""train-expert --plan, and the refusal of what no device here can hold: before weights and text are read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import make_anchor, make_checkpoint
from conftest import Texts

from flexctl.bundle import open_anchor
from flexctl.bundle.stock import read_dense_config
from flexctl.cli.app import main
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.errors import BundleError, UsageError
from flexctl.model import resolve_moe_config
from flexctl.steps import outlook
from flexctl.steps.machine import Machine, machine_of
from flexctl.training import footprint

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

ONE_B = {
    "model_type": "olmo2",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 100_352,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
SEVEN_B = ONE_B | {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32}


@pytest.fixture
def one_b(tmp_path: Path) -> Path:
    """A folder with config.json of OLMo-2-1B's shape and nothing else."""
    return write_config(tmp_path / "one-b", ONE_B)


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plan(anchor: Path, **settings: Any) -> outlook.TrainingPlan:
    """Return the plan of a run whose text does not exist."""
    result = train_expert(TrainExpertConfig(data=(Path("nowhere"),), anchor=anchor, plan=True, **settings))
    assert (result.steps, result.digest, result.anchor_digest) == (0, None, None)
    assert result.plan is not None
    return result.plan


def memory(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have so many bytes, and no swap."""
    monkeypatch.setattr(outlook, "_memory_bytes", lambda _device: size)
    monkeypatch.setattr(outlook, "_most_bytes", lambda _device: size)


def test_a_plan_needs_config_json_alone(one_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(24_000_000_000, monkeypatch)
    found = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1, plan_tflops=1.0)
    assert (found.device, found.dtype, found.seq_len, found.limit_bytes) == ("cpu", "bfloat16", 1024, 24_000_000_000)
    assert [each.devices for each in found.devices] == [1, 2, 4, 8]
    alone = found.devices[0]
    assert sum(alone.parts_bytes.values()) == alone.memory_bytes
    assert 20e9 < alone.memory_bytes < 24e9
    assert alone.fits is True
    assert found.way_out is None
    assert alone.parts_bytes["frozen"] == 2 * (2 * 100_352 * 2048 + 16 * (4 * 2048**2 + 3 * 2048 * 8192))
    assert alone.parts_bytes["moments"] == 2 * alone.parts_bytes["trained"] == 16 * 3 * 2048 * 8192 * 8
    assert alone.million_tokens_s == pytest.approx(found.flops_per_token * 1e6 / (0.51 * 1e12))
    assert [item.name for item in Path().rglob("*")] == ["one-b", "config.json"]


def test_a_device_that_is_too_small_is_told_with_what_it_would_do(one_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(18_000_000_000, monkeypatch)
    found = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1, plan_tflops=1.0)
    assert [each.fits for each in found.devices] == [False, True, True, True]
    less = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1, recompute=True).devices[0]
    assert found.way_out == f"with `recompute` and `micro_batch` 1 it takes about {less.memory_bytes / 1e9:.1f} GB"
    memory(3_000_000_000, monkeypatch)
    none = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1, rank=16, recompute=True, plan_tflops=1.0)
    assert (none.devices[0].fits, none.way_out) == (False, None)


def test_devices_share_weights_and_each_micro_batch(one_b: Path) -> None:
    found = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=4, plan_tflops=1.0).devices
    assert [each.sequences for each in found] == [4, 2, 1, 1]
    assert [each.parts_bytes["trained"] for each in found] == [16 * 3 * 2048 * 8192 * 4 // n for n in (1, 2, 4, 8)]
    times = [each.million_tokens_s or 0 for each in found]
    assert times[0] == 2 * times[1] == 4 * times[2] == 4 * times[3], (
        "the eighth has no sequence that the fourth has not"
    )


def test_flags_that_need_less(one_b: Path) -> None:
    plain = plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1)
    for less in ({"rank": 16}, {"recompute": True}):
        assert plan(one_b, dtype="bfloat16", device="cpu", micro_batch=1, **less).devices[0].memory_bytes < 0.9 * (
            plain.devices[0].memory_bytes
        )
    assert plan(one_b, dtype="float32", device="cpu", micro_batch=1).devices[0].memory_bytes > (
        plain.devices[0].memory_bytes
    )
    assert plain.flops_per_s is not None
    assert plan(one_b, rank=16, plan_tflops=1.0).flops_per_token < plain.flops_per_token


def test_a_card_that_is_not_here(one_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = plan(one_b, device="cuda")
    assert (found.device, found.dtype, found.limit_bytes, found.flops_per_s) == ("cuda", "bfloat16", None, None)
    assert {(each.fits, each.million_tokens_s) for each in found.devices} == {(None, None)}
    stated = plan(one_b, device="cuda", plan_tflops=780)
    # docs/benchmarks.md: 38,300 tokens/s where products ran at 780 TFLOP/s.
    assert stated.devices[0].million_tokens_s == pytest.approx(1e6 / 38_300, rel=0.03)


def test_a_card_that_is_not_here_has_no_limit(
    one_b: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["train-expert", "--data", "nowhere", "--anchor", str(one_b), "--plan", "--device", "cuda"]) == 0
    assert "Fits: not known, as there is no cuda device here." in capsys.readouterr().out


def test_a_run_against_a_stock_checkpoint_is_told_how_to_make_an_anchor(one_b: Path) -> None:
    with pytest.raises(BundleError, match=r"config\.json is that of a stock checkpoint") as caught:
        train_expert(TrainExpertConfig(data=(one_b,), anchor=one_b))
    assert caught.value.hint is not None
    assert f"flexctl init-anchor {one_b}" in caught.value.hint


def test_an_anchor_and_a_checkpoint_of_another_family(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path / "anchor", model_type="qwen3", hidden=64, inner=96, layers=3, vocab=64)
    checkpoint = make_checkpoint(tmp_path / "dense", model_type="qwen3", hidden=64, inner=96, layers=3, vocab=64)
    ours, stock = plan(anchor.path, plan_tflops=1.0), plan(checkpoint, plan_tflops=1.0)
    assert ours == stock
    assert ours.seq_len == 64


def test_the_command_line(one_b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train-expert", "--data", "nowhere", "--anchor", str(one_b), "--plan", "--rank", "16", "-q"]
    assert main([*command, "--device", "cpu", "--dtype", "float32", "--plan-tflops", "0.5"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Plan for an expert of rank 16 on cpu in float32, steps of 64 sequences of 1,024 tokens")
    assert "devices  at once" in text
    assert "One device: frozen 5.9 GB" in text
    assert re.search(r"^Fits: whether into [0-9.]+ GB, what this machine's cpu has\.$", text, re.M)
    assert "GFLOP a token at 63% of 0.500 TFLOP/s" in text
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plan"]["devices"]) == 4
    assert (found["tokens"], found["dry_run"]) == (0, True)


def test_what_a_plan_refuses(one_b: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^rank: 9000 is no smaller"):
        plan(one_b, rank=9000)
    with pytest.raises(UsageError, match=r"^plan: is not known for runs with `dp_epsilon`"):
        plan(one_b, dp_epsilon=3.0)
    with pytest.raises(UsageError, match=r"^dtype: 'float8' is not known"):
        plan(one_b, device="cuda", dtype="float8")
    with pytest.raises(UsageError, match=r"^device: 'cudo'"):
        plan(one_b, device="cudo")
    with pytest.raises(UsageError, match=r"nothing: no such directory"):
        plan(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError, match=r"config\.json: is missing"):
        plan(tmp_path / "empty")
    with pytest.raises(BundleError, match="model_type is 'gpt2'"):
        plan(write_config(tmp_path / "gpt2", ONE_B | {"model_type": "gpt2"}))
    memory(8_000_000_000, monkeypatch)
    seven_b = write_config(tmp_path / "seven-b", SEVEN_B)
    with pytest.raises(
        UsageError, match=r"each of 8 processes takes at least 1\d\.\d GB of memory, and this machine"
    ) as caught:
        plan(seven_b, dtype="bfloat16", device="cpu")
    assert caught.value.hint is not None
    assert "`rank` 16, `recompute` and `micro_batch` 1 it takes about" in caught.value.hint


def test_steps_of_one_micro_batch_are_what_a_full_expert_may_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their gradients take half the bytes: docs/scaling.md, section 2."""
    memory(80_000_000_000, monkeypatch)
    seven_b = write_config(tmp_path / "seven-b", SEVEN_B)
    shape = resolve_moe_config(read_dense_config(seven_b))
    card = Machine(device=torch.device("cuda"), dtype=torch.bfloat16, autocast=torch.bfloat16)
    settings: dict[str, Any] = {"data": (tmp_path,), "micro_batch": 1}
    with pytest.raises(UsageError, match=r"at least 83\.\d GB") as caught:
        outlook.refuse_what_cannot_fit(TrainExpertConfig(**settings, batch_tokens=8192), shape, card)
    assert str(caught.value.hint).startswith("with `recompute` and `batch_tokens` 1024 it takes about 77.3 GB")
    outlook.refuse_what_cannot_fit(TrainExpertConfig(**settings, batch_tokens=1024, recompute=True), shape, card)
    found = plan(seven_b, device="cuda", batch_tokens=4096, recompute=True, plan_tflops=780).devices[0]
    assert found.memory_bytes == pytest.approx(77.7e9, rel=0.01)


def test_torch_that_cannot_keep_gradients_in_bfloat16_takes_more(one_b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"device": "cuda", "batch_tokens": 1024, "plan_tflops": 780}
    kept = plan(one_b, **settings).devices[0].parts_bytes["trained"] // 4
    found = []
    for can_keep in (True, False):
        monkeypatch.setattr(footprint, "CAN_KEEP", can_keep)
        found.append(plan(one_b, recompute=True, **settings).devices[0].memory_bytes)
    assert 1.7 * kept < found[1] - found[0] <= 2 * kept, (
        "4 bytes of a gradient in place of 2, and of a few while it moves"
    )


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("`rank` 16, `recompute` and `micro_batch` 1", {"rank": 16, "recompute": True, "micro_batch": 1}),
        ("`rank` 16", {"rank": 16}),
    ],
    ids=["of any length", "one sequence at a time"],
)
def test_what_a_hint_names_fits_however_long_the_text_is(
    one_b: Path, monkeypatch: pytest.MonkeyPatch, flags: str, settings: dict[str, Any]
) -> None:
    memory(12_000_000_000, monkeypatch)
    given: dict[str, Any] = {} if "micro_batch" in settings else {"micro_batch": 1}
    card = Machine(device=torch.device("cuda"), dtype=torch.bfloat16, autocast=torch.bfloat16)
    config = TrainExpertConfig(data=(one_b,), **given)
    with pytest.raises(UsageError, match="training takes at least") as caught:
        outlook.refuse_what_cannot_fit(config, resolve_moe_config(read_dense_config(one_b)), card)
    takes = plan(one_b, device="cuda", plan_tflops=780, **given, **settings).devices[0].memory_bytes
    assert takes <= 12_000_000_000
    assert str(caught.value.hint).startswith(f"with {flags} it takes about {takes / 1e9:.1f} GB; ")


@pytest.mark.parametrize(("rank", "word"), [(None, "a `rank`"), (1024, "a lower `rank`")])
def test_a_run_under_a_guarantee_is_told_what_helps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int | None, word: str
) -> None:
    """No estimate is of its steps, nothing of it is computed again, and it is of one process."""
    memory(16_000_000_000, monkeypatch)
    shape = resolve_moe_config(read_dense_config(write_config(tmp_path / "seven-b", SEVEN_B)))
    card = Machine(device=torch.device("cuda"), dtype=torch.bfloat16, autocast=torch.bfloat16)
    config = TrainExpertConfig(data=(tmp_path,), rank=rank, dp_epsilon=8.0)
    with pytest.raises(UsageError, match="training takes at least") as caught:
        outlook.refuse_what_cannot_fit(config, shape, card)
    assert caught.value.hint == f"use {word}, or a smaller anchor"


def run(anchor: Path, texts: Texts, **settings: Any) -> None:
    train_expert(TrainExpertConfig(data=(texts.code,), anchor=anchor, dry_run=True, threads=1, **settings))


def test_a_run_that_cannot_fit_is_refused_before_its_text_is_read(
    anchor: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(700_000, monkeypatch)
    for dry in (True, False):
        with pytest.raises(UsageError, match=r"training takes at least .* of memory, and this machine has"):
            train_expert(TrainExpertConfig(data=(Path("nowhere"),), anchor=anchor, dry_run=dry, threads=1))
    assert not list(Path().iterdir())
    memory(10_000_000_000, monkeypatch)
    run(anchor, texts)


def test_a_run_is_refused_by_what_it_takes_at_the_least(
    anchor: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the least: weights and moments, gradients or inner values of the fewest tokens that a step may have."""
    sizes = 32 * 320 * 2 + 2 * (2 * 32 * (32 + 16) + 3 * 32 * 48)
    trained = 2 * 3 * 32 * 48
    least = 4 * sizes + 12 * trained + max(4 * trained, 5 * 48 * 4 * 1024)
    for size, fits in ((least, True), (least - 1, False)):
        memory(size, monkeypatch)
        if fits:
            run(anchor, texts)
        else:
            with pytest.raises(UsageError, match="at least"):
                run(anchor, texts)
    memory(least - 5 * 48 * 4 * 1024 + 4 * trained, monkeypatch)
    run(anchor, texts, recompute=True)
    config, opened = TrainExpertConfig(data=(texts.code,), anchor=anchor, threads=1), open_anchor(anchor)
    given = (config, opened.manifest.moe_config, machine_of(config, opened.weights().shared))
    for name, value in {"WORLD_SIZE": "4", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    memory(least // 4 + 4, monkeypatch)
    outlook.refuse_what_cannot_fit(*given)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="each of 4 processes takes at least"):
        outlook.refuse_what_cannot_fit(*given)


def test_a_finished_run_gives_its_result_wherever_it_is_asked(
    anchor: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "seq_len": 32, "batch_tokens": 64, "threads": 1}
    config = TrainExpertConfig(data=(texts.code,), anchor=anchor, output=Path("x.st"), resume=True, **settings)
    made = train_expert(config)
    memory(1, monkeypatch)
    assert train_expert(config).digest == made.digest


def test_a_rate_without_a_plan(anchor: Path, texts: Texts) -> None:
    with pytest.raises(UsageError, match=r"^plan_tflops: is for `plan` alone"):
        run(anchor, texts, plan_tflops=1.0)
