"""The pair: what is frozen stays, router rows among it, and the expert alone trains."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexctl.model.building import moved_tensors, route
from flexctl.model.lowrank import expand
from flexctl.model.recompute import recompute_layers
from flexctl.model.rounded import RoundedLinear
from flexctl.model.routed import observing, routed_layers
from flexctl.routing.space import RouterSpace, fit_space, measure_inputs
from flexctl.runtime import SILENT
from flexctl.text.tokens import TokenStream
from flexctl.training import loop
from flexctl.training.batches import Mixture
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.loop import LoopSettings, Outcome, train
from flexctl.training.pair import Pair
from flexctl.training.track import UNTRACKED, Track

pytestmark = pytest.mark.usefixtures("one_thread")

# Of ``test_golden_losses``. A change that means no change must reproduce them.
GOLDEN = [6.002079, 5.977029, 6.050985, 6.140786, 5.86545, 6.096141]

WEIGHTS = tiny.make_weights(tiny.dense_config())
BATCHES = [tiny.some_tokens(8, 24, seed=3)]


@pytest.fixture(scope="module")
def space() -> RouterSpace:
    return fit_space(measure_inputs(tiny.build(WEIGHTS), BATCHES))


def start_rows(space: RouterSpace, bias: float) -> Tensor:
    """Random rows moved along u so that their mean logit on public text is ``bias``."""
    rows = 0.2 * torch.randn(2, 32, generator=torch.Generator().manual_seed(5)).double()
    missing = bias - (rows * space.mean.double()).sum(dim=1, keepdim=True)
    return (rows + missing * space.constant()).float()


def make_pair(
    space: RouterSpace,
    *,
    bias: float = -0.5,
    match: float = 0.0,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Any, Pair]:
    model = tiny.build(WEIGHTS).to(dtype)
    return model, Pair(model, start_rows(space, bias), public_match=match, rank=rank)


def make_data(public_share: float = 0.25) -> Mixture:
    own = TokenStream(np.array([(i * i + 3 * i) % 300 + 2 for i in range(400)], dtype=np.int32))
    public = TokenStream(np.array([(i * 7) % 300 + 2 for i in range(200)], dtype=np.int32))
    return Mixture(own, public, seq_len=16, batch_size=4, public_share=public_share, seed=0)


def run(
    model: Any,
    pair: Pair,
    *,
    steps: int = 6,
    lr: float = 5e-3,
    public_share: float = 0.25,
    checkpoints: Checkpoints | None = None,
    track: Track = UNTRACKED,
    **settings: Any,
) -> Outcome:
    how = LoopSettings(**{"steps": steps, "lr": lr, "warmup_steps": 1, "micro_batch": 4, **settings})
    kept: dict[str, Any] = {"checkpoints": checkpoints, "track": track}
    return train(model, pair.groups(), make_data(public_share), how, reporter=SILENT, match=pair.match, **kept)


class Stopping(Checkpoints):
    """Checkpoints of a run that is stopped in some step."""

    steps_left: int | None = None

    def is_due(self, step: int, steps: int) -> bool:
        if step == self.steps_left:
            raise KeyboardInterrupt
        return super().is_due(step, steps)


def trained_names(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


EXPERT = {f"model.layers.{i}.mlp.experts.1.{name}_proj.weight" for i in range(2) for name in ("gate", "up", "down")}
LOW_RANK = {name.replace(".weight", f".{part}") for name in EXPERT for part in ("a", "b")}


@pytest.mark.parametrize(("rank", "expected"), [(None, EXPERT), (3, LOW_RANK)])
def test_only_the_expert_has_gradients(space: RouterSpace, rank: int | None, expected: set[str]) -> None:
    model, pair = make_pair(space, rank=rank)
    for block in routed_layers(model):
        for expert in block.experts[1:]:
            for name, parameter in expert.named_parameters():
                if name.endswith(".b"):
                    torch.nn.init.normal_(parameter, std=0.1)
    assert trained_names(model) == expected
    grouped = {id(parameter) for group in pair.groups() for parameter in group.parameters}
    assert grouped == {id(parameter) for name, parameter in model.named_parameters() if name in expected}
    model(BATCHES[0], labels=BATCHES[0]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in expected), name
        assert name not in expected or parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("rank", "expected"), [(None, EXPERT), (3, LOW_RANK)])
def test_frozen_tensors_do_not_move_and_the_others_do(space: RouterSpace, rank: int | None, expected: set[str]) -> None:
    model, pair = make_pair(space, rank=rank)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, pair)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == expected
    assert moved_tensors(model, WEIGHTS) == []


@pytest.mark.parametrize("rank", [None, 3])
def test_pair_begins_as_the_anchor(space: RouterSpace, rank: int | None) -> None:
    model, _ = make_pair(space, rank=rank)
    with torch.no_grad():
        difference = model(BATCHES[0]).logits - tiny.build(WEIGHTS)(BATCHES[0]).logits
    assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize(("rank", "factor"), [(None, 1.0), (3, 16.0), (8, 16.0), (32, 8.0)])
def test_differences_train_faster_than_matrices(space: RouterSpace, rank: int | None, factor: float) -> None:
    _, pair = make_pair(space, rank=rank)
    assert [group.lr_factor for group in pair.groups()] == [factor]


def test_a_low_rank_expert_copies_no_matrix(space: RouterSpace) -> None:
    model, _ = make_pair(space, rank=3)
    own = {name: value for name, value in model.state_dict().items() if ".experts.1." in name}
    assert own.keys() == LOW_RANK
    assert {min(value.shape) for value in own.values()} == {3}


def test_rows_stay_bit_for_bit(space: RouterSpace) -> None:
    """Even where their bias is above zero, as a router file's may be."""
    model, pair = make_pair(space, bias=0.5)
    run(model, pair, steps=3)
    rows = torch.stack([block.router.rows[1] for block in routed_layers(model)])
    assert torch.equal(rows, start_rows(space, 0.5))


