"""Prompt routing: a classifier on the embedding of a text, which picks one of several models for it.

Shapes: D texts, L num_hidden_layers, H hidden_size, N classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.errors import BundleError
from flexctl.routing.space import measure_documents
from flexctl.text.tokens import Framed

__all__ = ["PromptClassifier"]

_TOGETHER = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptClassifier:
    """Linear discriminants on a text's mean router inputs, one for each layer, averaged.

    Attributes:
        names: Of the classes, ``public`` first.
        rows: (L, N, H), float64.
        offset: (L, N), float64.
    """

    names: tuple[str, ...]
    rows: Tensor
    offset: Tensor

    @property
    def digest(self) -> str:
        """A digest of names and numbers."""
        hasher = hashlib.sha256(json.dumps(self.names).encode())
        for part in (self.rows, self.offset):
            hasher.update(part.numpy().tobytes())
        return f"sha256:{hasher.hexdigest()}"

    def logits(self, embedded: Tensor) -> Tensor:
        """Return (D, N), float64, for mean router inputs (D, L, H)."""
        return (torch.einsum("dlh,lnh->dln", embedded.double(), self.rows) + self.offset).mean(dim=1)

    def read(self, anchor: nn.Module, texts: Iterable[Framed]) -> Tensor:
        """Return the logits of texts, (D, N), float64; embeddings of some are in memory at a time.

        Args:
            anchor: Whose router inputs are the embedding.
            texts: At least two tokens each.
        """
        logits = []
        stream = (torch.from_numpy(text.tokens) for text in texts)
        while tokens := list(islice(stream, _TOGETHER)):
            # Measuring takes two documents or more; the first is given twice and left out.
            logits.append(self.logits(measure_documents(anchor, [tokens[0], *tokens])[1:]))
        return torch.cat(logits)

    @classmethod
    def load(cls, path: Path) -> PromptClassifier:
        """Return the classifier in a file, as examples/flexmix_mini fits and writes it.

        Raises:
            BundleError: It is no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names: Any = json.loads(file.metadata()["names"])
                return cls(names=tuple(names), rows=file.get_tensor("rows"), offset=file.get_tensor("offset"))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"{path}: holds no prompt classifier: {error}", hint="fit it again") from error
