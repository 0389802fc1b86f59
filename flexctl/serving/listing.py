"""What ``/v1/models`` says of a model under each of its names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flexctl.bundle import left_out_of, model_name
from flexctl.errors import UsageError
from flexctl.serving.permits import Permits
from flexctl.serving.refusing import refused

__all__ = ["Listing"]


class Listing:
    """The names of one served model.

    Args:
        permits: Its experts and their rights.
        digest: Of the bundle.
        explains: Whether experts' shares are told.
        chat: Whether there is a chat template; None is not known.
    """

    def __init__(self, permits: Permits, digest: str, explains: bool, chat: bool | None) -> None:
        self._permits, self._digest, self._explains, self._chat = permits, digest, explains, chat

    def all(self) -> dict[str, Any]:
        """Return the name with all experts, and the one with each closed expert left out."""
        removals: Iterable[tuple[str, ...]] = [(), *((name,) for name in self._permits.experts[1:])]
        return {"object": "list", "data": [self._about(without) for without in removals]}

    def one(self, name: str) -> dict[str, Any]:
        """Return what one name means.

        Raises:
            Refused: It is not served (404).
        """
        try:
            return self._about(left_out_of(name, self._permits.name, self._permits.experts))
        except UsageError as error:
            raise refused(error) from error

    def _about(self, without: tuple[str, ...]) -> dict[str, Any]:
        permits = self._permits
        about = {
            "digest": self._digest,
            "experts": [name for name in permits.experts if name not in without],
            "without": list(without),
            "rights": {entry.name: entry._asdict() for entry in permits.rights if entry.name not in without},
            "form": f"{permits.name}-without-A+B leaves out A and B",
            "explains": self._explains,
            "chat": self._chat,
        }
        name = model_name(permits.name, without)
        return {"id": name, "object": "model", "created": 0, "owned_by": "flexctl", "flexctl": about}
