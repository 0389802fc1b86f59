"""Prompt routing: a classifier on the embedding of a text, which picks one of several models for it.

Shapes: D texts, L num_hidden_layers, H hidden_size, N classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexctl.bundle.store import new_file
from flexctl.errors import BundleError
from flexctl.routing.space import SHRINKAGE, measure_documents
from flexctl.text.tokens import Framed

__all__ = ["PromptClassifier", "fit_classifier"]

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

    def save(self, path: Path) -> None:
        """Write the classifier as safetensors."""
        from safetensors.torch import save_file

        with new_file(path, overwrite=True) as temporary:
            save_file({"rows": self.rows, "offset": self.offset}, temporary, {"names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: Path) -> PromptClassifier:
        """Return the classifier in a file that ``save`` wrote.

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


def fit_classifier(embedded: Mapping[str, Tensor]) -> PromptClassifier:
    """Return the linear discriminants of classes that are equally likely.

    Args:
        embedded: Mean router inputs of each class's texts, (D, L, H), at least two texts a class.

    Source: linear discriminant analysis with the covariance pooled within classes, and shrunk as the router space is.
    """
    means = torch.stack([texts.double().mean(dim=0) for texts in embedded.values()], dim=1)
    apart = torch.cat([texts.double() - texts.double().mean(dim=0) for texts in embedded.values()])
    centre = means.mean(dim=1, keepdim=True)
    rows, offset = [], []
    for layer, middle in enumerate(centre):
        spread = apart[:, layer]
        covariance = spread.T @ spread / max(1, len(spread) - len(embedded))
        ridge = SHRINKAGE * covariance.diagonal().mean() + 1e-12
        from_centre = means[layer] - middle
        row = torch.linalg.solve(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64), from_centre.T).T
        rows.append(row)
        offset.append(-((from_centre / 2 + middle) * row).sum(dim=1))
    return PromptClassifier(names=tuple(embedded), rows=torch.stack(rows), offset=torch.stack(offset))
