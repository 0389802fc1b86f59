"""The one training loop: golden losses, and what it must not depend on."""

from __future__ import annotations

import errno
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from flexctl.errors import FlexctlError, Interrupted, Terminated
from flexctl.runtime import SILENT, Progress, SilentReporter
from flexctl.text.tokens import TokenStream
from flexctl.training import checkpoints
from flexctl.training.batches import Mixture
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, Match, Outcome, ParameterGroup, learning_rate, train, unmatched
from flexctl.training.track import UNTRACKED, Track

pytestmark = pytest.mark.usefixtures("one_thread")

# Of ``run`` below. A change that means no change must reproduce them; one that means to, must say so.
GOLDEN = [6.037445, 6.002861, 6.05764, 6.063404, 5.83685, 5.991853, 5.876023, 5.613326]


def make_data(batch_size: int = 4) -> Mixture:
    own = TokenStream(np.array([(i * i + 3 * i) % 300 + 2 for i in range(400)], dtype=np.int32))
    public = TokenStream(np.array([(i * 7) % 300 + 2 for i in range(200)], dtype=np.int32))
    return Mixture(own, public, seq_len=16, batch_size=batch_size, public_share=0.25, seed=0)


def run(
    model: Any = None,
    *,
    steps: int = 8,
    micro_batch: int = 4,
    checkpoints: Checkpoints | None = None,
    track: Track = UNTRACKED,
    match: Match = unmatched,
    penalty: Callable[[], torch.Tensor] | None = None,
    after_step: Callable[[], None] | None = None,
    lr_factors: tuple[float, float] = (1.0, 0.1),
    **settings: Any,
) -> tuple[Any, Outcome]:
    """Train a tiny model, embeddings at another rate than the rest."""
    model = model or tiny.make_golden_model()
    embeddings = list(model.model.embed_tokens.parameters())
    rest = [p for p in model.parameters() if p is not embeddings[0]]
    groups = [ParameterGroup(parameters=rest, lr_factor=lr_factors[0])]
    groups.append(ParameterGroup(parameters=embeddings, lr_factor=lr_factors[1]))
    loop = LoopSettings(
        **{
            "steps": steps,
            "lr": 2e-3,
            "warmup_steps": 2,
            "micro_batch": micro_batch,
            "weight_decay": 0.1,
            "z_loss": 1e-3,
            **settings,
        }
    )
    data = make_data()
    reporter = SILENT if after_step is None else Watching(after_step)
    return model, train(
        model, groups, data, loop, reporter=reporter, checkpoints=checkpoints, track=track, match=match, penalty=penalty
    )


class Watching(SilentReporter):
    """Calls a function whenever the loop reports a step."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        self._after_step = after_step

    def progress(self, _title: str, _total: float, _unit: str, /) -> AbstractContextManager[Progress]:
        return nullcontext(self)

    def advance(self, amount: float, **figures: float | str) -> None:
        if amount and "loss" in figures:
            self._after_step()


@pytest.fixture
def hears_control_c() -> Iterator[None]:
    """A parent that ignores the signal, as a shell's background does, hands that down."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def states_equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def test_golden_losses() -> None:
    _, outcome = run()
    assert outcome.losses == pytest.approx(GOLDEN, abs=1e-4)
    assert outcome.tokens_per_s is not None
    assert outcome.tokens_per_s > 0


