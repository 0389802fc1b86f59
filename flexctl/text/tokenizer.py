"""A byte-level BPE tokenizer, trained on public text, and whether two tokenizers are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flexctl.bundle.names import and_more, shown
from flexctl.errors import BundleError
from flexctl.model.building import load_tokenizer
from flexctl.text.encoding import in_pieces

__all__ = ["refuse_other_tokenizer", "refuse_tokens_beyond", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")


def train_tokenizer(documents: Iterable[str], vocab_size: int, context: int) -> Any:
    """Return a Transformers tokenizer: byte-level BPE with an end-of-text and a padding token.

    Args:
        documents: Public texts.
        vocab_size: Entries at most, special tokens counted.
        context: Longest sequence the model is meant for.
    """
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(in_pieces(documents), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def refuse_other_tokenizer(path: Path, anchor: Path) -> None:
    """Refuse a checkpoint whose tokenizer makes other tokens than the anchor's; one that has no tokenizer passes.

    Files may differ where that changes no token: another version wrote them, or cuts texts at another length.

    Raises:
        BundleError: Vocabulary, merges, special tokens or the steps around them differ, or it cannot be read.
    """
    if not any((path / name).is_file() for name in _FILES):
        return
    found = _rules(path)
    if found != _rules(anchor):
        raise BundleError(
            f"{path}: its tokenizer makes other tokens than the anchor's in {anchor}",
            hint="fine-tune with the anchor's own tokenizer",
        )


def refuse_tokens_beyond(path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer with an id that the embedding has no row for.

    Args:
        path: Directory of the checkpoint.
        vocab_size: Rows of its embedding.

    Raises:
        BundleError: A token's id is ``vocab_size`` or above; the message names the first.
    """
    beyond = sorted((token_id, token) for token, token_id in load_tokenizer(path).get_vocab().items())
    beyond = [(token_id, token) for token_id, token in beyond if token_id >= vocab_size]
    if beyond:
        more = and_more(len(beyond))
        raise BundleError(
            f"{path}: the tokenizer's token {shown(beyond[0][1])} has id {beyond[0][0]}{more}; "
            f"expected below config.json's vocab_size, {vocab_size}",
            hint="give the model a row for each: model.resize_token_embeddings(len(tokenizer)), and save both",
        )


def _rules(path: Path) -> str:
    """Return all that decides which tokens a text becomes."""
    tokenizer = load_tokenizer(path)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str())
