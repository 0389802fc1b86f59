"""What is added to a model's router logits: a row a token, 0 for an expert that may answer and -inf for the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flexctl.serving.vllm.masks import masked

__all__ = ["ROWS", "Rows"]


class Rows:
    """One table for all layers of a process, (tokens, num_experts), float32.

    It stays where it is in memory, so that what was compiled or captured with it reads what is filled in later. An
    expert at -inf has probability 0. Where fewer may answer than a token keeps, it is kept with weight 0.
    """

    def __init__(self) -> None:
        self._table: Tensor | None = None
        self._filled: tuple[tuple[str, int], ...] = ()

    def table(self, tokens: int, num_experts: int, device: torch.device) -> Tensor:
        """Return the table, made at first use for batches of up to ``tokens``.

        Raises:
            RuntimeError: Routers of this model differ in their number of experts.
        """
        if self._table is None:
            self._table = torch.zeros(tokens, num_experts, dtype=torch.float32, device=device)
        if self._table.shape[1] != num_experts:
            raise RuntimeError(f"flexctl: routers of {self._table.shape[1]} and of {num_experts} experts in one model")
        return self._table

    def fill(self, masks: Sequence[str], counts: Sequence[int]) -> None:
        """Write the rows of the next forward pass.

        Args:
            masks: Of each request in the batch, in the order of its tokens.
            counts: Tokens of each request.

        Raises:
            RuntimeError: A request has a mask, and this model no router that takes one.
        """
        batch = tuple(zip(masks, map(int, counts), strict=True)) if any(masks) else ()
        if batch == self._filled:
            return
        if self._table is None:
            raise RuntimeError("flexctl: a request has a mask, and no router of this model takes one")
        self._filled = batch
        if not batch:
            self._table.zero_()  # all of it: later batches without a mask are longer, and write nothing
            return
        rows = np.zeros((len(masks), self._table.shape[1]), np.float32)
        for row, mask in zip(rows, masks, strict=True):
            row[list(masked(mask))] = -np.inf
        filled = torch.from_numpy(rows.repeat(counts, axis=0))
        if self._table.device.type == "cuda":
            filled = filled.pin_memory()  # a buffer of its own for each step, so that the copy need not be waited for
        self._table[: len(filled)].copy_(filled, non_blocking=True)


ROWS = Rows()
"""Of this process."""
