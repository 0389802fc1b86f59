"""What a private run goes by: its key, its clips and what it was asked for, in a file of its working folder.

A run that goes on finds them there, so it draws for every step the noise that it drew before, and nobody can choose
among draws by stopping and going on. Nor does one key serve two texts or two settings, whose difference would show what
the noise hides. The file goes with the folder when the run is done: whoever has it can take the noise off.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.store import new_file, own_file
from flexctl.errors import UsageError
from flexctl.privacy.noise import KEY_BYTES, Secret

__all__ = ["Ledger", "open_ledger"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """What a run goes by.

    Attributes:
        key: In hex, of all its secret bits.
        max_grad_norm: Clip of a document's gradient.
        row_norm: Clip of a document's share in the rows.
        run: Everything that decides the run's result; of the text, a digest under the key.
    """

    key: str
    max_grad_norm: float
    row_norm: float
    run: Mapping[str, Any]

    @property
    def secret(self) -> Secret:
        """Where the run's secret bits come from."""
        return Secret(bytes.fromhex(self.key))


def open_ledger(
    path: Path,
    *,
    resume: bool,
    started: bool,
    settings: Mapping[str, Any],
    digest: str,
    clips: Callable[[], tuple[float, float]],
) -> Ledger:
    """Return the ledger of a run that goes on, or a new one.

    Args:
        path: Its file, in the run's working folder.
        resume: Whether to go on with one that is there.
        started: Whether the run has left checkpoints.
        settings: What else than the text decides the run's result, as JSON has it.
        digest: Of the text.
        clips: Measures ``max_grad_norm`` and ``row_norm`` for a new one, on public text.

    Raises:
        UsageError: There are checkpoints to go on from, and no ledger; or it cannot be read, or is that of another run.
    """
    if resume and (started or path.exists()):
        ledger = _read(path)
        _refuse_another(path, ledger, _run(settings, digest, ledger.key))
        return ledger
    key = Secret.new_key().hex()
    max_grad_norm, row_norm = clips()
    run = _run(settings, digest, key)
    ledger = Ledger(key=key, max_grad_norm=max_grad_norm, row_norm=row_norm, run=run)
    with new_file(path, overwrite=True) as temporary, own_file(temporary) as file:
        file.write(json.dumps(asdict(ledger)).encode())
    return ledger


def _read(path: Path) -> Ledger:
    try:
        ledger = Ledger(**json.loads(path.read_text()))
        if not isinstance(ledger.run, dict) or len(bytes.fromhex(ledger.key)) != KEY_BYTES:
            raise ValueError
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            f"{path}: cannot be read ({type(error).__name__}), and without it noise would be drawn a second time",
            hint="start again without `resume`",
        ) from None
    return ledger


def _run(settings: Mapping[str, Any], digest: str, key: str) -> dict[str, Any]:
    """Return what decides a run's result; the text's digest tells nothing to whoever has no key."""
    sealed = hmac.new(bytes.fromhex(key), digest.encode(), hashlib.sha256).hexdigest()
    found: dict[str, Any] = json.loads(json.dumps({**settings, "data": sealed}))
    return found


def _refuse_another(path: Path, ledger: Ledger, run: Mapping[str, Any]) -> None:
    for name in sorted(set(ledger.run) | set(run)):
        if ledger.run.get(name) != run.get(name):
            raise UsageError(
                f"{path}: that run had {name} = {ledger.run.get(name)!r}, this one has {run.get(name)!r}",
                hint="use the same settings and data, or start again without `resume`",
            )
