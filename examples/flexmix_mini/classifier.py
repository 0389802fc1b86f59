"""The prompt classifier that `flexctl evaluate --baselines` routes prompts with: how it is fitted and written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flexctl.bundle.store import new_file
from flexctl.evaluation.baselines import PromptClassifier
from flexctl.routing.space import SHRINKAGE


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


def save_classifier(classifier: PromptClassifier, path: Path) -> None:
    """Write a classifier as safetensors, as ``PromptClassifier.load`` reads it."""
    with new_file(path, overwrite=True) as temporary:
        save_file(
            {"rows": classifier.rows, "offset": classifier.offset}, temporary, {"names": json.dumps(classifier.names)}
        )
