"""Make the hostile files beside this script anew: python tests/attacks/make_attacks.py

Keys are made for it and thrown away, so that signatures are others each time; what is refused stays the same.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]

from builders import make_expert  # noqa: E402

from flexctl.bundle import Anchor, RawTensor, open_anchor, open_expert  # noqa: E402
from flexctl.bundle.tensors import from_float32, to_float32  # noqa: E402
from flexctl.engine.keygen import KeygenConfig, keygen  # noqa: E402
from flexctl.engine.merge import MergeConfig, merge  # noqa: E402
from flexctl.engine.remove import RemoveConfig, remove  # noqa: E402
from flexctl.engine.sign import SignConfig, sign  # noqa: E402

Change = Callable[[dict[str, Any]], object]


def scaled(anchor: Anchor, name: str, by: float) -> None:
    """Write an expert whose matrices are those of a good one, times ``by``."""
    good = open_expert(HERE.parent / "vectors/code.st")
    tensors = {}
    for key in good.spans:
        raw = good.tensor(key)
        values = to_float32(raw.dtype, raw.data) * np.float32(1 if key == "router.weight" else by)
        tensors[key] = RawTensor(raw.dtype, raw.shape, from_float32(raw.dtype, values))
    make_expert(Path(f"{name}.st"), anchor, name, tensors=tensors)


def signed(anchor: Anchor, name: str, key: str, seed: int) -> None:
    """Write an expert and its signature."""
    make_expert(Path(f"{name}.st"), anchor, name, seed=seed)
    sign(SignConfig(path=Path(f"{name}.st"), key=Path(key)))


def rewritten(source: str, target: str, change: Change) -> None:
    """Write a copy of an envelope whose object ``change`` has been at."""
    envelope = json.loads(Path(source).read_text())
    change(envelope)
    Path(target).write_text(json.dumps(envelope))


def told(change: Change) -> Change:
    """Return a change of an envelope's payload."""

    def within(envelope: dict[str, Any]) -> None:
        payload = json.loads(base64.b64decode(envelope["payload"]))
        change(payload["predicate"])
        envelope["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    return within


def make() -> None:
    """Write every file into the current folder."""
    anchor = open_anchor(HERE.parent / "vectors/anchor")
    lines = {
        name: keygen(KeygenConfig(output=Path(f"{name}.key"))).public_key for name in ("owner", "late", "hub", "no")
    }
    entries = {name: f'[[owners]]\nname = "{name}"\nkey = "{line}"\n' for name, line in lines.items()}
    trust = [entries["owner"] + 'bundles = ["law"]\n', entries["late"] + "revoked = 2026-01-01\n", entries["hub"]]
    Path("trust.toml").write_text("\n".join(trust))
    Path("one-key-two-owners.toml").write_text(entries["owner"] + entries["owner"].replace('"owner"', '"other"'))
    Path("quoted-date.toml").write_text(entries["late"] + 'revoked = "2026-01-01"\n')
    scaled(anchor, "huge", 100)
    scaled(anchor, "hollow", 0)
    signed(anchor, "law", "owner.key", 1)
    signed(anchor, "revoked", "late.key", 2)
    signed(anchor, "not-mine", "owner.key", 3)
    signed(anchor, "forged", "no.key", 4)
    owner_id = next(iter(json.loads(Path("law.st.sig").read_text())["signatures"]))["keyid"]
    rewritten("forged.st.sig", "forged.st.sig", lambda envelope: envelope["signatures"][0].update(keyid=owner_id))
    make_expert(Path("borrowed.st"), anchor, "borrowed", seed=5)
    shutil.copy("law.st.sig", "borrowed.st.sig")
    make_expert(Path("twice.st"), anchor, "twice", seed=6)
    rewritten("law.st.sig", "twice.st.sig", lambda envelope: envelope["signatures"].append(envelope["signatures"][0]))
    make_expert(Path("deep.st"), anchor, "deep", seed=7)
    Path("deep.st.sig").write_text('{"payload":' + "[" * 20_000 + "]" * 20_000 + "}")
    merge(MergeConfig(experts=(Path("law.st"),), anchor=anchor.path, output=Path("m")))
    remove(
        RemoveConfig(
            names=("law",), source=Path("m"), output=Path("left"), tombstone=True, reason="x", key=Path("hub.key")
        )
    )
    Path("law.removed.json").rename("of-another-model.json")
    good = "of-another-model.json"
    rewritten(good, "changed-record.json", told(lambda record: record.update(reason="it was never inside")))
    rewritten(good, "path-in-record.json", told(lambda record: record["expert"].update(name="../law")))
    rewritten(good, "no-such-day.json", told(lambda record: record.update(date="2026-13-40")))


if __name__ == "__main__":
    os.environ["FLEXCTL_PASSPHRASE"] = "thrown away afterwards"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make()
        for path in sorted(Path().iterdir()):
            if path.is_file() and ".key" not in path.name and not path.name.endswith(".run.json"):
                shutil.copy(path, HERE)
