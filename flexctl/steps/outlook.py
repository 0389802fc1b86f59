"""What training an expert takes of memory and of time, told from config.json: before weights or text are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import hub, model, training, workspace
from flexctl.bundle.lowrank import refuse_useless_rank
from flexctl.bundle.manifest import Architecture
from flexctl.bundle.stock import read_dense_config
from flexctl.bundle.tensors import TensorType
from flexctl.errors import UsageError
from flexctl.processes import launched, launched_here
from flexctl.runtime import meminfo_bytes, memory_bytes
from flexctl.steps.expert_run import BudgetConfig, budget_of
from flexctl.steps.machine import Machine, MachineConfig, machine_of
from flexctl.steps.speed import matmul_flops_per_s

if TYPE_CHECKING:
    import torch

__all__ = ["DevicePlan", "TrainingPlan", "plan_training", "refuse_what_cannot_fit"]

_DEVICES = (1, 2, 4, 8)

_SHARES = {
    ("cpu", "float32"): (0.79, 0.63),
    ("cpu", "bfloat16"): (0.51, 0.34),
    ("cuda", "float32"): (0.88, 0.54),
    ("cuda", "bfloat16"): (0.49, 0.32),
}
"""Share of the rate of matrix products that a full and a low-rank pair's steps have: docs/scaling.md, section 5."""

_PROGRAM_BYTES = {"cpu": 450_000_000, "cuda": 1_050_000_000}
"""What Python and its libraries take of a CPU's memory, or CUDA's context of a card's, beside all tensors."""

_UNUSED = 0.5
"""What malloc holds and nobody uses, of what comes and goes in a step on a CPU: docs/scaling.md, section 2."""

_ENDLESS = 10**15
_USUAL_RANK = 16


