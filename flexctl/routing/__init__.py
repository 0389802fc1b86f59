"""Where router rows come from, and what they say before a model runs."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "noised_rows": ("private_rows", "shift_norm"),
    "proxies": ("PASSAGES_A_FOLD", "Ranking", "listed_documents", "public_reader", "rank_public"),
    "rows": ("Rows", "row_logits"),
    "space": (
        "InputStatistics",
        "RouterSpace",
        "constant_spread",
        "fit_space",
        "measure_documents",
        "measure_inputs",
        "measure_passages",
    ),
    "start_rows": ("PASSAGES", "Encoder", "RowRecipe", "embed_rows", "encoder_name"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
