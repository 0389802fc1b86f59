"""The loop under a guarantee: what a step's gradient is made of, and going on as if nothing had happened."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from flexctl.errors import FlexctlError
from flexctl.model.losses import training_loss
from flexctl.privacy.clipping import PerDocument
from flexctl.privacy.documents import Documents, padded
from flexctl.privacy.noise import Secret
from flexctl.runtime import SILENT, SilentReporter
from flexctl.text.tokens import Framed, TokenStream
from flexctl.training.batches import EqualShares
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings
from flexctl.training.pair import Pair
from flexctl.training.private import PrivateSteps, _own_gradients, gradient_norm, train_privately

pytestmark = pytest.mark.usefixtures("one_thread")

SECRET = Secret(bytes(range(32)))
TEXTS = [tiny.some_tokens(1, 6 + i, seed=i)[0].numpy() for i in range(12)]
LOOP = LoopSettings(steps=5, lr=5e-3, warmup_steps=1, micro_batch=4)


def steps(**changes: Any) -> PrivateSteps:
    told: dict[str, Any] = {"sampling_rate": 0.5, "batch_size": 6, "seq_len": 10, "max_grad_norm": 0.1}
    return PrivateSteps(**{**told, "noise_multiplier": 0.5, "public_share": 0.25, **changes})


def make(family: str = "olmo2", rank: int | None = None) -> tuple[Any, Pair]:
    model = tiny.build(tiny.make_weights(tiny.dense_config(family)))
    rows = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    return model, Pair(model, rows, public_match=1.0, rank=rank)


def write(folder: Path) -> Documents:
    return Documents.write(folder / "own.tokens", [Framed(tokens=tokens, num_bytes=1) for tokens in TEXTS])


def public() -> EqualShares:
    stream = TokenStream(np.array([(i * 7) % 300 + 2 for i in range(200)], dtype=np.int32))
    return EqualShares({"public": stream}, seq_len=10, batch_size=3, seed=0)


def train(folder: Path, family: str = "olmo2", rank: int | None = None, **changes: Any) -> Any:
    """Train a new pair and return its model."""
    model, pair = make(family, rank)
    told: dict[str, Any] = {"secret": SECRET, "reporter": SILENT, "loop": LOOP, "resume": False, **changes}
    checkpoints = Checkpoints(folder / "c", {}, every_steps=2, resume=told["resume"], reporter=SILENT)
    train_privately(
        model,
        pair.groups(),
        write(folder),
        public(),
        steps(),
        told["loop"],
        secret=told["secret"],
        match=pair.match,
        checkpoints=checkpoints,
        reporter=told["reporter"],
    )
    return model


def own_gradients(folder: Path, how: PrivateSteps, step: int = 0, rank: int | None = None) -> tuple[Any, list[Tensor]]:
    model, pair = make(rank=rank)
    parameters = list(pair.groups()[0].parameters)
    _own_gradients(model, PerDocument(model, parameters), parameters, write(folder), how, LOOP, step, SECRET)
    return model, [parameter.grad for parameter in parameters if parameter.grad is not None]


def test_a_step_that_chose_nobody_is_noise_alone(tmp_path: Path) -> None:
    _, grads = own_gradients(tmp_path, steps(sampling_rate=0.0))
    numbers = torch.cat([grad.flatten() for grad in grads])
    assert float(numbers.std()) == pytest.approx(0.75 * 0.5 * 0.1 / 6, rel=0.02)
    assert abs(float(numbers.mean())) < 4 * float(numbers.std()) / len(numbers) ** 0.5


@pytest.mark.parametrize("rank", [None, 4])
def test_without_noise_and_clip_it_is_the_gradient_of_the_documents_mean_losses(
    tmp_path: Path, rank: int | None
) -> None:
    """All documents, none longer than is taken; divided by how many are expected and not by how many there are."""
    how = steps(sampling_rate=1.0, seq_len=30, max_grad_norm=1e6, noise_multiplier=1e-15)
    model, grads = own_gradients(tmp_path, how, rank=rank)
    rows = padded(TEXTS, len(TEXTS))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = training_loss(model, rows.inputs, rows.targets, LOOP.z_loss, rows.weights)
    expected = torch.autograd.grad(loss * 0.75 / 6, trained)
    # The order of the pair's parameters is the model's.
    for one, other in zip(grads, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_steps_choose_and_draw_anew(tmp_path: Path) -> None:
    first, second, again = (own_gradients(tmp_path, steps(), step)[1] for step in (0, 1, 0))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class Stopping(SilentReporter):
    """A reporter whose bar stops the run after some steps."""

    def __init__(self, after: int) -> None:
        self.left = after

    def progress(self, *_about: Any) -> Any:
        return nullcontext(self)

    def advance(self, amount: float, **figures: Any) -> None:
        assert not figures
        self.left -= int(amount)
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("family", ["olmo2", "qwen3", "llama", "mistral"])
def test_a_run_that_was_stopped_goes_on_to_what_it_would_have_been(
    tmp_path: Path, family: str, rank: int | None
) -> None:
    """In every family: no noise is drawn a second time, and nothing frozen moves."""
    whole = train(tmp_path / "whole", family, rank).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", family, rank, reporter=Stopping(2))
    found = train(tmp_path / "cut", family, rank, resume=True).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.items())
    start = make(family, rank)[0].state_dict()
    moved = {name for name, value in whole.items() if not torch.equal(value, start[name])}
    assert moved == {name for name in whole if ".experts.1." in name and ".base." not in name}


def test_another_key_gives_another_expert(tmp_path: Path) -> None:
    one, other = (train(tmp_path / str(i), secret=Secret(bytes([i] * 32))).state_dict() for i in (1, 2))
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert not torch.equal(one[name], other[name])


def test_weights_that_stood_still_are_noticed(tmp_path: Path) -> None:
    still = LoopSettings(steps=2, lr=0.0, warmup_steps=0, micro_batch=4)
    with pytest.raises(FlexctlError, match="6 of 6 trained tensors did not move"):
        train(tmp_path, loop=still)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_clip_is_measured_where_b_is_not_zero_and_leaves_nothing_behind(rank: int | None) -> None:
    model, pair = make(rank=rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [padded(TEXTS[:6], 6), padded(TEXTS[6:], 6)]
    norm = gradient_norm(model, pair.groups(), public(), rows, LOOP, pair.match)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    parameters = list(pair.groups()[0].parameters)
    start = PerDocument(model, parameters).norms(
        lambda: training_loss(model, rows[0].inputs, rows[0].targets, LOOP.z_loss, rows[0].weights), 6
    )
    assert norm > (1.5 if rank else 0.3) * float(start.median())
