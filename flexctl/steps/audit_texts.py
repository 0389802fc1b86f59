"""The documents that an audit tries: an expert's members, others of their kind, and canaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flexctl import evaluation, text
from flexctl.bundle.manifest import ExpertManifest
from flexctl.errors import UsageError
from flexctl.runtime import Reporter

__all__ = ["AuditTextConfig", "audit_texts", "refuse_little_text", "refuse_missing_text"]

_FEW = 20


class AuditTextConfig(Protocol):
    """What a command's Config says about the text to attack with."""

    @property
    def data(self) -> tuple[Path, ...]:
        """What the expert was trained on."""

    @property
    def held_out(self) -> Path | None:
        """Text of the same kind that it never saw; None is what training held out."""

    @property
    def decontaminate(self) -> tuple[Path, ...]:
        """Test text that training left out."""

    @property
    def planted(self) -> Path | None:
        """The folder of its canaries."""

    @property
    def text_field(self) -> str:
        """Column or field that holds the text."""

    @property
    def documents(self) -> int:
        """How many of each kind to try."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens that a document is begun with."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens that follow."""

    @property
    def seed(self) -> int:
        """Of the choice."""


def refuse_missing_text(config: AuditTextConfig) -> None:
    """Refuse what is not there or cannot be read, before any work.

    Raises:
        UsageError: A path does not exist, has no document that can be read, or holds no canaries.
    """
    text.refuse_unreadable(config.data, config.text_field)
    if config.held_out is not None:
        text.refuse_unreadable([config.held_out], config.text_field, "held_out")
    if config.decontaminate:
        text.refuse_unreadable(config.decontaminate, config.text_field, "decontaminate")
    if config.planted is not None:
        folder = text.CanaryFolder(config.planted)
        if not (folder.planted.is_file() and folder.left_out.is_file()):
            raise UsageError(f"{config.planted}: holds no canaries", hint="train-expert plants some", field="planted")


def audit_texts(config: AuditTextConfig, manifest: ExpertManifest, tokenizer: Any) -> evaluation.Texts:
    """Return the documents to try, framed.

    Args:
        config: Where they are and how many to take.
        manifest: The expert's, whose seed says which documents training held out.
        tokenizer: Whose tokens.

    Raises:
        UsageError: It does not say what was held out, or a file cannot be read.
    """
    folder = text.CanaryFolder(config.planted) if config.planted else None
    members, others = _members_and_others(config, manifest, [folder.planted] if folder else [])

    def framed(documents: Iterable[str]) -> list[text.Framed]:
        return list(text.frame_documents(tokenizer, documents))

    def some(documents: Iterable[str]) -> list[text.Framed]:
        return framed(text.sample_documents(documents, config.documents, config.seed))

    def canaries(file: Path) -> list[text.Framed]:
        # Chance decides which are planted: of few canaries, all may be.
        return framed(text.read_documents([file], config.text_field)) if file.stat().st_size else []

    return evaluation.Texts(
        members=some(members),
        others=some(others),
        planted=canaries(folder.planted) if folder else [],
        left_out=canaries(folder.left_out) if folder else [],
    )


def _members_and_others(
    config: AuditTextConfig, manifest: ExpertManifest, planted: Sequence[Path]
) -> tuple[Iterable[str], Iterable[str]]:
    """Return the owner's documents that were trained on, and others of their kind.

    Args:
        config: Where they are.
        manifest: The expert's.
        planted: Files of canaries, which had a part in what training held out.
    """
    # Training under a guarantee holds nothing out.
    seed = manifest.training.get("seed") if manifest.privacy is None else None
    if config.held_out is None and not isinstance(seed, int):
        raise UsageError(
            "the expert does not say which documents training held out", hint="name such text", field="held_out"
        )
    without = text.Decontamination.read(config.decontaminate, config.text_field)

    def read(files: Sequence[Path]) -> Iterable[str]:
        return without.kept(text.read_documents(files, config.text_field))

    named = text.read_documents([config.held_out], config.text_field) if config.held_out else None
    if not isinstance(seed, int):
        return read(config.data), named or ()
    split = text.split_of(read([*config.data, *planted]), seed)
    return split.training(read(config.data)), named or split.held_out(read(config.data))


def refuse_little_text(
    config: AuditTextConfig, texts: evaluation.Texts, started: Sequence[evaluation.Beginning], reporter: Reporter
) -> None:
    """Refuse too little text to tell anything from, and warn of what is hardly enough.

    Raises:
        UsageError: There are too few documents, or all are too short.
    """
    for documents, name in ((texts.members, "data"), (texts.others, "held_out")):
        if len(documents) < 2:
            raise UsageError(f"{len(documents)} documents are too few to tell anything from", field=name)
        if len(documents) < _FEW:
            reporter.warn(f"`{name}`: {len(documents)} documents alone; intervals are wide")
    if not started:
        least = config.prefix_tokens + config.max_new_tokens
        raise UsageError(
            f"no document has {least} tokens", hint="give smaller `prefix_tokens` and `max_new_tokens`", field="data"
        )
