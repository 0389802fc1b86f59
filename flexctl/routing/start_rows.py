"""Router rows from an owner's text: the three kinds of direction and their one finish.

Shapes: D passages, L num_hidden_layers, H hidden_size, E width of the sentence encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from flexctl import cache
from flexctl.errors import UsageError
from flexctl.model.building import quiet_transformers
from flexctl.model.tensors import tensors_digest
from flexctl.processes import ALONE, World
from flexctl.routing.rows import ROUTER_KINDS, OwnerInputs, Rows, discriminant, finish_rows
from flexctl.routing.space import RouterSpace, measure_documents, measure_passages
from flexctl.runtime import Reporter, software_versions

__all__ = [
    "ENOUGH_PASSAGES",
    "PASSAGES",
    "Encoder",
    "RowRecipe",
    "embed_rows",
    "encoder_direction",
    "encoder_name",
]

PASSAGES = 512
"""Passages of an owner that rows are made from, at most."""

ENOUGH_PASSAGES = 64
"""From so many on, more passages hardly make rows better: docs/results.md, section 10."""

_PUBLIC_PASSAGES = "public-passages"
"""The cache's kind of entry for what is measured of public passages."""

_EMBEDDED_AT_ONCE = 64

RIDGE = 1.0
"""Ridge penalty of the map from embeddings to router inputs, in units of documents; embeddings have length 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRecipe:
    """How router rows are made.

    Attributes:
        kind: ``discriminant``, ``hidden`` or ``encoder``.
        own_covariance: Share of the owner's own covariance beside public text's, for the discriminant.
        encoder: sentence-transformers model, a directory or Hub id; needed by the encoder kind alone.
        special_as_text: Whether passages are framed with special tokens that stand in them as plain text.
    """

    kind: str
    own_covariance: float
    encoder: str | None
    special_as_text: bool = False

    def check(self) -> None:
        """Refuse a kind that there is not, or an encoder kind without an encoder.

        Raises:
            UsageError: Likewise.
        """
        if self.kind not in ROUTER_KINDS:
            raise UsageError(
                f"{self.kind!r} is no kind", hint=f"use {', '.join(ROUTER_KINDS)}, or a .st file", field="router"
            )
        if self.kind == "encoder" and self.encoder is None:
            raise UsageError(
                "encoder: no sentence encoder given", hint="add `encoder`, a directory or Hub id", field="router"
            )

    @property
    def has_covariance(self) -> bool:
        """Whether the owner's own covariance has a part in the rows."""
        return self.kind == "discriminant" and self.own_covariance > 0

    @property
    def encoder_name(self) -> str | None:
        """What a manifest says of the encoder; None for other kinds."""
        return None if self.kind != "encoder" or self.encoder is None else encoder_name(self.encoder)


def embed_rows(
    recipe: RowRecipe,
    model: nn.Module,
    space: RouterSpace,
    own: Sequence[str],
    public: Sequence[str],
    frame: Callable[[Sequence[str]], Sequence[Tensor]],
    reporter: Reporter,
    world: World = ALONE,
) -> Rows:
    """Return calibrated router rows for an owner's sample.

    Args:
        recipe: How to make them.
        model: The anchor.
        space: Its router space.
        own: The owner's passages.
        public: Public passages; only the encoder kind reads them.
        frame: Turns passages into token ids, (S,), int64 each.
        reporter: Hears of progress.
        world: The processes that share the work.

    Raises:
        UsageError: The recipe is wrong, there are fewer than two passages, or the encoder cannot be loaded.

    Source: docs/how-it-works.md, section 4.
    """
    recipe.check()
    if len(own) < 2:
        raise UsageError(f"{len(own)} passages are too few for router rows", hint="give more text", field="data")
    if len(own) < ENOUGH_PASSAGES:
        reporter.note(f"router rows are made from {len(own)} passages; {ENOUGH_PASSAGES} and more are better")
    loaded = Encoder(recipe.encoder) if recipe.kind == "encoder" and recipe.encoder is not None else None
    # What comes after measuring is computed where the model runs too, W_i not copied.
    device = next(model.parameters()).device
    near = space.to(device)
    with reporter.progress("measuring router inputs", len(own), "passages") as bar:
        owner = _measured_own(recipe, model, frame(own), near, bar.advance, world)
    if loaded is not None:
        embedded, inputs = _measured_public(recipe, model, space, public, frame, loaded, reporter, world)
        directions = encoder_direction(_embed(loaded, own, reporter).double(), embedded.double(), inputs).to(device)
    elif recipe.kind == "discriminant":
        directions = discriminant(near, owner, recipe.own_covariance)
    else:
        directions = owner.mean - near.mean.double()
    return finish_rows(near, owner, directions).cpu()


