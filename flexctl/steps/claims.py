"""Whether experts' guarantees of differential privacy are what their own figures make of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from flexctl import privacy
from flexctl.bundle import Expert, Merged, PrivacyInfo, open_bundle
from flexctl.bundle.checks import Check
from flexctl.bundle.composition import Composition
from flexctl.errors import BundleError
from flexctl.evaluation.attacks.findings import AtMost

__all__ = ["bound_of", "check_claims", "refuse_false_claims"]


def check_claims(path: Path) -> list[Check]:
    """Recompute epsilon of every expert in a bundle that claims one; no check where none does.

    What cannot be recomputed for want of the ``privacy`` extra is said and does not fail.
    """
    claims = list(_claims(path))
    if not claims:
        return []
    if not privacy.is_installed():
        return [Check(name="privacy", ok=True, detail="claimed, not recomputed: pip install 'flexctl[privacy]'")]
    problems = [f"{path}: {field}.{found}" for field, info in claims if (found := privacy.refutation(info)) is not None]
    fine = ", ".join(f"epsilon {info.epsilon:g} at delta {info.delta:g}" for _, info in claims)
    return [Check(name="privacy", ok=not problems, detail=problems[0] if problems else f"recomputed: {fine}")]


def refuse_false_claims(composition: Composition, names: Collection[str]) -> None:
    """Refuse experts that claim less than their own figures make of it, as the merged model's card would repeat it.

    Without the ``privacy`` extra nothing is recomputed; ``verify`` says so.

    Args:
        composition: What they are to be part of.
        names: Whom to look at.

    Raises:
        BundleError: A claim is refuted; the message names the field.
    """
    for part in composition.parts:
        info = part.entry.privacy
        if info is None or part.entry.name not in names or not privacy.is_installed():
            continue
        if (found := privacy.refutation(info)) is not None:
            raise BundleError(
                f"{part.source}: expert {part.entry.name}: privacy.{found}", hint="ask its owner; nothing was written"
            )


def bound_of(claimed: PrivacyInfo | None) -> AtMost | None:
    """Return what an expert's guarantee bounds, its epsilon computed again; None where it claims none."""
    if claimed is None:
        return None
    is_known = privacy.is_installed()
    return AtMost(
        epsilon=claimed.epsilon,
        delta=claimed.delta,
        unit=claimed.unit,
        recomputed=is_known,
        refuted=privacy.refutation(claimed) if is_known else None,
    )


def _claims(path: Path) -> Iterator[tuple[str, PrivacyInfo]]:
    bundle = open_bundle(path)
    if isinstance(bundle, Expert) and bundle.manifest.privacy is not None:
        yield "privacy", bundle.manifest.privacy
    elif isinstance(bundle, Merged):
        for entry in bundle.manifest.experts:
            if entry.privacy is not None:
                yield f"experts.{entry.index}.privacy", entry.privacy
