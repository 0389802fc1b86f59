"""The routed feed-forward block: public and closed experts behind one router.

Shapes: T tokens, H hidden_size, N num_experts (0 is public), K experts that are kept for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Observer",
    "RoutedFeedForward",
    "Router",
    "Together",
    "TokenMask",
    "exclude",
    "masking",
    "observing",
    "routed_layers",
    "same_in_bfloat16",
    "set_top_k",
    "token_mask",
]

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (layer, inputs (T, H), kept probabilities (T, N), outputs (T, H)) of each block."""

Together = Callable[[Tensor, Tensor, Tensor], Tensor]
"""All experts of a layer: inputs (T, H), which experts run (T, K), their weights (T, K) -> weighted sums (T, H)."""

Joined = Callable[[Tensor, Tensor], Tensor]
"""All experts on all tokens, where they share matrices: inputs (T, H), their weights (T, N) -> weighted sums (T, H)."""

TOGETHER_ROWS = 1024
"""Of two tokens and more, up to so many times K are computed by ``Together``; others expert by expert.

By measurement: expert by expert a GPU is faster at 2 and at 2,048 rows, and slower at 16 (docs/benchmarks.md).
"""


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Who may not run on which tokens of one forward pass. Made by ``token_mask``.

    Attributes:
        barred: Whether an expert may not run on a token, (T, N), bool.
        tokens: By expert, the tokens that it may run on, ascending, (t,), int64; None is all.
    """

    barred: Tensor
    tokens: tuple[Tensor | None, ...]


class _Chosen(NamedTuple):
    """Who runs on each token, likeliest first: kept probabilities (T, K), float32, and experts (T, K), int64."""

    shares: Tensor
    experts: Tensor


class Router(nn.Module):
    """Router rows: the public one, which stays as it is, and one for each closed expert.

    Args:
        rows: (N, H), float32.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.public = nn.Buffer(rows[:1].detach().clone().float())
        self.closed = nn.Parameter(rows[1:].detach().clone().float(), requires_grad=False)
        self._joined: Tensor | None = None
        self._joined_of: tuple[int, int, int] | None = None

    @property
    def rows(self) -> Tensor:
        """All rows, (N, H), float32; not to be written to. Put together again only where one of them has changed."""
        if self.closed.requires_grad or self.closed.is_inference():
            return torch.cat([self.public, self.closed])
        now = (self.closed.data_ptr(), self.closed._version, self.public._version)
        if self._joined is None or now != self._joined_of:
            self._joined, self._joined_of = torch.cat([self.public, self.closed]), now
        return self._joined

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (T, N), float32, for inputs (T, H) of any floating dtype."""
        if not torch.is_autocast_enabled(inputs.device.type):
            return F.linear(inputs.float(), self.rows)
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), self.rows)


class RoutedFeedForward(nn.Module):
    """Mixture of dense feed-forward networks, as FlexOlmo, Mixtral and Qwen3-MoE compute it.

    Args:
        experts: Feed-forward modules (T, H) -> (T, H), the public one first.
        router: Their rows.
        top_k: Experts kept for each token; more than there are means all.
        renormalise: Whether kept probabilities are divided by their sum.

    Attributes:
        excluded: Experts that are left out of every token.
        mask: Experts that are left out of some tokens.
        together: All experts at once, where a device has a kernel for that.
        joined: All experts where they share matrices.

    Source: FlexOlmo section 3.1; Transformers' classes of the same families.
    """

    _barred: Tensor | None

    def __init__(self, experts: Iterable[nn.Module], router: Router, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.top_k = top_k
        self.renormalise = renormalise
        self.excluded: frozenset[int] = frozenset()
        self.register_buffer("_barred", None, persistent=False)
        self.mask: TokenMask | None = None
        self.together: Together | None = None
        self.joined: Joined | None = None
        self.layer = 0
        self.observer: Observer | None = None

    @property
    def is_cut(self) -> bool:
        """Whether fewer experts run on a token than there are."""
        return self.top_k < len(self.experts) - len(self.excluded)

    @property
    def _num_kept(self) -> int:
        """K."""
        return min(self.top_k, len(self.experts) - len(self.excluded))

    def exclude(self, indices: Sequence[int]) -> None:
        """Leave experts out from now on; none is to leave out nobody."""
        self.excluded = frozenset(indices)
        # Made once, as a layer would wait for the device otherwise.
        barred = _barred(indices, len(self.experts)).to(self.router.public.device)
        self._barred = barred if self.excluded else None

    def route(self, inputs: Tensor) -> Tensor:
        """Return kept probabilities (T, N), float32, zero for experts that do not run on a token."""
        return self.keep(self.router(inputs))

    def keep(self, logits: Tensor) -> Tensor:
        """Return kept probabilities (T, N) for router logits (T, N), float32."""
        shares = self._shares(logits)
        return self._kept(shares, self._choose(shares) if self.is_cut else None)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weighted sum of the kept experts' outputs, shaped as ``hidden_states``."""
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
        shares = self._shares(self.router(inputs))
        together = self._together_for(inputs)
        chosen = self._choose(shares) if self.is_cut or together is not None else None
        outputs = self._mix(inputs, shares, chosen, together)
        if self.observer is not None:
            self.observer(self.layer, inputs, self._kept(shares, chosen), outputs)
        return outputs.reshape(hidden_states.shape)

    def _shares(self, logits: Tensor) -> Tensor:
        """Return the probabilities of those that may run, (T, N)."""
        if self._barred is not None:
            logits = logits.masked_fill(self._barred, float("-inf"))
        if self.mask is not None:
            logits = logits.masked_fill(self.mask.barred, float("-inf"))
        return logits.softmax(dim=-1)

    def _choose(self, shares: Tensor) -> _Chosen:
        kept, experts = shares.topk(self._num_kept, dim=-1)
        return _Chosen(self._scaled(kept), experts)

    def _scaled(self, shares: Tensor) -> Tensor:
        return shares / shares.sum(dim=-1, keepdim=True) if self.renormalise else shares

    def _kept(self, shares: Tensor, chosen: _Chosen | None) -> Tensor:
        """Return kept probabilities (T, N); nobody chosen means that all are kept."""
        if chosen is None:
            return self._scaled(shares)
        return torch.zeros_like(shares).scatter(1, chosen.experts, chosen.shares)

    def _together_for(self, inputs: Tensor) -> Together | None:
        """Return what runs all experts at once, where these inputs are better off by it."""
        fits = len(inputs) > 1 and len(inputs) * self._num_kept <= TOGETHER_ROWS
        return self.together if fits and not torch.is_grad_enabled() else None

    def _mix(self, inputs: Tensor, shares: Tensor, chosen: _Chosen | None, together: Together | None) -> Tensor:
        if len(self.experts) == 1 and not self.renormalise:
            alone: Tensor = self.experts[0](inputs)
            return alone
        if chosen is None:
            return (self.joined or self._mix_all)(inputs, self._scaled(shares))
        if together is not None:
            return together(inputs, self._runners(chosen), chosen.shares)
        return self._mix_one(inputs, chosen) if len(inputs) == 1 else self._mix_cut(inputs, chosen)

    def _mix_all(self, inputs: Tensor, probabilities: Tensor) -> Tensor:
        """Return the sum where every expert runs on all tokens that it may run on."""
        outputs: Tensor | None = None
        for index, expert in enumerate(self.experts):
            if index in self.excluded:
                continue
            weight = probabilities[:, index : index + 1].to(inputs.dtype)
            tokens = None if self.mask is None else self.mask.tokens[index]
            if tokens is None:
                part = weight * expert(inputs)
                outputs = part if outputs is None else outputs + part
            elif len(tokens):
                outputs = torch.zeros_like(inputs) if outputs is None else outputs
                outputs = outputs.index_add(0, tokens, weight[tokens] * expert(inputs[tokens]))
        assert outputs is not None, "the public expert runs on every token"
        return outputs

    def _mix_cut(self, inputs: Tensor, chosen: _Chosen) -> Tensor:
        """Return the sum where experts run on some tokens each: sorted by expert at once, so a device waits once."""
        nobody = len(self.experts)
        whose = self._whose(chosen).flatten()
        order = whose.argsort(stable=True)
        counts = (whose[:, None] == torch.arange(nobody + 1, device=inputs.device)).sum(dim=0).tolist()
        tokens = order // chosen.experts.shape[1]
        weights = chosen.shares.flatten()[order, None].to(inputs.dtype)
        outputs = torch.zeros_like(inputs)
        parts = zip(self.experts, tokens.split(counts), weights.split(counts), strict=False)
        for expert, places, weight in parts:
            if len(places):
                outputs.index_add_(0, places, weight * expert(inputs[places]))
        return outputs

    def _mix_one(self, inputs: Tensor, chosen: _Chosen) -> Tensor:
        """Return what ``_mix_cut`` does for one token, (1, H), where there is nothing to sort or to gather."""
        whose = self._whose(chosen)[0].tolist()
        parts = [
            chosen.shares[:, place : place + 1].to(inputs.dtype) * self.experts[whose[place]](inputs)
            for place in sorted(range(len(whose)), key=whose.__getitem__)
            if whose[place] < len(self.experts)
        ]
        outputs: Tensor = reduce(torch.add, parts)
        return outputs

    def _whose(self, chosen: _Chosen) -> Tensor:
        """Return which experts run, (T, K), N where none does: one that has no share does not."""
        return chosen.experts.masked_fill(chosen.shares <= 0, len(self.experts))

    def _runners(self, chosen: _Chosen) -> Tensor:
        """Return which experts run, (T, K), where somebody has to: for one that may not, the likeliest, for nothing."""
        if self._barred is None and self.mask is None:
            return chosen.experts
        return torch.where(chosen.shares > 0, chosen.experts, chosen.experts[:, :1])


