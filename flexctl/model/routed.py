"""The routed feed-forward block: public and closed experts behind one router.

Shapes: T tokens, H hidden_size, N num_experts (0 is public), K num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "Observer",
    "RoutedFeedForward",
    "Router",
    "exclude",
    "observing",
    "routed_layers",
    "same_in_bfloat16",
    "set_top_k",
]

Observer = Callable[[int, Tensor, Tensor, Tensor], None]
"""Called with (layer, inputs (T, H), kept probabilities (T, N), outputs (T, H)) of each block."""


class Router(nn.Module):
    """Router rows: the public one, which stays as it is, and one for each closed expert.

    Args:
        rows: (N, H), float32.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.public = nn.Buffer(rows[:1].detach().clone().float())
        self.closed = nn.Parameter(rows[1:].detach().clone().float(), requires_grad=False)

    @property
    def rows(self) -> Tensor:
        """All rows, (N, H), float32."""
        return torch.cat([self.public, self.closed])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (T, N), float32, for inputs (T, H) of any floating dtype."""
        with torch.autocast(inputs.device.type, enabled=False):
            return F.linear(inputs.float(), self.rows)


class RoutedFeedForward(nn.Module):
    """Mixture of dense feed-forward networks, as FlexOlmo, Mixtral and Qwen3-MoE compute it.

    Args:
        experts: Feed-forward modules (T, H) -> (T, H), the public one first.
        router: Their rows.
        top_k: Experts kept for each token; more than there are means all.
        renormalise: Whether kept probabilities are divided by their sum.

    Source: FlexOlmo section 3.1; Transformers' classes of the same families.
    """

    def __init__(self, experts: Iterable[nn.Module], router: Router, top_k: int, renormalise: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.top_k = top_k
        self.renormalise = renormalise
        self.excluded: frozenset[int] = frozenset()
        self.layer = 0
        self.observer: Observer | None = None

    @property
    def is_cut(self) -> bool:
        """Whether fewer experts run on a token than there are."""
        return self.top_k < len(self.experts) - len(self.excluded)

    def route(self, inputs: Tensor) -> Tensor:
        """Return kept probabilities (T, N), float32, zero for experts that do not run on a token."""
        return self.keep(self.router(inputs))

    def keep(self, logits: Tensor) -> Tensor:
        """Return kept probabilities (T, N) for router logits (T, N), float32."""
        if self.excluded:
            logits = logits.index_fill(1, logits.new_tensor(sorted(self.excluded)).long(), float("-inf"))
        probabilities: Tensor = logits.softmax(dim=-1)
        if self.is_cut:
            chosen = probabilities.topk(self.top_k, dim=-1)
            probabilities = torch.zeros_like(probabilities).scatter(1, chosen.indices, chosen.values)
        if self.renormalise:
            probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
        return probabilities

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the weighted sum of the kept experts' outputs, shaped as ``hidden_states``."""
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
        probabilities = self.route(inputs)
        if len(self.experts) == 1 and not self.renormalise:
            outputs: Tensor = self.experts[0](inputs)
        else:
            outputs = self._mix(inputs, probabilities)
        if self.observer is not None:
            self.observer(self.layer, inputs, probabilities, outputs)
        return outputs.reshape(hidden_states.shape)

    def _mix(self, inputs: Tensor, probabilities: Tensor) -> Tensor:
        outputs = torch.zeros_like(inputs)
        for index, expert in enumerate(self.experts):
            if index in self.excluded:
                continue
            weight = probabilities[:, index : index + 1].to(inputs.dtype)
            if not self.is_cut:
                outputs = outputs + weight * expert(inputs)
                continue
            tokens = probabilities[:, index].nonzero().squeeze(-1)
            if len(tokens):
                outputs = outputs.index_add(0, tokens, weight[tokens] * expert(inputs[tokens]))
        return outputs


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
        block.excluded = frozenset(indices)


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
