"""What a private run has fixed before it reads a document: its key and its clips, in a file of its working folder.

A run that goes on finds them there, so it draws for every step the noise that it drew before, and nobody can choose
among draws by stopping and going on. The file goes with the folder when the run is done: whoever has it can take the
noise off.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexctl.bundle.store import new_file
from flexctl.errors import UsageError
from flexctl.privacy.noise import Secret

__all__ = ["Ledger", "open_ledger"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What a run goes by.

    Attributes:
        key: In hex, of all its secret bits.
        max_grad_norm: Clip of a document's gradient.
        row_norm: Clip of a document's share in the rows.
    """

    key: str
    max_grad_norm: float
    row_norm: float

    @property
    def secret(self) -> Secret:
        """Where the run's secret bits come from."""
        return Secret(bytes.fromhex(self.key))

    def sealed(self, digest: str) -> str:
        """Return a digest of a digest that tells nothing to whoever has no key."""
        return hmac.new(bytes.fromhex(self.key), digest.encode(), hashlib.sha256).hexdigest()


def open_ledger(path: Path, *, resume: bool, started: bool, clips: Callable[[], tuple[float, float]]) -> Ledger:
    """Return the ledger of a run that goes on, or a new one.

    Args:
        path: Its file, in the run's working folder.
        resume: Whether to go on with one that is there.
        started: Whether the run has left checkpoints.
        clips: Measures ``max_grad_norm`` and ``row_norm`` for a new one, on public text.

    Raises:
        UsageError: There are checkpoints to go on from, and no ledger, or it cannot be read.
    """
    if resume and (started or path.exists()):
        try:
            return Ledger(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(
                f"{path}: cannot be read ({type(error).__name__}), and without it noise would be drawn a second time",
                hint="start again without `resume`",
            ) from None
    max_grad_norm, row_norm = clips()
    ledger = Ledger(key=Secret.new_key().hex(), max_grad_norm=max_grad_norm, row_norm=row_norm)
    fields = {"key": ledger.key, "max_grad_norm": ledger.max_grad_norm, "row_norm": ledger.row_norm}
    with new_file(path, overwrite=True) as temporary:
        temporary.touch(0o600, exist_ok=False)
        temporary.write_text(json.dumps(fields))
    return ledger