def same_in_bfloat16(block: RoutedFeedForward, inputs: Tensor, kept: Tensor) -> Tensor:
    """Return for which tokens a router that computes in bfloat16 keeps the same experts, (T,), bool.

    Args:
        block: Whose router.
        inputs: (T, H).
        kept: Kept probabilities of its own float32 router for these inputs, (T, N).
    """
    logits = F.linear(inputs.bfloat16(), block.router.rows.bfloat16())
    return ((block.keep(logits.float()) > 0) == (kept > 0)).all(dim=-1)


def routed_layers(model: nn.Module) -> list[RoutedFeedForward]:
    """Return the routed blocks of ``model``, in layer order."""
    return [module for module in model.modules() if isinstance(module, RoutedFeedForward)]


def exclude(model: nn.Module, indices: Sequence[int]) -> None:
    """Leave experts out at run time: logit -inf before the softmax, which equals removing them."""
    for block in routed_layers(model):
        block.exclude(indices)


def token_mask(rows: Iterable[tuple[Sequence[int], int]], num_experts: int, device: torch.device) -> TokenMask | None:
    """Return who may not run on which tokens; None where all may run on all.

    Args:
        rows: In the order of the tokens: experts that may not run, and on how many tokens; the public one always may.
        num_experts: N.
        device: Where the model runs.
    """
    barred = torch.cat([_barred(left_out, num_experts).expand(count, -1) for left_out, count in rows])
    if not barred.any():
        return None
    # Which tokens are whose is worked out once a pass and on the CPU, so that no layer waits for the device.
    tokens = [None if not column.any() else (~column).nonzero().squeeze(-1).to(device) for column in barred.T]
    return TokenMask(barred.to(device), tuple(tokens))


def _barred(left_out: Sequence[int], num_experts: int) -> Tensor:
    barred = torch.zeros(1, num_experts, dtype=torch.bool)
    barred[0, list(left_out)] = True
    return barred


@contextmanager
def masking(blocks: Sequence[RoutedFeedForward], mask: TokenMask | None) -> Iterator[None]:
    """Leave experts out token by token inside the ``with`` statement: for each token, as if they were removed.

    A router then keeps top_k of those that may run on the token, or all where they are fewer.

    Args:
        blocks: All of the model, as from ``routed_layers``, which walks all its modules: too slow for every pass.
        mask: Who may run on which token.
    """
    for block in blocks:
        block.mask = mask
    try:
        yield
    finally:
        for block in blocks:
            block.mask = None


def set_top_k(model: nn.Module, top_k: int) -> None:
    """Let every block keep ``top_k`` experts for each token."""
    for block in routed_layers(model):
        block.top_k = top_k


@contextmanager
def observing(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Call ``observer`` for every routed block that runs inside the ``with`` statement."""
    blocks = routed_layers(model)
    for block in blocks:
        block.observer = observer
    try:
        yield
    finally:
        for block in blocks:
            block.observer = None
