"""What a guarantee of differential privacy is made of: accounting, secret noise, clipping, documents one by one."""

from __future__ import annotations

from flexctl.faces import face

NAMES = {
    "accounting": (
        "ACCOUNTANT",
        "ADJACENCY",
        "MECHANISM",
        "UNIT",
        "Mechanism",
        "gaussian_noise",
        "is_installed",
        "least_noise",
        "refutation",
        "spent",
    ),
    "clipping": ("PerDocument",),
    "documents": ("Documents", "Padded", "padded"),
    "ledger": ("Ledger", "open_ledger"),
    "noise": ("Secret", "Stream", "noisy"),
}
"""Module -> the names that the floors above use, imported on first use."""

__getattr__, __dir__, __all__ = face(__name__, NAMES)
