"""What merging is compared with: other ways to use models that parties trained apart, and training them together."""

from __future__ import annotations

from flexctl.evaluation.baselines.blends import btx_start, dare, soup, ties
from flexctl.evaluation.baselines.comparing import Baselines, score_baselines
from flexctl.evaluation.baselines.ingredients import CLASSIFIER_FILE, MIXTURES, Ingredients, find_ingredients
from flexctl.evaluation.baselines.prompt import PromptClassifier, fit_classifier

__all__ = [
    "CLASSIFIER_FILE",
    "MIXTURES",
    "Baselines",
    "Ingredients",
    "PromptClassifier",
    "btx_start",
    "dare",
    "find_ingredients",
    "fit_classifier",
    "score_baselines",
    "soup",
    "ties",
]
