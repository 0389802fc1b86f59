"""Router rows from an owner's text: the three kinds of direction and their one finish.

Shapes: D passages, L num_hidden_layers, H hidden_size, E width of the sentence encoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from flexctl import cache
from flexctl.errors import UsageError
from flexctl.model.building import silenced
from flexctl.model.rows import ROUTER_KINDS, Domain, Rows, direction, finish_rows
from flexctl.model.space import RouterSpace, measure_documents
from flexctl.model.tensors import tensors_digest
from flexctl.runtime import Reporter, counted, software_versions

__all__ = [
    "PASSAGES",
    "Encoder",
    "check_kind",
    "embed_rows",
    "encoder_direction",
    "encoder_name",
    "names_a_file",
]

PASSAGES = 512
"""Passages of an owner that rows are made from, at most."""

_PUBLIC_PASSAGES = "public-passages"
"""The cache's kind of entry for what is measured of public passages."""

_EMBEDDED_AT_ONCE = 64

RIDGE = 1.0
"""Ridge penalty of the map from embeddings to router inputs, in units of documents; embeddings have length 1."""


def embed_rows(
    kind: str,
    model: nn.Module,
    space: RouterSpace,
    own: Sequence[str],
    public: Sequence[str],
    frame: Callable[[Sequence[str]], Sequence[Tensor]],
    encoder: str | None,
    reporter: Reporter,
) -> Rows:
    """Return calibrated router rows for an owner's sample.

    Args:
        kind: ``discriminant``, ``hidden`` or ``encoder``.
        model: The anchor.
        space: Its router space.
        own: The owner's passages.
        public: Public passages; only the encoder kind reads them.
        frame: Turns passages into token ids, (S,), int64 each.
        encoder: sentence-transformers model, a directory or Hub id; needed by the encoder kind alone.
        reporter: Hears of progress.

    Raises:
        UsageError: The kind is unknown, there are fewer than two passages, or the encoder is missing or cannot be
            loaded.

    Source: docs/how-it-works.md, section 4.
    """
    check_kind(kind, encoder)
    if len(own) < 2:
        raise UsageError(f"{len(own)} passages are too few for router rows", hint="give more text", field="data")
    loaded = Encoder(encoder) if kind == "encoder" and encoder is not None else None
    domain = Domain.from_documents(_measure(model, frame(own), reporter), space)
    if loaded is None:
        return finish_rows(space, domain, direction(kind, space, domain.mean))
    embedded, inputs = _measured_public(model, space, public, frame, loaded, reporter)
    directions = encoder_direction(_embed(loaded, own, reporter).double(), embedded.double(), inputs)
    return finish_rows(space, domain, directions)


def _measured_public(
    model: nn.Module,
    space: RouterSpace,
    public: Sequence[str],
    frame: Callable[[Sequence[str]], Sequence[Tensor]],
    encoder: Encoder,
    reporter: Reporter,
) -> tuple[Tensor, Tensor]:
    """Return public passages' embeddings, (P, E), and mean router inputs, (P, L, H), float32 both.

    They are the same for every owner and take most of the time, so they are cached; an owner's own never are.
    """
    identity = {
        "anchor": tensors_digest({"mean": space.mean}),
        "dtype": str(next(model.parameters()).dtype),
        "encoder": encoder.identity,
        "passages": list(public),
        "software": software_versions(),
    }
    known = cache.recall(_PUBLIC_PASSAGES, identity)
    if known is None:
        inputs, embedded = _measure(model, frame(public), reporter), _embed(encoder, public, reporter)
        known = {"embedded": embedded.numpy(), "inputs": inputs.numpy()}
        cache.remember(_PUBLIC_PASSAGES, identity, known)
    return torch.from_numpy(known["embedded"]), torch.from_numpy(known["inputs"])


def _measure(model: nn.Module, passages: Sequence[Tensor], reporter: Reporter) -> Tensor:
    """Return the mean router inputs of passages, (D, L, H), float32."""
    with reporter.progress("measuring router inputs", len(passages), "passages") as bar:
        return measure_documents(model, counted(passages, bar))


def check_kind(kind: str, encoder: str | None) -> None:
    """Refuse a kind of router row that there is not, or that has no encoder to work with.

    Raises:
        UsageError: The kind is unknown, or is ``encoder`` and no encoder is given.
    """
    if kind not in ROUTER_KINDS:
        raise UsageError(f"{kind!r} is no kind", hint=f"use {', '.join(ROUTER_KINDS)}, or a .st file", field="router")
    if kind == "encoder" and encoder is None:
        raise UsageError(
            "encoder: no sentence encoder given", hint="add `encoder`, a directory or Hub id", field="router"
        )


def names_a_file(router: str) -> bool:
    """Return whether what ``router`` names is a file with rows rather than a kind."""
    return router.endswith(".st") or Path(router).exists()


def encoder_name(kind: str, encoder: str | None) -> str | None:
    """Return what a manifest says of the encoder: its id or folder name, never a path; None for other kinds."""
    if kind != "encoder" or encoder is None:
        return None
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
            with silenced():
                self._model = SentenceTransformer(name, device="cpu", trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{name} cannot be loaded: {error}", hint="give a model's directory", field="encoder"
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