class PlanConfig(BudgetConfig, MachineConfig, Protocol):
    """What ``train_expert``'s Config says of how much a step takes."""

    @property
    def anchor(self) -> Path | None:
        """Its directory or address on the Hub; None is the workspace's."""

    @property
    def rank(self) -> int | None:
        """Of a low-rank expert; None is a full one."""

    @property
    def recompute(self) -> bool:
        """Whether layers compute again on the way back."""

    @property
    def public_match(self) -> float:
        """Weight of the match."""

    @property
    def dp_epsilon(self) -> float | None:
        """The guarantee, where there is one."""

    @property
    def plan_tflops(self) -> float | None:
        """Rate of a device, as the user states it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DevicePlan:
    """What each of so many devices would have to hold, and how long they would take together.

    Attributes:
        devices: How many, one process each.
        sequences: That go through each at once: its part of a micro-batch.
        memory_bytes: Most memory that one of them needs.
        parts_bytes: What it is taken by, at the moment when it is most.
        fits: Whether one of this machine's devices has as much; None where it has none of the kind.
        million_tokens_s: Seconds for a million tokens, public ones counted; None where no rate is known.
    """

    devices: int
    sequences: int
    memory_bytes: int
    parts_bytes: dict[str, int]
    fits: bool | None
    million_tokens_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """What training would take, by the formula of docs/scaling.md.

    Attributes:
        device: cpu or cuda.
        dtype: Of frozen weights and of products.
        seq_len: Targets a sequence.
        batch_size: Sequences a step, all devices together; of few tokens it may become less.
        limit_bytes: Memory of this machine's device; None where it has none of the kind.
        flops_per_token: Operations of a step, a token.
        flops_per_s: Of a device in products of square matrices, measured now or stated; None where neither is known.
        share: Of that rate, what such steps had where they were measured (docs/benchmarks.md).
        devices: For 1, 2, 4 and 8 of them.
        way_out: With which settings one device would do, where it does not; None too where there are none.
    """

    device: str
    dtype: str
    seq_len: int
    batch_size: int
    limit_bytes: int | None
    flops_per_token: int
    flops_per_s: float | None
    share: float
    devices: list[DevicePlan]
    way_out: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """An anchor's sizes and a run's settings, all resolved."""

    config: PlanConfig
    sizes: training.Sizes
    budget: training.Budget
    device: str
    dtype: str

    def step(self, processes: int, **changes: Any) -> training.Step:
        """Return how each of so many processes takes its part in a step: of every micro-batch, as many rows."""
        config, together = self.config, min(self.budget.micro_batch, self.budget.batch_size)
        found = training.Step(
            tokens=-(-together // processes) * self.budget.seq_len,
            seq_len=self.budget.seq_len,
            item_bytes=2 if self.dtype == "bfloat16" else 4,
            rank=config.rank,
            recompute=config.recompute,
            accumulates=together < self.budget.batch_size,
            public_share=config.public_mix if config.public_match else 0.0,
            on_card=self.device == "cuda",
            processes=processes,
        )
        return replace(found, **changes)

    def memory(self, step: training.Step) -> dict[str, int]:
        """Return bytes by part, with what is no tensor."""
        parts = training.memory_of_step(self.sizes, step)
        fleeting = parts["activations"] + parts["logits"] + parts["workspace"]
        unused = {} if step.on_card else {"unused": round(_UNUSED * fleeting)}
        return {**parts, **unused, "program": _PROGRAM_BYTES[self.device]}


def plan_training(config: PlanConfig) -> TrainingPlan:
    """Return what training would take, reading nothing but the anchor's config.json, here or on the Hub.

    A CUDA device that is not here can be planned for too: memory is told, and time where a rate is stated.

    Raises:
        UsageError: A setting is wrong, or not even eight devices of this kind would hold it.
        BundleError: There is no config.json, or no expert can be trained against such a model.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    if config.dp_epsilon is not None:
        raise UsageError("is not known for runs with `dp_epsilon`", hint="leave one of them out", field="plan")
    anchor = config.anchor or workspace.find().anchor
    if not hub.is_remote(anchor) and not anchor.is_dir():
        raise UsageError(f"{anchor}: no such directory", hint="name an anchor or a stock checkpoint by `anchor`")
    dense = read_dense_config(hub.fetch_config(anchor) if hub.is_remote(anchor) else anchor)
    sizes = training.Sizes.of(model.resolve_moe_config(dense))
    refuse_useless_rank(config.rank, _architecture(sizes))
    machine, is_here = _machine(config, dense)
    device, dtype = machine.device.type, _name(machine.dtype)
    longest = dense.get("max_position_embeddings")
    budget = budget_of(config, available_tokens=_ENDLESS, hidden_size=sizes.hidden, longest=longest)
    run = _Run(config=config, sizes=sizes, budget=budget, device=device, dtype=dtype)
    limit = _memory_bytes(machine.device) if is_here else None
    if is_here:
        _refuse(run, run.step(_DEVICES[-1]), _most_bytes(machine.device))
    full, low = _SHARES[device, dtype]
    share = full if config.rank is None else low
    measured = matmul_flops_per_s(machine.device, machine.dtype) if is_here and not config.plan_tflops else None
    rate = config.plan_tflops * 1e12 if config.plan_tflops else measured
    flops = training.flops_per_token(sizes, budget.seq_len, config.rank, recompute=config.recompute)
    alone_s = flops * 1e6 / (rate * share) if rate else None
    devices = [_on(run, count, limit, alone_s) for count in _DEVICES]
    return TrainingPlan(
        device=device,
        dtype=dtype,
        seq_len=budget.seq_len,
        batch_size=budget.batch_size,
        limit_bytes=limit,
        flops_per_token=flops,
        flops_per_s=rate,
        share=share,
        devices=devices,
        way_out=_way_out(run, run.step(1), limit) if limit is not None and not devices[0].fits else None,
    )