def _measured_own(
    recipe: RowRecipe,
    model: nn.Module,
    passages: Sequence[Tensor],
    space: RouterSpace,
    advance: Callable[[int], None],
    world: World,
) -> OwnerInputs:
    """Return what the rows of a recipe need to know of an owner's passages: the covariance only where it counts."""
    if recipe.has_covariance:
        return OwnerInputs.of(measure_passages(model, passages, advance, world), space)
    return OwnerInputs.of_means(measure_documents(model, passages, advance, world), space)


def _measured_public(
    recipe: RowRecipe,
    model: nn.Module,
    space: RouterSpace,
    public: Sequence[str],
    frame: Callable[[Sequence[str]], Sequence[Tensor]],
    encoder: Encoder,
    reporter: Reporter,
    world: World,
) -> tuple[Tensor, Tensor]:
    """Return public passages' embeddings, (P, E), and mean router inputs, (P, L, H), float32 both.

    They are the same for every owner and take most of the time, so they are cached; an owner's own never are.
    """
    identity = {
        "anchor": tensors_digest({"mean": space.mean}),
        "dtype": str(next(model.parameters()).dtype),
        "encoder": encoder.identity,
        "passages": list(public),
        "special_as_text": recipe.special_as_text,
        "software": software_versions(),
    }
    known = cache.recall(_PUBLIC_PASSAGES, identity)
    if known is None:
        with reporter.progress("measuring router inputs", len(public), "passages") as bar:
            inputs = measure_documents(model, frame(public), bar.advance, world)
        embedded = _embed(encoder, public, reporter)
        known = {"embedded": embedded.numpy(), "inputs": inputs.numpy()}
        cache.remember(_PUBLIC_PASSAGES, identity, known)
    return torch.from_numpy(known["embedded"]), torch.from_numpy(known["inputs"])


def encoder_name(encoder: str) -> str:
    """Return what a manifest says of a sentence encoder: its id or folder name, never a path."""
    return Path(encoder).resolve().name if Path(encoder).exists() else encoder


def encoder_direction(own: Tensor, public: Tensor, public_inputs: Tensor) -> Tensor:
    """Return the image of (mean embedding - public mean embedding) under a ridge regression, (L, H), float64.

    Args:
        own: Embeddings of the owner's passages, (D, E), float64, of length 1.
        public: Embeddings of public passages, (P, E).
        public_inputs: Mean router inputs of the same public passages, (P, L, H).

    Source: docs/how-it-works.md, section 4; ridge regression of inputs on embeddings, both centred.
    """
    centred = public - public.mean(dim=0)
    gram = centred.T @ centred + RIDGE * torch.eye(public.shape[1], dtype=torch.float64)
    weights = centred @ torch.linalg.solve(gram, own.mean(dim=0) - public.mean(dim=0))
    inputs = public_inputs.double()
    return torch.einsum("p,plh->lh", weights, inputs - inputs.mean(dim=0))


class Encoder:
    """A sentence encoder.

    Args:
        name: sentence-transformers model, a directory or Hub id.

    Raises:
        UsageError: It cannot be loaded.
    """

    def __init__(self, name: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from sentence_transformers import SentenceTransformer

        try:
            with quiet_transformers():
                self._model = SentenceTransformer(name, device="cpu", trust_remote_code=False)
        except (OSError, ValueError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{name} cannot be loaded: {said}", hint="give a model's directory", field="encoder"
            ) from error

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells it from another encoder of the same name: its modules, and a hash of its weights."""
        return {"modules": repr(self._model), "weights": tensors_digest(self._model.state_dict())}

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return the texts' embeddings, of length 1, (D, E), float32."""
        return torch.from_numpy(self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False))


def _embed(encoder: Encoder, passages: Sequence[str], reporter: Reporter) -> Tensor:
    """Return the passages' embeddings, (D, E), float32, and show how far they are."""
    found = []
    with reporter.progress("embedding", len(passages), "passages") as bar:
        for first in range(0, len(passages), _EMBEDDED_AT_ONCE):
            found.append(encoder.embed(passages[first : first + _EMBEDDED_AT_ONCE]))
            bar.advance(len(found[-1]))
    return torch.cat(found)
