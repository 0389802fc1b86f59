"""The processes that share a run: one, unless a launcher such as torchrun started several.

Each of several does the same on the same settings. Batches are the same for all, whatever their number; each process
takes its part of a batch's rows, and what is summed over rows is summed over processes. One of them writes.

Nothing distributed is imported where there is one process.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import handling

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import ProcessGroup, Store

__all__ = ["ALONE", "Echo", "Joined", "Part", "World", "launched", "launched_here", "refuse_many"]

Value = TypeVar("Value")

_PATIENCE = timedelta(hours=24)
"""How long processes wait for each other: one may be tokenising while the others wait. A launcher ends them sooner."""

_LAST_WORDS_S = 0.5
"""How long a process waits for another to tell why the run failed."""

_MEETINGS = itertools.count()
"""Numbers the runs that this process has had a part in, so that one does not hear what was said in another."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which rows of a batch a process takes.

    Attributes:
        numbers: Of the rows; of so many that every process has as many, row 0 standing in where rows run out.
        real: How many of them, the first ones, are the process's own.
        count: Rows of the batch.
    """

    numbers: tuple[int, ...]
    real: int
    count: int

    def of(self, rows: Tensor) -> Tensor:
        """Return the part's rows, (k, ...), of all, (count, ...)."""
        return rows if self.real == self.count else rows[list(self.numbers)]

    def marked(self, flags: Tensor) -> Tensor:
        """Return the part's flags, (k,), bool, of all, (count,); rows that stand in have none."""
        found = self.of(flags).clone()
        found[self.real :] = False
        return found

    def weights(self, columns: int) -> Tensor | None:
        """Return what each position counts, (k, columns), float32: nothing where a row stands in; None is 1 each."""
        import torch

        if self.real == len(self.numbers):
            return None
        rows = torch.arange(len(self.numbers)) < self.real
        return rows[:, None].expand(-1, columns).float()


