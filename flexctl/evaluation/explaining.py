"""Who answered: each expert's share token by token, and what each token adds to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Piece", "ShareCollector", "explain_tokens", "texts_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One token's text and each expert's share in it, mean over layers."""

    text: str
    shares: dict[str, float]


class ShareCollector:
    """Collects each expert's share at the last positions of every forward pass, mean over layers.

    Args:
        num_layers: Routed blocks of the model.
        positions: How many positions count, from the end; None is all.

    Attributes:
        rows: A row a position, shares that add up to 1, (num_experts,).
    """

    def __init__(self, num_layers: int, positions: int | None = None) -> None:
        self.rows: list[list[float]] = []
        self._layers = num_layers
        self._positions = positions
        self._sum: Tensor | None = None

    def __call__(self, layer: int, _inputs: Tensor, kept: Tensor, _outputs: Tensor) -> None:
        """Observe one block: see ``model.routed.Observer``."""
        last = kept[-self._positions :].double() if self._positions else kept.double()
        last = last / last.sum(dim=1, keepdim=True)
        self._sum = last if layer == 0 or self._sum is None else self._sum + last
        if layer == self._layers - 1:
            self.rows += (self._sum / self._layers).tolist()

    def mean(self, names: Sequence[str]) -> dict[str, float]:
        """Return expert -> share, mean over all rows."""
        columns = zip(*self.rows, strict=True)
        return {name: sum(column) / len(column) for name, column in zip(names, columns, strict=True)}


def explain_tokens(
    model: nn.Module, tokenizer: Any, tokens: Sequence[int], names: Sequence[str], seq_len: int
) -> list[Piece]:
    """Return the pieces of a text with the shares of the positions that each was predicted from.

    Windows are those of scoring: docs/how-it-works.md, section 7.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        tokenizer: Its tokenizer.
        tokens: t_0 .. t_n, as ``training.tokens`` frames them; t_0 is fed and not shown.
        names: Of the model's experts.
        seq_len: Window length.
    """
    import torch

    from flexctl.model.routed import observing, routed_layers

    collected = ShareCollector(len(routed_layers(model)))
    device = next(model.parameters()).device
    with torch.no_grad(), observing(model, collected):
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : min(start + seq_len, len(tokens) - 1)]
            model.base_model(torch.tensor([window], device=device), use_cache=False)  # type: ignore[operator]
    return [
        Piece(text=text, shares=dict(zip(names, row, strict=True)))
        for text, row in zip(texts_of(tokenizer, tokens[1:]), collected.rows, strict=True)
    ]


def texts_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return what each token adds to the text, so that the pieces joined are the text."""
    texts, so_far = [], ""
    for end in range(1, len(tokens) + 1):
        longer = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        if longer.endswith("\ufffd") and end < len(tokens):
            texts.append("")
            continue
        texts.append(longer[len(so_far) :])
        so_far = longer
    return texts
