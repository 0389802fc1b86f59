"""Who may answer: the experts of one bundle, less those that are left out; and how a served model's name says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexctl.bundle.names import PUBLIC, shown
from flexctl.errors import UsageError

__all__ = ["Selection", "left_out_of", "model_name", "select"]

_WITHOUT = "-without-"
_JOIN = "+"
"""Neither can be in an expert's name together with the other, and ``+`` in none: a suffix reads in one way."""


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


def select(
    experts: Sequence[str], place: object, *, without: Sequence[str] = (), only: Sequence[str] | None = None
) -> Selection:
    """Return who may answer.

    Args:
        experts: All experts of a bundle, the public one first.
        place: The bundle, as an error names it.
        without: Closed experts that may not answer; the same name twice is said once.
        only: The closed experts that may answer, as the public one always may; None is all of them.

    Raises:
        UsageError: One of them is not there, or is the public expert; or ``only`` names nobody.
    """
    _check(experts, place, without, "without", "cannot be left out")
    left_out = set(without)
    if only is not None:
        if not only:
            raise UsageError("it names nobody", hint="name closed experts, or leave it out", field="only")
        _check(experts, place, only, "only", "always answers")
        left_out |= set(experts[1:]) - set(only)
    return Selection(tuple(experts), tuple(i for i, name in enumerate(experts) if name in left_out))


def _check(experts: Sequence[str], place: object, names: Iterable[str], field: str, public: str) -> None:
    for name in names:
        if name == PUBLIC:
            raise UsageError(f"the public expert {public}", field=field)
        if name not in experts:
            raise UsageError(f"{shown(name)} is not in {place}, which holds {', '.join(experts)}", field=field)


def model_name(base: str, without: Iterable[str]) -> str:
    """Return what a served model is called when closed experts are left out: ``merged-without-code+law``.

    Args:
        base: Its name when all answer.
        without: Names of those that are left out, in any order; none gives ``base``.
    """
    names = sorted(set(without))
    return f"{base}{_WITHOUT}{_JOIN.join(names)}" if names else base


def left_out_of(model: str, base: str, experts: Sequence[str]) -> tuple[str, ...]:
    """Return whom a served model's name leaves out, sorted: the inverse of ``model_name``, in any order of names.

    Args:
        model: As a client asks for it.
        base: The served model's name when all answer.
        experts: All its experts, the public one first.

    Raises:
        UsageError: It is another model's name, or its suffix is not a list of closed experts, each once.
    """
    if model == base:
        return ()
    form = f"{base}{_WITHOUT}A{_JOIN}B leaves out A and B, of {', '.join(experts[1:]) or 'no closed experts'}"
    suffix = model.removeprefix(base)
    if len(suffix) == len(model) or not suffix.startswith(_WITHOUT):
        raise UsageError(f"{shown(model)} is not served here; {base} is, and {form}", field="model")
    names = suffix.removeprefix(_WITHOUT).split(_JOIN)
    for name in names:
        if name == PUBLIC:
            raise UsageError(f"{shown(model)}: the public expert cannot be left out; {form}", field="model")
        if name not in experts:
            raise UsageError(f"{shown(model)}: {shown(name)} is no expert of it; {form}", field="model")
    if len(set(names)) < len(names):
        raise UsageError(f"{shown(model)} names an expert twice; {form}", field="model")
    return tuple(sorted(names))
