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
    """Refuse what is not there, before anything is read.

    Raises:
        UsageError: A path does not exist, or holds no canaries.
    """
    text.text_files(config.data)
    if config.held_out is not None:
        text.text_files([config.held_out], "held_out")
    if config.decontaminate:
        text.text_files(config.decontaminate, "decontaminate")
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
    paths = [*config.data, *([folder.planted] if folder else [])]
    # Training under a guarantee holds nothing out.
    seed = manifest.training.get("seed") if manifest.privacy is None else None
    if config.held_out is None and not isinstance(seed, int):
        raise UsageError(
            "the expert does not say which documents training held out", hint="name such text", field="held_out"
        )
    without = text.Decontamination.read(config.decontaminate, config.text_field)

    def trained(files: Sequence[Path]) -> Iterable[str]:
        return without.kept(text.read_documents(files, config.text_field))

    def own() -> Iterable[str]:
        return trained(config.data)

    split = text.split_of(trained(paths), seed) if isinstance(seed, int) else None

    members = split.training(own()) if split else own()
    others = (
        text.read_documents([config.held_out], config.text_field)
        if config.held_out
        else split.held_out(own())
        if split
        else []
    )

    def framed(documents: Iterable[str]) -> list[text.Framed]:
        chosen = text.sample_documents(documents, config.documents, config.seed)
        return list(text.frame_documents(tokenizer, chosen))

    def all_of(file: Path) -> list[text.Framed]:
        return list(text.frame_documents(tokenizer, text.read_documents([file], config.text_field)))

    return evaluation.Texts(
        members=framed(members),
        others=framed(others),
        planted=all_of(folder.planted) if folder else [],
        left_out=all_of(folder.left_out) if folder else [],
    )


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
