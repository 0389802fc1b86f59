"""Noise that nobody can subtract: from secret bits, on a grid that tells nothing of what it was added to.

Secret bits are AES-256 in counter mode under a key of the system's entropy, so each step has its own, a resumed run
draws what it drew before, and nothing comes from ``seed``. torch's generators have seeds short enough to be guessed.

A sum plus floating-point noise can betray the sum by its last bits (Mironov, "On Significance of the Least Significant
Bits for Differential Privacy", CCS 2012). So noise is drawn and added in float64, with 53 random bits for each of
radius and angle, and the result is rounded to a grid of at most 2^-16 standard deviations, the same for every corpus:
what is released is one point of it, behind which lie billions of noises. Rounding takes nothing from the guarantee, as
it comes after the noise.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Secret", "Stream", "noisy"]

Numbers = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]

KEY_BYTES = 32
_GRID_BITS = 16
_PURPOSES = ("sample", "steps", "rows")
_ZEROS = memoryview(bytes(1 << 20))


class Stream:
    """Secret bits, as many as are asked for, one after the other."""

    def __init__(self, key: bytes, start: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        self._cipher = Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()

    def words(self, count: int) -> Words:
        """Return random words, (count,), uint64."""
        # The library wants room for one block more than it writes.
        found = np.empty(count + 2, dtype=np.uint64)
        place = memoryview(found.view(np.uint8))  # type: ignore[arg-type]  # a buffer, says numpy since 3.12 alone
        for start in range(0, 8 * count, len(_ZEROS)):
            piece = _ZEROS[: 8 * count - start]
            self._cipher.update_into(piece, place[start:])
        return found[:count]

    def chosen(self, count: int, probability: float) -> Numbers:
        """Return which of ``count`` things are chosen, each by itself with a probability rounded down to 2^-64."""
        below = int(probability * 2.0**64)
        taken = self.words(count) <= np.uint64(below - 1) if below else np.zeros(count, dtype=bool)
        return np.flatnonzero(taken).astype(np.int64)

    def normal(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return standard normal numbers, float64.

        Source: Box and Muller (1958).
        """
        count = math.prod(shape)
        pairs = (count + 1) // 2
        words = torch.from_numpy(self.words(2 * pairs).view(np.int64)).to(device)
        bits = (words >> 11) & (2**53 - 1)
        radius = (-2 * ((bits[:pairs] + 1).double() * 2.0**-53).log()).sqrt()
        angle = bits[pairs:].double() * (2.0**-53 * 2 * math.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count].reshape(shape)


class Secret:
    """A key that one run's secret bits come from.

    Args:
        key: 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def new_key(cls) -> bytes:
        """Return 32 bytes of the system's entropy."""
        return secrets.token_bytes(KEY_BYTES)

    def stream(self, purpose: str, step: int = 0) -> Stream:
        """Return the secret bits of one purpose (sample, steps, rows) in one step; always the same ones."""
        start = bytes([_PURPOSES.index(purpose)]) + step.to_bytes(7, "big") + bytes(8)
        return Stream(self._key, start)


def noisy(total: Tensor, deviation: float, stream: Stream) -> Tensor:
    """Return a sum with Gaussian noise of a standard deviation, on the grid, float64.

    Args:
        total: The sum, of any floating dtype.
        deviation: Of the noise, above 0.
        stream: Where its bits come from.
    """
    grid = 2.0 ** (math.floor(math.log2(deviation)) - _GRID_BITS)
    return ((total.double() + deviation * stream.normal(total.shape, total.device)) / grid).round() * grid
