"""What merging is compared with: other ways to use models that parties trained apart, and training them together."""

from __future__ import annotations

from flexctl.evaluation.baselines.blends import dare, soup, ties
from flexctl.evaluation.baselines.comparing import Baselines
from flexctl.evaluation.baselines.ingredients import CLASSIFIER_FILE, MIXTURES, Ingredients, find_ingredients
from flexctl.evaluation.baselines.prompt import PromptClassifier

__all__ = [
    "CLASSIFIER_FILE",
    "MIXTURES",
    "Baselines",
    "Ingredients",
    "PromptClassifier",
    "dare",
    "find_ingredients",
    "soup",
    "ties",
]
