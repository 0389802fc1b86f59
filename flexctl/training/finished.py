"""What a finished run came from, so that ``resume`` of it says that it is done.

A run's ``run.json``, which no digest covers and which is never published, holds the digest of what was made and what
was asked for: every setting that decides the result as it was given, and a digest in place of each path. A run that
asks for the same is done. Anything else that stands in its place is refused, as without ``resume``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.names import shown
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import Reporter
from flexctl.training.work import working_folder

__all__ = ["asked_for", "before_after", "folder_digest", "refuse_other_request", "say_done"]

# Where a run writes and how it goes about it; paths, for which digests stand; and canaries, which are in the text's
# digest: the file would say that there are some.
_NOT_ASKED = {"data", "canaries", "text_field", "public", "source", "anchor", "merged", "proxy", "output"}
_NOT_ASKED |= {"decontaminate", "near_duplicates", "token_cache"}
_NOT_ASKED |= {"threads", "device", "recompute", "resume", "checkpoint_steps", "track", "overwrite", "dry_run"}
_NOT_ASKED |= {"plan", "plan_tflops"}


def asked_for(config: Any, **inputs: Any) -> dict[str, Any]:
    """Return what decides a run's result, as ``run.json`` holds it under "asked".

    Args:
        config: The command's Config.
        inputs: By name, digests of what the Config's paths lead to, and names that it leaves to be made.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    settings = {name: value for name, value in fields.items() if name not in _NOT_ASKED}
    found: dict[str, Any] = json.loads(json.dumps(settings | inputs, sort_keys=True))
    return found


def refuse_other_request(target: Path, run: Path, digest: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``run.json`` of what stands at ``target``, if it came from what is asked for now.

    Args:
        target: What stands in the run's place.
        run: Its ``run.json``.
        digest: Its digest.
        asked: As from ``asked_for``.

    Raises:
        UsageError: It came from something else, or nothing says what it came from.
    """
    hint = "give another `output`, or `overwrite` to replace it"
    try:
        kept = parse_json(read_bytes(run), str(run))
    except BundleError:
        kept = None
    if not isinstance(kept, dict) or kept.get("digest") != digest or not isinstance(kept.get("asked"), dict):
        raise UsageError(f"{target}: exists already, and {run} does not say what it was made from", hint=hint)
    theirs = kept["asked"]
    for name in sorted(set(theirs) | set(asked)):
        if theirs.get(name) != asked.get(name):
            raise UsageError(
                f"{target}: exists already, of a run that had {name} = {shown(theirs.get(name))}; "
                f"this one has {shown(asked.get(name))}",
                hint=hint,
            )
    return kept


def before_after(losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return {part: {"before", "after"}} as it was before JSON sorted it."""
    return {part: {when: of[when] for when in ("before", "after")} for part, of in losses.items()}


def say_done(target: Path, work: Path, *, dry_run: bool, reporter: Reporter) -> None:
    """Say that a run has finished, and clear up what it left in its working folder, killed at its very end."""
    if work.exists() and not dry_run:
        with working_folder(work, reporter):
            pass
    reporter.note(f"{target}: this run has finished; there is nothing to go on with")


def folder_digest(folder: Path) -> str:
    """Return a digest of the names and bytes of all files directly in a folder."""
    digest = hashlib.sha256()
    for path in sorted(item for item in folder.iterdir() if item.is_file()):
        digest.update(f"{path.name}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()
