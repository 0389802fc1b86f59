"""Any bundle as something to run: an anchor, an expert beside its anchor, or a merged model."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.anchor import Anchor, open_anchor
from flexctl.bundle.expert import Expert, pair_weights
from flexctl.bundle.manifest import has_expired
from flexctl.bundle.merged import Merged
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.rights import Rights, rights_of
from flexctl.bundle.selection import Selection, select
from flexctl.bundle.weights import Weights
from flexctl.errors import UsageError
from flexctl.runtime import Reporter

__all__ = ["Runnable", "open_runnable"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Runnable:
    """A model to evaluate or to generate with.

    Attributes:
        path: The bundle; text for one on the Hub.
        digest: Its digest.
        tokenizer: Directory with the tokenizer's files.
        weights: What it consists of.
        bundles: The bundle itself, and the anchor that an expert runs beside.
    """

    path: Path | str
    digest: str
    tokenizer: Path
    weights: Weights
    bundles: tuple[Anchor | Expert | Merged, ...]

    @property
    def experts(self) -> list[str]:
        """Names of its experts, the public one first."""
        return list(self.weights.experts)

    @property
    def rights(self) -> tuple[Rights, ...]:
        """What the owners of its closed experts allow."""
        return tuple(rights for bundle in self.bundles for rights in rights_of(bundle))

    def select(self, without: Sequence[str] = (), only: Sequence[str] | None = None) -> Selection:
        """Return who may answer: see ``selection.select``."""
        return select(self.experts, self.path, without=without, only=only)

    def warn_of_expired(self, selection: Selection, reporter: Reporter) -> None:
        """Warn of each expert that may answer and whose rights are over."""
        today = datetime.date.today()
        for name, _, _, expires in self.rights:
            if has_expired(expires, today) and name not in selection.without:
                reporter.warn(f"{self.path}: the rights in {name} ended on {expires}; `without` {name} leaves it out")

    def active(self, top_k: int | None, selection: Selection, reporter: Reporter) -> int:
        """Return how many experts run on each token.

        Args:
            top_k: As asked for; None is the bundle's own number.
            selection: Who may answer.
            reporter: Warned when there are fewer than were asked for.
        """
        most = selection.count
        if top_k is not None and top_k > most:
            reporter.warn(f"`top_k`: {top_k} is more than the {most} experts there are; using {most}")
        return min(top_k or self.weights.num_experts_per_tok, most)


def open_runnable(path: Path, anchor: Path) -> Runnable:
    """Return the model behind a bundle.

    Args:
        path: An anchor's directory, an expert's file or a merged model's directory.
        anchor: Directory of the anchor, which an expert runs beside.

    Raises:
        UsageError: There is nothing at ``path``, or it is a router file.
        BundleError: It is not valid, or the expert was made for another anchor.
    """
    bundle = open_bundle(path)
    if isinstance(bundle, Expert):
        base = open_anchor(anchor)
        return Runnable(
            path=path,
            digest=bundle.digest,
            tokenizer=anchor,
            weights=pair_weights(base, bundle),
            bundles=(bundle, base),
        )
    if isinstance(bundle, Anchor | Merged):
        return Runnable(path=path, digest=bundle.digest, tokenizer=path, weights=bundle.weights(), bundles=(bundle,))
    raise UsageError(f"{path}: a router file is no model", hint="give an anchor, an expert or a merged model")
