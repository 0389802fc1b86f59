"""Being asked to stop: SIGTERM and Ctrl-C are heard between steps, so that a checkpoint is left and nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from flexctl.errors import Interrupted, Terminated
from flexctl.runtime import handling
from flexctl.training.checkpoints import Checkpoints

__all__ = ["Stop", "hearing"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """What was heard.

    Attributes:
        asked: The signal that asks the run to stop; None while none came.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Take a signal.

        Schedulers and launchers may send SIGTERM twice, so only a second Ctrl-C stops at once.

        Raises:
            KeyboardInterrupt: It is the user's second word.
        """
        if number == signal.SIGINT and self.asked is not None:
            raise KeyboardInterrupt
        self.asked = self.asked or signal.Signals(number)

    @property
    def number(self) -> int:
        """Of the signal that asks the run to stop; 0 while none came."""
        return self.asked or 0

    def ended(self, number: int, step: int, steps: int, checkpoints: Checkpoints | None) -> Interrupted:
        """Return what ends the run after ``step`` of ``steps`` steps: what is kept of it, and how to go on.

        Args:
            number: Of the signal, which another process of the run may have heard.
            step: Steps done.
            steps: Of all.
            checkpoints: What may keep them.
        """
        kind, by = (Terminated, "SIGTERM") if number == signal.SIGTERM else (Interrupted, "Ctrl-C")
        stopped = f"stopped by {by} after step {step} of {steps}"
        if checkpoints is None or checkpoints.newest is None:
            return kind(f"{stopped}; nothing of it is kept")
        return kind(
            f"{stopped}; {checkpoints.folder} keeps all until step {checkpoints.newest}",
            hint="give the same command with `resume` to go on from there",
        )


@contextmanager
def hearing() -> Iterator[Stop]:
    """Hear signals inside the ``with`` statement, in the main thread; those that are ignored stay so."""
    stop = Stop()
    heard = [number for number in _SIGNALS if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    with handling(stop.hear, *heard):
        yield stop