@torch.no_grad()
def feed_forward_outputs(model: Any, tokens: Tensor, expert: int) -> list[Tensor]:
    """Outputs of one expert in every layer for what reaches it, (B, S, H) each."""
    found: list[Tensor] = []
    blocks = routed_layers(model)

    def run(layer: int, inputs: Tensor, *_: Tensor) -> None:
        found.append(blocks[layer].experts[expert](inputs).reshape(*tokens.shape, -1))

    with observing(model, run):
        model(tokens)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rank", [None, 3])
def test_match_is_the_relative_distance_from_public_on_public_sequences(
    space: RouterSpace, rank: int | None, recompute: bool
) -> None:
    model, pair = make_pair(space, match=2.0, rank=rank)
    run(model, pair, steps=3, public_share=0.0)
    if recompute:
        recompute_layers(model)
    tokens, public = tiny.some_tokens(4, 9), torch.tensor([False, True, False, True])
    with pair.match(public) as matched:
        model.base_model(tokens)
        found = float(matched().detach())
    direct = 0.0
    outputs = zip(feed_forward_outputs(model, tokens, 0), feed_forward_outputs(model, tokens, 1), strict=True)
    for theirs, own in outputs:
        direct += float((own[public] - theirs[public]).square().sum() / theirs[public].square().sum()) / 2
    assert found == pytest.approx(2.0 * 18 * direct, rel=1e-4)
    assert found > 0.01
    with pair.match(torch.zeros(4, dtype=torch.bool)) as matched:
        assert float(matched()) == 0.0


@pytest.mark.parametrize("rank", [None, 3])
def test_match_holds_the_expert_on_public_text_and_moves_nothing_frozen(space: RouterSpace, rank: int | None) -> None:
    distance = {}
    public = torch.from_numpy(np.array([[(i * 7) % 300 + 2 for i in range(100)]]))
    for match in (0.0, 100.0):
        model, pair = make_pair(space, match=match, rank=rank)
        run(model, pair, steps=15)
        outputs = zip(feed_forward_outputs(model, public, 0), feed_forward_outputs(model, public, 1), strict=True)
        distance[match] = sum(float((own - theirs).square().sum()) for theirs, own in outputs)
        assert moved_tensors(model, WEIGHTS) == []
    assert distance[100.0] < 0.5 * distance[0.0]