def refuse_what_cannot_fit(config: PlanConfig, moe_config: Mapping[str, Any], machine: Machine) -> None:
    """Refuse a run that the device cannot hold, by what it takes at the least: one that would fit is never refused.

    Where a launcher started several processes, by what each of them takes at the least.

    Args:
        config: Its settings.
        moe_config: The anchor's, from its manifest.
        machine: What it is to run on.

    Raises:
        UsageError: It cannot fit; the hint says what would, by the estimate.
    """
    sizes = training.Sizes.of(moe_config)
    longest = moe_config.get("max_position_embeddings")
    budgets = [
        budget_of(config, available_tokens=tokens, hidden_size=sizes.hidden, longest=longest)
        for tokens in (_ENDLESS, 0)
    ]
    run, least = (
        _Run(config=config, sizes=sizes, budget=budget, device=machine.device.type, dtype=_name(machine.dtype))
        for budget in budgets
    )
    # Under a guarantee documents may be of any length.
    step = least.step(launched()[1], **({"tokens": 0} if config.dp_epsilon is not None else {}))
    _refuse(run, step, _most_bytes(machine.device) // (1 if step.on_card else launched_here()))


def _on(run: _Run, count: int, limit: int | None, alone_s: float | None) -> DevicePlan:
    step = run.step(count)
    parts = run.memory(step)
    memory = sum(parts.values())
    return DevicePlan(
        devices=count,
        sequences=step.tokens // step.seq_len,
        memory_bytes=memory,
        parts_bytes=parts,
        fits=None if limit is None else memory <= limit,
        million_tokens_s=None if alone_s is None else alone_s * step.tokens / run.step(1).tokens,
    )


def _refuse(run: _Run, step: training.Step, most: int) -> None:
    least = training.least_bytes(run.sizes, step)
    if least > most:
        takes = f"each of {step.processes} processes takes" if step.processes > 1 else "training takes"
        has = (
            "the card has" if step.on_card else f"this machine has{' for each' * (step.processes > 1)}, swap included,"
        )
        raise UsageError(
            f"{takes} at least {_gb(least)} of memory, and {has} {_gb(most)}",
            hint=_hint(run, run.step(step.processes), most),
        )


def _hint(run: _Run, step: training.Step, limit: int) -> str:
    if run.config.dp_epsilon is not None:  # such steps are others, which no estimate is of, and in one process
        return f"use a {'' if step.rank is None else 'lower '}`rank`, or a smaller anchor"
    way_out = _way_out(run, step, limit)
    if way_out is None:
        return "use more devices, or a smaller anchor: docs/scaling.md"
    return f"{way_out}; `plan` says what more devices would do"


def _way_out(run: _Run, step: training.Step, limit: int) -> str | None:
    """Return the least change of settings with which it fits by the estimate; None where there is none."""
    several = run.budget.batch_size > 1
    lean: dict[str, Any] = {"recompute": True, "tokens": step.seq_len, "accumulates": several}
    changes: list[tuple[str, dict[str, Any]]] = [("`recompute` and `micro_batch` 1", lean)]
    if step.rank is None:
        changes += [
            (f"`recompute` and `batch_tokens` {step.seq_len}", {**lean, "accumulates": False}),
            (f"`rank` {_USUAL_RANK}", {"rank": _USUAL_RANK}),
            (f"`rank` {_USUAL_RANK}, `recompute` and `micro_batch` 1", {"rank": _USUAL_RANK, **lean}),
        ]
    for names, change in changes:
        memory = sum(run.memory(replace(step, **change)).values())
        if memory <= limit:
            return f"with {names} it takes about {_gb(memory)}"
    return None


def _machine(config: PlanConfig, dense: Mapping[str, Any]) -> tuple[Machine, bool]:
    """Return what the run is for, and whether it is here: a card need not be."""
    import torch

    if re.fullmatch(r"cuda(:\d+)?", config.device) and not torch.cuda.is_available():
        card = torch.device("cuda")
        return Machine(device=card, dtype=model.pick_dtype(config.dtype, card), autocast=None), False
    stored = str(dense.get("dtype") or dense.get("torch_dtype"))
    weights = {"": TensorType({"bfloat16": "BF16", "float16": "F16"}.get(stored, "F32"), ())}
    return machine_of(config, weights), True


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return memory_bytes()


def _most_bytes(device: torch.device) -> int:
    """Return what can be had of a device at the very most: of a CPU's, what it can swap out to as well."""
    swap = meminfo_bytes("SwapTotal") if device.type == "cpu" else None
    return _memory_bytes(device) + (swap or 0)


def _architecture(sizes: training.Sizes) -> Architecture:
    return Architecture(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        vocab_size=sizes.vocab,
        dtype="F32",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
