"""What models run on, as a command's Config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import model
from flexctl.processes import ALONE, World
from flexctl.steps.speed import bfloat16_pays

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Machine", "MachineConfig", "machine_of"]


class MachineConfig(Protocol):
    """What a command's Config says about the machine."""

    @property
    def threads(self) -> int | None:
        """CPU threads; None is torch's own choice."""

    @property
    def device(self) -> str:
        """auto, cpu, cuda or cuda:N."""

    @property
    def dtype(self) -> str:
        """auto, float32 or bfloat16."""


class Stored(Protocol):
    """A tensor on disk."""

    @property
    def dtype(self) -> str:
        """Name in safetensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device, and how numbers are kept on it.

    Attributes:
        device: Where models run.
        dtype: Of their weights.
        autocast: Of matrix products in training; None for the weights' own.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None

    def build(self, weights: model.WeightSource, world: World = ALONE) -> nn.Module:
        """Return a frozen model in evaluation mode, as from ``model.build_sharded``, ready to run here."""
        return model.build_sharded(weights, device=self.device, dtype=self.dtype, world=world)

    @property
    def identity(self) -> dict[str, Any]:
        """What of the machine decides a figure's last bits."""
        import torch

        is_card = self.device.type == "cuda"
        processor = torch.cuda.get_device_name(self.device) if is_card else torch.backends.cpu.get_cpu_capability()
        return {"processor": processor, "threads": torch.get_num_threads(), "dtype": str(self.dtype)}


def machine_of(config: MachineConfig, tensors: Mapping[str, Stored] | None = None) -> Machine:
    """Return what a command is to run on; from here on torch uses as many threads as it asks for.

    On a CPU, ``dtype`` auto is bfloat16 where the weights are stored in it, so that none is rounded, and the processor
    multiplies it faster, which is measured once; else float32.

    Args:
        config: Asks for it.
        tensors: Weights that are to run, by name; None where it only matters that the machine is there.

    Raises:
        UsageError: There is no such device here, or no such dtype.
    """
    device, name = model.pick_device(config.device), config.dtype
    model.set_threads(config.threads)
    if name == "auto" and device.type == "cpu" and _are_bfloat16(tensors) and bfloat16_pays():
        name = "bfloat16"
    return Machine(device=device, dtype=model.pick_dtype(name, device), autocast=model.autocast_dtype(name, device))


def _are_bfloat16(tensors: Mapping[str, Stored] | None) -> bool:
    return bool(tensors) and all(tensor.dtype == "BF16" for tensor in (tensors or {}).values())
