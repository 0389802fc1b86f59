"""What is seen of licenses that do not go together, and what is not."""

from __future__ import annotations

import pytest

from flexctl.bundle.licenses import conflicts
from flexctl.bundle.rights import Rights


def rights(*terms: str) -> list[Rights]:
    """Experts a, b, ... each of "LICENSE" or "LICENSE for PURPOSE"."""
    found = []
    for index, text in enumerate(terms):
        license, _, purpose = text.partition(" for ")
        found.append(Rights("abcdef"[index], license or None, (purpose,) if purpose else (), None))
    return found


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        (["Apache-2.0", "MIT", "CC-BY-4.0"], []),
        (["", "", "MIT"], []),
        (["CC-BY-NC-4.0", "MIT"], []),
        (["MIT for commercial", "CC-BY-NC-4.0 for research"], ["b (CC-BY-NC-4.0) forbids commercial use, a is for it"]),
        (["cc-by-nc-4.0 for Commercial"], ["a (cc-by-nc-4.0) forbids commercial use, a is for it"]),
        (["CC-BY-SA-4.0", "CC-BY-SA-4.0"], []),
        (["CC-BY-SA-4.0", "cc-by-sa-4.0"], []),
        (["CC-BY-SA-4.0", "GPL-3.0-only"], ["a (CC-BY-SA-4.0), b (GPL-3.0-only) each want the whole under themselves"]),
        (
            ["CC-BY-SA-4.0", "CC-BY-NC-4.0"],
            ["a (CC-BY-SA-4.0) wants the whole under itself, b (CC-BY-NC-4.0) forbids what it allows"],
        ),
        (["CC-BY-NC-SA-4.0", "MIT"], []),
        (["CC-BY-ND-4.0"], []),
        (["CC-BY-ND-4.0", "MIT"], ["a (CC-BY-ND-4.0) forbids changes"]),
        (["our own Non-Commercial terms", "MIT for commercial"], ["a (our own Non-Commercial terms) forbids"]),
        # Ids that only look like one of the kinds.
        (["NCSA for commercial", "ANDROID", "MS-SANS"], []),
    ],
)
def test_conflicts(terms: list[str], says: list[str]) -> None:
    found = conflicts(rights(*terms))
    assert len(found) == len(says)
    assert all(text.startswith(expected) for text, expected in zip(found, says, strict=True))