@pytest.mark.parametrize("rank", [None, 3])
def test_nobody_watches_after_a_step(space: RouterSpace, rank: int | None) -> None:
    model, pair = make_pair(space, match=1.0, rank=rank)
    with pair.match(torch.ones(2, dtype=torch.bool)):
        assert watched(model) == 2
    assert watched(model) == 0
    with pytest.raises(ZeroDivisionError), pair.match(torch.ones(2, dtype=torch.bool)):
        raise ZeroDivisionError
    assert watched(model) == 0


@pytest.mark.parametrize("rank", [None, 3])
def test_a_pair_goes_with_its_model_and_waits_for_no_garbage_collector(space: RouterSpace, rank: int | None) -> None:
    gc.collect()
    gc.disable()
    try:
        model, pair = make_pair(space, match=1.0, rank=rank)
        run(model, pair, steps=1)
        left = [weakref.ref(parameter) for parameter in model.parameters()]
        del model, pair
        assert not [each for each in left if each() is not None]
    finally:
        gc.enable()


def watched(model: Any) -> int:
    """How many layers somebody watches."""
    experts = [block.experts[1] for block in routed_layers(model)]
    return sum(bool(expert._forward_hooks) or getattr(expert, "watching", None) is not None for expert in experts)


@pytest.mark.parametrize("name", ["F32", "BF16", "F16"])
def test_weights_are_rounded_once_in_the_model_too(space: RouterSpace, name: str) -> None:
    model, pair = make_pair(space)
    run(model, pair, steps=2)
    exact = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = pair.round_weights(name, WEIGHTS.experts["public"])
    assert list(tensors) == [f"layers.{i}.mlp.{part}_proj.weight" for i in range(2) for part in ("gate", "up", "down")]
    for key, tensor in tensors.items():
        inside = f"model.{key}".replace(".mlp.", ".mlp.experts.1.")
        assert torch.equal(tensor, exact[inside].to(tensor.dtype))
        assert tensor.dtype == {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[name]
        assert torch.equal(model.state_dict()[inside], tensor.float())
    assert (name == "F32") == all(torch.equal(value, exact[key]) for key, value in model.state_dict().items())
    again = pair.round_weights(name, WEIGHTS.experts["public"])
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_what_a_low_rank_pair_serves_is_what_it_trained(space: RouterSpace) -> None:
    """The forward in training never forms a matrix; served are expanded ones. In float32 nothing is rounded away."""
    model, pair = make_pair(space, rank=3)
    run(model, pair)
    with torch.no_grad():
        trained, anchor = model(BATCHES[0]).logits, tiny.build(WEIGHTS)(BATCHES[0]).logits
    tensors = pair.round_weights("F32", WEIGHTS.experts["public"])
    assert [*tensors][:2] == [f"layers.0.mlp.gate_proj.weight.lora_{part}" for part in "AB"]
    assert len(tensors) == 12
    assert set(model.state_dict()) == set(make_pair(space)[0].state_dict())
    with torch.no_grad():
        served = model(BATCHES[0]).logits
    assert (served - trained).abs().max() <= 1e-4
    assert (served - anchor).abs().max() > 0.05


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_a_low_rank_pair_serves_rounded_differences(space: RouterSpace, name: str) -> None:
    model, pair = make_pair(space, rank=3)
    run(model, pair)
    exact = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = pair.round_weights(name, WEIGHTS.experts["public"])
    for key, inside in ((key, f"model.{key}".replace(".mlp.", ".mlp.experts.1.")) for key in WEIGHTS.experts["public"]):
        a, b = tensors[f"{key}.lora_A"], tensors[f"{key}.lora_B"]
        assert torch.equal(a, exact[inside.replace(".weight", ".a")].to(a.dtype))
        assert torch.equal(b, exact[inside.replace(".weight", ".b")].to(a.dtype))
        base = exact[inside.replace(".experts.1.", ".experts.0.")]
        assert torch.equal(model.state_dict()[inside], expand(base, a, b))
        assert not torch.equal(model.state_dict()[inside], base)


def test_golden_losses() -> None:
    """Of the pair with its match. They changed when rows stopped to train (docs/results.md, section 10)."""
    pair = Pair(model := route(tiny.make_golden_model()), tiny.scrambled((2, 32), 7, 0.3), public_match=5.0)
    assert run(model, pair, steps=6, lr=4e-3).losses == pytest.approx(GOLDEN, abs=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("rank", "dtype", "micro_batch"),
    [(None, torch.bfloat16, 4), (None, torch.bfloat16, 3), (None, None, 4), (3, torch.bfloat16, 4)],
)
def test_gradients_in_half_the_bytes_change_no_bit(
    space: RouterSpace, rank: int | None, dtype: torch.dtype | None, micro_batch: int, recompute: bool
) -> None:
    """Losses, norms and weights are those of plain maps under autocast, clipped and moved by torch all at once."""
    runs = []
    for is_plain in (False, True):
        model, pair = make_pair(space, match=1.0, rank=rank, dtype=dtype or torch.float32)
        for module in model.modules() if is_plain else ():
            module.__class__ = nn.Linear if isinstance(module, RoundedLinear) else module.__class__
        if recompute:
            recompute_layers(model)
        how: dict[str, Any] = {"autocast": dtype, "micro_batch": micro_batch, "max_grad_norm": 0.3, "weight_decay": 0.1}
        norms: list[float] = []
        track = Track((lambda _step, figures, to=norms: to.append(figures["grad_norm"]),))
        losses = run(model, pair, track=track, **how).losses
        runs.append((losses, norms, [weight.detach() for weight in pair.groups()[0].parameters]))
    (losses, norms, weights), (expected, their_norms, theirs) = runs
    assert losses == expected
    assert norms == their_norms
    assert max(norms) > 0.3, "nothing was clipped"
    assert all(torch.equal(one, other) for one, other in zip(weights, theirs, strict=True))


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.10 and later")
@pytest.mark.parametrize(("micro_batch", "expected"), [(4, torch.bfloat16), (2, torch.float32)])
def test_a_step_of_one_micro_batch_has_narrow_gradients(
    space: RouterSpace, monkeypatch: pytest.MonkeyPatch, micro_batch: int, expected: torch.dtype
) -> None:
    model, pair = make_pair(space, dtype=torch.bfloat16)
    seen, at_once, move = set(), [], loop._move

    def watched(parameters: Sequence[nn.Parameter], max_norm: float, optimiser: torch.optim.Optimizer) -> Tensor:
        seen.update(parameter.grad.dtype for parameter in parameters if parameter.grad is not None)
        return move(parameters, max_norm, optimiser)

    def counted(optimiser: torch.optim.Optimizer, *_: object) -> None:
        grads = [each.grad for group in optimiser.param_groups for each in group["params"] if each.grad is not None]
        at_once.append(len(grads))
        assert {grad.dtype for grad in grads} == {torch.float32}

    monkeypatch.setattr(loop, "_move", watched)
    monkeypatch.setattr(loop, "MOVES", 3)
    with register_optimizer_step_pre_hook(counted):
        run(model, pair, steps=1, autocast=torch.bfloat16, micro_batch=micro_batch)
    assert seen == {expected}
    assert at_once == ([2, 2, 2] if expected == torch.bfloat16 else [6])


def test_a_run_in_bfloat16_resumes_to_the_same_bits(space: RouterSpace, tmp_path: Path) -> None:
    def attempt(steps_left: int | None, *, resume: bool) -> tuple[Any, list[float]]:
        model, pair = make_pair(space, match=1.0, dtype=torch.bfloat16)
        kept = Stopping(tmp_path, {}, every_steps=2, resume=resume, reporter=SILENT)
        kept.steps_left = steps_left
        return model, run(model, pair, autocast=torch.bfloat16, checkpoints=kept).losses

    straight, expected = attempt(None, resume=False)
    with pytest.raises(KeyboardInterrupt):
        attempt(3, resume=False)
    resumed, losses = attempt(None, resume=True)
    assert losses == expected
    theirs = straight.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in resumed.state_dict().items())
