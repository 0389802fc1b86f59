"""Domains: a name and its test text, read anew for every pass, never kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from flexctl.errors import UsageError
from flexctl.evaluation.scoring import Score, score_documents
from flexctl.processes import ALONE, World
from flexctl.runtime import Reporter
from flexctl.text.documents import pinned, read_documents, refuse_unreadable, size_bytes, source_name
from flexctl.text.tokens import frame_documents

__all__ = ["Content", "Domain", "parse_domains", "read_domain", "score_domain", "window_length"]

_MAX_SEQ_LEN = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """A kind of text to score on.

    Attributes:
        name: What the user calls it.
        path: A folder or file of text, or ``hf://datasets/...``, as ``read_documents`` takes it.
        text_field: The column or field that holds the text.
    """

    name: str
    path: Path
    text_field: str = "text"

    def documents(self) -> Iterator[str]:
        """Yield the documents' texts, read anew."""
        return read_documents([self.path], self.text_field)

    def size_bytes(self) -> int:
        """Return the size of its files, packed ones as they are."""
        return size_bytes([self.path])


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What is in a domain.

    Attributes:
        domain: Which one.
        digest: sha256 of all documents in order, as ``sha256:<hex>``.
        documents: How many.
        num_bytes: Their UTF-8 bytes.
    """

    domain: Domain
    digest: str
    documents: int
    num_bytes: int


def parse_domains(data: Sequence[str], text_field: str = "text") -> list[Domain]:
    """Return the domains of ``data``, in the order given.

    Args:
        data: NAME=PATH each, or a path alone, whose file or folder then names the domain.
        text_field: The column or field that holds the text.

    Raises:
        UsageError: One is neither, a name is given twice, or there is no text at a path that can be read.
    """
    domains: dict[str, Domain] = {}
    for item in data:
        name, path = item.split("=", 1) if "=" in item else (source_name(Path(item)), item)
        if not (name and path):
            raise UsageError(
                f"{item!r} is not NAME=PATH, nor a path alone", hint="for example news=./news-test", field="data"
            )
        if name in domains:
            raise UsageError(f"{name!r} is given twice", hint="name them apart: NAME=PATH", field="data")
        (source,) = pinned([Path(path)])
        refuse_unreadable([source], text_field)
        domains[name] = Domain(name=name, path=source, text_field=text_field)
    if not domains:
        raise UsageError("nothing to evaluate on", hint="add `data`", field="data")
    return list(domains.values())


def read_domain(domain: Domain, reporter: Reporter) -> Content:
    """Return what is in a domain, after reading all of it once.

    Args:
        domain: What to read.
        reporter: Hears of progress.

    Raises:
        UsageError: There is no document with text, or a file cannot be read.
    """
    hasher = hashlib.sha256()
    documents = num_bytes = 0
    with reporter.progress(f"reading {domain.name}", domain.size_bytes(), "bytes") as bar:
        for text in domain.documents():
            raw = text.encode()
            hasher.update(len(raw).to_bytes(8, "big") + raw)
            documents += 1
            num_bytes += len(raw)
            bar.advance(len(raw))
    return Content(domain=domain, digest=f"sha256:{hasher.hexdigest()}", documents=documents, num_bytes=num_bytes)


def window_length(config: Mapping[str, Any], seq_len: int | None) -> int:
    """Return the window length to score with: ``seq_len``, else 1024, or less where the model holds less.

    Args:
        config: The dense class's config.json.
        seq_len: As asked for; None leaves the choice.
    """
    return seq_len or min(_MAX_SEQ_LEN, int(config.get("max_position_embeddings") or _MAX_SEQ_LEN))


def score_domain(
    model: nn.Module,
    tokenizer: Any,
    domain: Domain,
    *,
    seq_len: int,
    batch_tokens: int,
    reporter: Reporter,
    title: str | None = None,
    num_bytes: int | None = None,
    world: World = ALONE,
) -> Score:
    """Return the score of ``model`` on one domain, by ``score_documents``.

    Args:
        model: As from ``model.building.build_model``.
        tokenizer: The model's.
        domain: What to read.
        seq_len: Window length.
        batch_tokens: Positions that go through the model at once.
        reporter: Hears of progress.
        title: What the progress is called; None is "scoring NAME".
        num_bytes: UTF-8 bytes of its documents; None is not known: the progress is then about the size of its files.
        world: As for ``score_documents``.

    Raises:
        UsageError: There is no document with text, or a file cannot be read.
    """
    total = domain.size_bytes() if num_bytes is None else num_bytes
    with reporter.progress(title or f"scoring {domain.name}", total, "bytes") as bar:
        score = score_documents(
            model,
            frame_documents(tokenizer, domain.documents()),
            seq_len=seq_len,
            batch_tokens=batch_tokens,
            scored=lambda _, num_bytes: bar.advance(num_bytes),
            world=world,
        )
    return score
