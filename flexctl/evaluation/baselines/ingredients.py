"""What baselines are made of: dense experts, trained mixtures and a prompt classifier in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle import PUBLIC, Weights
from flexctl.bundle.comparable import alone, is_mixture, open_checkpoint
from flexctl.errors import BundleError, UsageError
from flexctl.evaluation.baselines.prompt import PromptClassifier
from flexctl.model.building import load_tokenizer

__all__ = ["CLASSIFIER_FILE", "MIXTURES", "Ingredients", "find_ingredients"]

MIXTURES = ("btx", "unrestricted", "unrestricted-2x")
"""Folders of mixtures that were trained as a whole."""

CLASSIFIER_FILE = "prompt-classifier.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingredients:
    """What there is.

    Attributes:
        anchor: The public model.
        dense: Dense experts by the names of the experts that they stand against.
        mixtures: Trained mixtures by name.
        classifier: For prompt routing; None where it is missing.
        missing: What is not there -> how to make it.
    """

    anchor: Weights
    dense: Mapping[str, Weights]
    mixtures: Mapping[str, Weights]
    classifier: PromptClassifier | None
    missing: Mapping[str, str]

    @property
    def complete(self) -> bool:
        """Whether there is a dense expert for every expert, and one at least."""
        return bool(self.dense) and not any(name.startswith("dense ") for name in self.missing)


def find_ingredients(folder: Path, bundle: Weights, experts: Sequence[str], tokenizer: Path) -> Ingredients:
    """Return what a folder of ingredients holds for comparison with a bundle.

    Args:
        folder: Holds a stock dense checkpoint a closed expert, by its name; and, where they were made, the mixtures of
            ``MIXTURES`` and the file ``CLASSIFIER_FILE``.
        bundle: What they are compared with.
        experts: Its experts that take part. Without closed ones among them, every dense checkpoint counts.
        tokenizer: Its tokenizer's directory.

    Raises:
        UsageError: There is no such folder.
        BundleError: A checkpoint is not of the anchor's family, sizes or vocabulary, or the classifier is not of the
            same experts.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no directory", hint="see docs/baselines.md for what it holds", field="baselines")
    anchor = alone(bundle)
    there = sorted(item.name for item in folder.iterdir() if (item / "config.json").is_file())
    closed = [name for name in experts if name != PUBLIC] or [name for name in there if name not in MIXTURES]
    dense = {name: _open(folder / name, anchor, tokenizer, mixture=False) for name in closed if name in there}
    mixtures = {name: _open(folder / name, anchor, tokenizer, mixture=True) for name in MIXTURES if name in there}
    path = folder / CLASSIFIER_FILE
    classifier = PromptClassifier.load(path) if path.exists() else None
    if classifier is not None and not {PUBLIC, *closed} <= set(classifier.names):
        raise BundleError(
            f"{path}: tells {', '.join(classifier.names)} apart; expected {', '.join([PUBLIC, *closed])}",
            hint="fit it again with a class for every expert",
        )
    return Ingredients(
        anchor=anchor,
        dense=dense,
        mixtures=mixtures,
        classifier=classifier,
        missing=_missing(folder, closed, [*dense, *mixtures], classifier is not None),
    )


def _open(path: Path, anchor: Weights, tokenizer: Path, *, mixture: bool) -> Weights:
    if is_mixture(path, anchor) != mixture:
        wanted = "a mixture" if mixture else "a dense model"
        raise BundleError(f"{path / 'config.json'}: expected {wanted} in a folder of this name")
    own = path / "tokenizer.json"
    if own.exists() and load_tokenizer(path).get_vocab() != load_tokenizer(tokenizer).get_vocab():
        raise BundleError(f"{own}: its vocabulary is not the anchor's", hint="train from the same anchor")
    return open_checkpoint(path, anchor)


def _missing(folder: Path, experts: Sequence[str], there: Sequence[str], classified: bool) -> dict[str, str]:
    train = "flexctl init-anchor ANCHOR --data TEXT --anneal-tokens N -o"
    found = {f"dense {name}": f"{train} {folder / name}" for name in experts if name not in there}
    by_hand = "trained by examples/flexmix_mini in flexctl's source, by no command; see docs/baselines.md"
    found |= {name: by_hand for name in MIXTURES if name not in there}
    if not classified:
        found["prompt routing"] = f"{folder / CLASSIFIER_FILE} is {by_hand}"
    if not experts:
        found["dense experts"] = f"{train} {folder / 'NAME'}"
    return found
