"""How many bytes of a merged model a content-addressed store lacks that has the anchor and the experts already.

The store is hf_xet's own, in a folder: chunks of about 64 KiB whose borders the content decides, as on the Hub.
"""

from __future__ import annotations

import os
from pathlib import Path

from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from tests.benchmarks.showing import show
from tests.builders import make_world

NAMES = ("code", "law", "math")
SIZES = {"layers": 2, "hidden": 2048, "inner": 5632, "vocab": 16_384, "dtype": "BF16"}
"""Two layers with matrices of OLMo-2-1B's width."""


def send(store: Path, files: list[Path]) -> tuple[int, int]:
    """Send files to a store in a folder; return how many bytes they have and how many of those it lacked."""
    import hf_xet

    store.mkdir(exist_ok=True)
    commit = hf_xet.XetSession().new_upload_commit(endpoint=f"local://{store}")
    for file in files:
        commit.start_upload_file(str(file))
    metrics = commit.wait_to_finish().dedup_metrics
    return metrics.total_bytes, metrics.new_bytes


def bench_sending(root: Path) -> None:
    """Send anchor and experts, then a merged model of them file by file, then the model without one of them."""
    os.environ["HF_HOME"] = str(root / "hf")
    store, world = root / "store", make_world(root / "world", NAMES, **SIZES)
    told("anchor and three experts", *send(store, [*sorted(world.anchor.path.iterdir()), *world.files()]))
    merged = merge(MergeConfig(experts=world.files(), anchor=world.anchor.path, output=root / "merged")).path
    total = lacked = 0
    for file in sorted(merged.iterdir()):
        size, new = send(store, [file])
        told(f"merged: {file.name}", size, new)
        total, lacked = total + size, lacked + new
    told("merged, all of it", total, lacked)
    less = remove(RemoveConfig(names=("code",), source=merged, output=root / "less")).path
    told("the same without the first expert", *send(store, sorted(less.iterdir())))


def told(name: str, size: int, lacked: int) -> None:
    """Show one row."""
    show(name, f"{lacked / size:.2%}", f"{lacked / 1e6:.2f} of {size / 1e6:.2f} MB are new to the store")