class World:
    """The processes of a run; this class is the world of one process.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    rank = 0
    size = 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def rows(self, count: int) -> tuple[int, int]:
        """Return where this process's rows of ``count`` begin and end: ceil(count / size) of them, or what is left."""
        each = -(-count // self.size)
        return min(self.rank * each, count), min((self.rank + 1) * each, count)

    def part(self, count: int) -> Part:
        """Return this process's part of a batch of ``count`` rows."""
        first, last = self.rows(count)
        spare = -(-count // self.size) - (last - first)
        return Part((*range(first, last), *[0] * spare), last - first, count)

    @property
    def mesh(self) -> DeviceMesh:
        """All devices in one row; one process has none."""
        raise NotImplementedError

    @property
    def aside(self) -> ProcessGroup:
        """What a second thread of each process speaks by while the first ones go on; one process has none."""
        raise NotImplementedError

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of what the processes have, the same bits in each; it bears no gradient."""
        return tensor

    def gather(self, part: Part, rows: Tensor) -> Tensor:
        """Return all rows of a batch, (count, ...), in every process, of the rows that each found for its part."""
        return rows[: part.real]

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Let parameters that every process has whole have the sum of all gradients."""

    def most(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number that the processes have."""
        return numbers

    def by_writer(self, work: Callable[[], Value]) -> Value:
        """Return what ``work`` returns in the writer, or raise what it raises; the others wait for it."""
        return work()

    def writer_first(self, work: Callable[[], Value]) -> Value:
        """Return what ``work`` returns here; the others begin when the writer has ended."""
        return work()


ALONE = World()
"""The world of one process."""


class _Together(World):
    """Several processes, which have met."""

    def __init__(self, rank: int, size: int, kind: str) -> None:
        self.rank, self.size, self._kind = rank, size, kind

    @cached_property
    def mesh(self) -> DeviceMesh:
        """All devices in one row."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self._kind, (self.size,))

    @cached_property
    def aside(self) -> ProcessGroup:
        """A group of its own, over gloo: what two threads say in one would come in any order."""
        from torch import distributed

        group: ProcessGroup = distributed.new_group(backend="gloo", timeout=_PATIENCE)
        return group

    def sum(self, tensor: Tensor) -> Tensor:
        from torch import distributed

        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    def gather(self, part: Part, rows: Tensor) -> Tensor:
        mine = rows.detach()[: part.real]
        found = mine.new_zeros(part.count, *mine.shape[1:])
        found[list(part.numbers[: part.real])] = mine
        return self.sum(found)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        from torch import distributed

        for parameter in parameters:
            if parameter.grad is not None and not hasattr(parameter, "full_tensor"):
                distributed.all_reduce(parameter.grad)

    def most(self, *numbers: int) -> tuple[int, ...]:
        import torch
        from torch import distributed

        found = torch.tensor(numbers)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def by_writer(self, work: Callable[[], Value]) -> Value:
        from torch import distributed

        told: list[Any] = [None, None]
        if self.is_writer:
            try:
                told = [work(), None]
            except (FlexctlError, OSError) as error:
                told = [None, error]
        distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        value: Value = told[0]
        return value

    def writer_first(self, work: Callable[[], Value]) -> Value:
        if not self.is_writer:
            self.by_writer(lambda: None)
            return work()
        done: list[Value] = []
        self.by_writer(lambda: done.append(work()))
        return done[0]


class Echo(FlexctlError):
    """A failure that another process of the run has told of.

    Args:
        exit_code: What this process ends with.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process of the run failed")
        self.exit_code = exit_code


class Joined(AbstractContextManager[World]):
    """The world of this process, for as long as the ``with`` statement lasts.

    The first process that fails tells why; the others end with an ``Echo``.

    Args:
        device: What the command is to run on: auto, cpu or cuda.

    Raises:
        UsageError: There is no device for this process, or the launcher's variables cannot be read.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._store: Store | None = None
        self._rank, self._kind = 0, "cpu"

    def __enter__(self) -> World:
        rank, size = launched()
        if size == 1:
            return ALONE
        self._rank, self._kind = rank, _kind(self._device, rank)
        try:
            self._store = _meet(rank, size, self._kind)
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            raise FlexctlError(f"the {size} processes of the run did not find each other: {said}") from error
        return _Together(rank, size, self._kind)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is None:
            return
        with nullcontext() if error is None else handling(signal.SIG_IGN, signal.SIGTERM):
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        # What is wrong with a run is found by all at once: the first process then tells, or one that fails alone.
        tells = error is None or self._is_first_to_fail()
        if error is None or self._kind == "cpu":  # NCCL would wait here for the others, who may be gone
            from torch import distributed

            distributed.destroy_process_group()
        if not tells:
            # A launcher ends all as soon as one has ended: the one that tells why needs a moment.
            time.sleep(_LAST_WORDS_S)
            raise Echo(getattr(error, "exit_code", 1)) from error
        if isinstance(error, RuntimeError) and _is_about_a_peer(error):
            raise FlexctlError(
                "another process of the run went away",
                hint="look above for what it said; if it said nothing, the system may have run out of memory",
            ) from error

    def _is_first_to_fail(self) -> bool:
        assert self._store is not None
        time.sleep(_LAST_WORDS_S if self._rank else 0)
        try:
            return self._store.add("failed", 1) == 1
        except RuntimeError:  # who kept the store went first
            return False


def _meet(rank: int, size: int, kind: str) -> Store:
    """Connect the processes; return what they can leave word for each other in."""
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            _refuse(f"{name} is not set, and WORLD_SIZE is {size}", hint="start the run with torchrun", tells=not rank)
    found, _, _ = next(rendezvous("env://", rank, size))
    store = PrefixStore(f"flexctl-{next(_MEETINGS)}", found)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return store


def launched() -> tuple[int, int]:
    """Return this process's number and how many a launcher started, by RANK and WORLD_SIZE; (0, 1) without one.

    Raises:
        UsageError: They are no numbers, or do not fit.
    """
    size = _number("WORLD_SIZE", 1)
    if size <= 1:
        return 0, 1
    rank = _number("RANK", None)
    if rank >= size:
        raise UsageError(f"RANK is {rank} and WORLD_SIZE is {size}", hint="start the run with torchrun")
    return rank, size


def launched_here() -> int:
    """Return how many processes a launcher started on this machine, by LOCAL_WORLD_SIZE; 1 where that is not set.

    Raises:
        UsageError: It is no number.
    """
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def refuse_many(what: str) -> None:
    """Refuse to do in several processes what one does.

    Args:
        what: What is asked for, as the message begins.

    Raises:
        UsageError: There are several.
    """
    size = launched()[1]
    if size > 1:
        raise UsageError(f"{what} runs in one process; WORLD_SIZE is {size}", hint="start it without torchrun")


def _number(name: str, default: int | None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        shown = "not set" if text is None else repr(text)
        raise UsageError(f"{name} is {shown}; a launcher sets it to a whole number", hint="start the run with torchrun")
    return int(text)


def _refuse(message: str, *, tells: bool, hint: str, field: str | None = None) -> NoReturn:
    """Raise what several processes find before they have met: one tells, and the others wait until it has."""
    error = UsageError(message, hint=hint, field=field)
    if tells:
        raise error
    time.sleep(_LAST_WORDS_S)
    raise Echo(error.exit_code) from error


def _kind(device: str, rank: int) -> str:
    """Return cpu or cuda; on cuda this process has the GPU of its number on this machine from here on."""
    import torch

    if ":" in device:
        _refuse(
            f"{device} is one GPU, and each process takes its own",
            hint="use auto, cpu or cuda",
            field="device",
            tells=not rank,
        )
    if device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    number, cards = _number("LOCAL_RANK", None), torch.cuda.device_count()
    if number >= cards:
        has = f"{cards} GPU{'s' * (cards > 1)}"
        _refuse(
            f"{device}: {launched_here()} processes were started on this machine, which has {has}",
            hint=f"let torchrun start {cards} here, or use cpu",
            field="device",
            tells=number == cards,
        )
    torch.cuda.set_device(number)
    return "cuda"


def _is_about_a_peer(error: RuntimeError) -> bool:
    """Return whether it is the word of what connects processes: gloo or NCCL."""
    return "gloo" in str(error).lower() or "nccl" in str(error).lower()
