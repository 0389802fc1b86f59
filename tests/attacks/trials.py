"""Runs commands, each in a child process of its own, and lets something befall it: ``python -m attacks.trials``.

A trial is a line of JSON on stdin, what came of it one on stdout. The children are forks: torch is imported once.
What a command does to its folder is counted as it comes: files opened to be written, made, moved, deleted, flushed,
copied into. A trial says at which of these moments, from 1 on, its trouble begins:

  kill      the process is killed in that moment
  full      from then on the disk has no room: nothing is made or grows, while deleting works
  stranger  the process has no rights but those of a user who owns nothing here
  none      nothing happens
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["SECRET", "may_be_a_stranger"]

SECRET = "correct horse battery"
_GROWS = ("open", "os.mkdir", "os.link", "os.symlink", "os.truncate")
_CHANGES = (*_GROWS, "os.rename", "os.remove", "os.rmdir", "os.chmod")
_PATCHED = ("fsync", "pwrite", "copy_file_range")


def may_be_a_stranger() -> bool:
    """Return whether this process may give rights away, and had them: root on Linux."""
    return sys.platform == "linux" and os.geteuid() == 0


def _become_a_stranger() -> None:
    """Give up every capability: root is then a user like others, and may do with others' files what others may."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the call, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")


class _Counter:
    """Counts what a command does to the folder that it runs in, and makes trouble at one of these moments."""

    def __init__(self, fault: str, at: int, seen: mmap.mmap) -> None:
        self._fault, self._at, self._seen = fault, at, seen
        self._root = os.path.dirname(os.getcwd())
        sys.addaudithook(self._heard)
        for name in _PATCHED:
            setattr(os, name, self._counted(getattr(os, name)))

    def _heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES and self._is_ours(args[0]) and not (event == "open" and self._only_reads(args[2])):
            self._count(event in _GROWS, args[0])

    def _is_ours(self, path: Any) -> bool:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        place = os.fsdecode(path)
        return not os.path.isabs(place) or place.startswith(self._root)

    @staticmethod
    def _only_reads(flags: Any) -> bool:
        return not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **settings: Any) -> Any:
            self._count(True, None)
            return call(*args, **settings)

        return counted

    def _count(self, grows: bool, path: Any) -> None:
        seen = int.from_bytes(self._seen[:8], "little") + 1
        self._seen[:8] = seen.to_bytes(8, "little")
        if self._fault == "kill" and seen == self._at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "full" and seen >= self._at and grows:
            named = () if path is None else (os.fsdecode(path),)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)


def _run(trial: dict[str, Any], seen: mmap.mmap) -> int:
    from flexctl.cli.app import main

    os.chdir(trial["folder"])
    os.environ |= trial["environment"]
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{trial['said']}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    if trial["fault"] == "stranger":
        _become_a_stranger()
    else:
        _Counter(trial["fault"], trial["at"], seen)
    code = main(trial["words"])
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _try(trial: dict[str, Any]) -> dict[str, Any]:
    seen = mmap.mmap(-1, 8)
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = _run(trial, seen)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "moments": int.from_bytes(seen[:8], "little"),
        **{name: Path(f"{trial['said']}.{name}").read_text(errors="replace") for name in ("out", "err")},
    }


def _import_everything() -> None:
    """Import what commands import, and cut down what takes long."""
    import huggingface_hub
    import pydantic.type_adapter
    import securesystemslib.signer
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.flex_olmo.modeling_flex_olmo
    import transformers.models.olmo2.modeling_olmo2  # noqa: F401

    import flexctl
    import flexctl.cli.app
    from flexctl.engine import demo
    from flexctl.model import presets
    from flexctl.steps.speed import remember_rates
    from flexctl.trust import keys

    assert huggingface_hub
    assert pydantic.type_adapter
    assert securesystemslib.signer
    torch.set_num_threads(1)
    for name in flexctl.__all__:
        getattr(flexctl, name)
    keys.KDF_ROUNDS = 1
    presets.PRESETS["nano"] = replace(presets.PRESETS["nano"], max_tokens=4_000)
    demo._EXPERT_TOKENS, demo._DOMAIN_BYTES = 2_000, 60_000
    remember_rates({"float32": 1.0, "bfloat16": 1.0})


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    _import_everything()
    for line in sys.stdin:
        print(json.dumps(_try(json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
