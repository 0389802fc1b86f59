"""Who answered: each expert's share token by token, and what each token adds to the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Piece", "ShareCollector", "TextStream", "explain_tokens", "mean_shares", "texts_of"]

_KEPT_TOKENS = 64
"""Tokens beside which the next one is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One token's text and each expert's share in it, mean over layers."""

    text: str
    shares: dict[str, float]

    @property
    def leader(self) -> int:
        """Index of the expert with the largest share."""
        shares = list(self.shares.values())
        return shares.index(max(shares))


class ShareCollector:
    """Collects each expert's share at the last positions of every forward pass, mean over layers.

    Args:
        num_layers: Routed blocks of the model.
        positions: How many positions count, from the end; None is all.
    """

    def __init__(self, num_layers: int, positions: int | None = None) -> None:
        self._rows: list[list[float]] = []
        self._layers = num_layers
        self._positions = positions
        self._pass: list[Tensor] = []
        self._unread: list[Tensor] = []

    def __call__(self, layer: int, _inputs: Tensor, kept: Tensor, _outputs: Tensor) -> None:
        """Observe one block: see ``model.routed.Observer``."""
        import torch

        if layer == 0:
            self._pass.clear()
        self._pass.append(kept[-self._positions :] if self._positions else kept)
        if layer == self._layers - 1:
            by_layer = torch.stack(self._pass).double()
            self._unread.append((by_layer / by_layer.sum(dim=-1, keepdim=True)).mean(dim=0))

    @property
    def rows(self) -> list[list[float]]:
        """A row a position, shares that add up to 1, (num_experts,). Who asks waits for the device; a pass does not."""
        self._rows += [row for shares in self._unread for row in shares.tolist()]
        self._unread.clear()
        return self._rows


def mean_shares(pieces: Sequence[Piece]) -> dict[str, float]:
    """Return expert -> share, mean over pieces; empty where there are none."""
    names = pieces[0].shares if pieces else ()
    return {name: sum(piece.shares[name] for piece in pieces) / len(pieces) for name in names}


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


class TextStream:
    """Turns tokens into text, one after the other; a character of several tokens comes whole, with its last one.

    A token is read beside some of those before it, as its text may depend on them. They are few, so that a token of a
    long text costs no more than one of a short text.

    Args:
        tokenizer: Whose tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = ""

    def add(self, token: int, *, is_last: bool = False) -> str:
        """Return what a token adds to the text that is final; behind the last one, all that is left is."""
        self._tokens.append(token)
        longer = self._read()
        if longer.endswith("\ufffd") and not is_last:
            return ""
        added, self._said = longer[len(self._said) :], longer
        if len(self._tokens) > _KEPT_TOKENS:
            self._tokens = self._tokens[-_KEPT_TOKENS // 2 :]
            self._said = self._read()
        return added

    def _read(self) -> str:
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        return text


def texts_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return what each token adds to the text, so that the pieces joined are the text."""
    stream = TextStream(tokenizer)
    return [stream.add(token, is_last=end == len(tokens)) for end, token in enumerate(tokens, start=1)]