def test_losses_are_of_the_model_before_each_step() -> None:
    model = tiny.make_golden_model()
    batch = make_data().batch(0)
    with torch.no_grad():
        logits = model(batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        expected = float(loss + 1e-3 * logits.logsumexp(dim=-1).square().mean())
    assert run(model, steps=1)[1].losses == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_micro_batches_change_nothing(micro_batch: int) -> None:
    anchor = torch.zeros(2, 32)

    def outcome_of(size: int) -> Outcome:
        model = tiny.make_golden_model()
        norm = model.model.norm.weight
        return run(model, micro_batch=size, penalty=lambda: 3 * (norm - anchor[0]).square().sum())[1]

    assert outcome_of(micro_batch).losses == pytest.approx(outcome_of(4).losses, abs=1e-4)


def test_same_run_twice_is_the_same_bit_for_bit() -> None:
    (one, first), (other, second) = run(), run()
    assert first.losses == second.losses
    assert states_equal(one, other)


def test_penalty_is_obeyed_and_not_reported() -> None:
    free, pulled = tiny.make_golden_model(), tiny.make_golden_model()
    _, outcome = run(free)
    _, held = run(pulled, penalty=lambda: 1e4 * pulled.model.norm.weight.square().sum())
    assert pulled.model.norm.weight.norm() < free.model.norm.weight.norm()
    assert held.losses[0] == outcome.losses[0]


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_match_hears_which_sequences_are_public_and_counts_by_the_token(micro_batch: int) -> None:
    """Every fourth sequence is public, and stands last in its batch."""
    heard: list[bool] = []

    def matched(size: int) -> float:
        model = tiny.make_golden_model()

        @contextmanager
        def match(public: torch.Tensor) -> Iterator[Callable[[], torch.Tensor]]:
            heard.extend(public.tolist())
            yield lambda: 1e4 * 16 * len(public) * model.model.norm.weight.square().sum()

        run(model, steps=2, micro_batch=size, match=match)
        return float(model.model.norm.weight.detach().norm())

    assert matched(micro_batch) == pytest.approx(matched(4), abs=1e-4)
    assert heard == [False, False, False, True] * 4


def test_groups_have_their_own_rate_and_others_do_not_move() -> None:
    model, before = tiny.make_golden_model(), tiny.make_golden_model()
    run(model, lr_factors=(0.0, 1.0))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved == {"model.embed_tokens.weight"}


def test_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    settings = LoopSettings(steps=100, lr=2.0, warmup_steps=10, micro_batch=1)
    rates = [learning_rate(step, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert learning_rate(0, LoopSettings(steps=1, lr=2.0, warmup_steps=0, micro_batch=1)) == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_the_run(value: float) -> None:
    model = tiny.make_golden_model()

    def spoil() -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = value

    with pytest.raises(FlexctlError, match="at step 2") as caught:
        run(model, after_step=spoil)
    assert caught.value.exit_code == 1
    assert "`lr`" in str(caught.value.hint)


def test_bfloat16_products_leave_float32_weights() -> None:
    model, outcome = run(autocast=torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert outcome.losses == pytest.approx(GOLDEN, abs=0.02)
    assert outcome.losses != pytest.approx(GOLDEN, abs=1e-4)


def checkpoints_in(folder: Path, *, resume: bool, every: int = 2) -> Checkpoints:
    return Checkpoints(folder, {"lr": 0.01}, every_steps=every, resume=resume, reporter=SILENT)


@pytest.mark.parametrize("stop_at", [3, 4, 7])
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path: Path, stop_at: int) -> None:
    straight, expected = run()
    steps = iter(range(1, 100))

    def stop() -> None:
        if next(steps) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(after_step=stop, checkpoints=checkpoints_in(tmp_path, resume=False))
    resumed, outcome = run(checkpoints=checkpoints_in(tmp_path, resume=True))
    assert outcome.losses == expected.losses
    assert states_equal(resumed, straight)


class Signals:
    """Sends signals to this process after a step."""

    def __init__(self, step: int, *numbers: int) -> None:
        self._left, self._numbers = step, numbers

    def __call__(self) -> None:
        self._left -= 1
        for number in self._numbers if self._left == 0 else ():
            signal.raise_signal(number)


STOPS = [
    ((signal.SIGTERM,), Terminated, 143, "SIGTERM"),
    ((signal.SIGTERM, signal.SIGTERM), Terminated, 143, "SIGTERM"),
    ((signal.SIGINT,), Interrupted, 130, "Ctrl-C"),
    ((signal.SIGINT, signal.SIGTERM), Interrupted, 130, "Ctrl-C"),
]


@pytest.mark.usefixtures("hears_control_c")
@pytest.mark.parametrize(("numbers", "kind", "code", "named"), STOPS)
@pytest.mark.parametrize("step", [3, 8])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(
    tmp_path: Path, numbers: tuple[int, ...], kind: type[Interrupted], code: int, named: str, step: int
) -> None:
    straight, expected = run()
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        run(after_step=Signals(step, *numbers), checkpoints=checkpoints_in(tmp_path, resume=False, every=100))
    assert (type(caught.value), caught.value.exit_code) == (kind, code)
    assert str(caught.value) == f"stopped by {named} after step {step} of 8; {tmp_path} keeps all until step {step}"
    assert "`resume`" in str(caught.value.hint)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    resumed, outcome = run(checkpoints=checkpoints_in(tmp_path, resume=True))
    assert outcome.losses == expected.losses
    assert states_equal(resumed, straight)


@pytest.mark.usefixtures("hears_control_c")
def test_a_second_control_c_stops_at_once_and_keeps_what_is_there(tmp_path: Path) -> None:
    twice = Signals(5, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(after_step=twice, checkpoints=checkpoints_in(tmp_path, resume=False))
    assert max(path.name for path in tmp_path.iterdir()) == "checkpoint-00000004.safetensors"


def test_stopped_where_nothing_can_be_kept_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Terminated, match="after step 2 of 8; nothing of it is kept") as caught:
        run(after_step=Signals(2, signal.SIGTERM))
    assert caught.value.hint is None

    def full(path: Path, *rest: Any) -> None:
        if "00000005" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *rest)

    write = checkpoints._write
    monkeypatch.setattr(checkpoints, "_write", full)
    with pytest.raises(Terminated, match=r"after step 5 of 8; .* keeps all until step 4"):
        run(after_step=Signals(5, signal.SIGTERM), checkpoints=checkpoints_in(tmp_path, resume=False))


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, expected = run()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "_write", full)
    model, outcome = run(checkpoints=checkpoints_in(tmp_path, resume=False))
    assert outcome.losses == expected.losses
    assert states_equal(model, straight)


def test_outside_the_main_thread_nobody_hears_and_ignored_signals_stay_ignored() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result()[1].losses == run()[1].losses
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert len(run(after_step=Signals(2, signal.SIGTERM))[1].losses) == 8
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_step_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    """SIGKILL in a random step."""
    straight, expected = run()
    step, child = random.SystemRandom().randint(1, 7), os.fork()
    if child == 0:
        run(after_step=Signals(step, signal.SIGKILL), checkpoints=checkpoints_in(tmp_path, resume=False, every=1))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == min(step - 1, 2), f"step {step}"
    resumed, outcome = run(checkpoints=checkpoints_in(tmp_path, resume=True))
    assert outcome.losses == expected.losses, f"step {step}"
    assert states_equal(resumed, straight), f"step {step}"


def test_checkpoints_themselves_change_nothing(tmp_path: Path) -> None:
    straight, expected = run()
    model, outcome = run(checkpoints=checkpoints_in(tmp_path, resume=False, every=1))
    assert outcome.losses == expected.losses
    assert states_equal(model, straight)
