"""Who may answer: the experts of one bundle, less those that are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexctl.bundle.names import PUBLIC
from flexctl.errors import UsageError

__all__ = ["Selection", "select"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which experts of a bundle may answer. Made by ``select``, once; everything below works with its indices.

    Attributes:
        experts: All experts of the bundle, the public one first.
        left_out: Indices of the closed experts that may not answer, ascending.
    """

    experts: tuple[str, ...]
    left_out: tuple[int, ...]

    @property
    def without(self) -> tuple[str, ...]:
        """Names of those that may not answer, sorted."""
        return tuple(sorted(self.experts[index] for index in self.left_out))

    @property
    def count(self) -> int:
        """How many may answer, the public expert included."""
        return len(self.experts) - len(self.left_out)


def select(experts: Sequence[str], place: object, *, without: Sequence[str] = ()) -> Selection:
    """Return who may answer.

    Args:
        experts: All experts of a bundle, the public one first.
        place: The bundle, as an error names it.
        without: Closed experts that may not answer; the same name twice is said once.

    Raises:
        UsageError: One of them is not there, or is the public expert, which always answers.
    """
    for name in without:
        if name == PUBLIC:
            raise UsageError("the public expert cannot be left out", field="without")
        if name not in experts:
            raise UsageError(f"{name!r} is not in {place}, which holds {', '.join(experts)}", field="without")
    return Selection(tuple(experts), tuple(sorted({list(experts).index(name) for name in without})))
