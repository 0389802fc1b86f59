"""Every reader of files that somebody else may have written, with a valid file of each kind to begin from."""

from __future__ import annotations

import gzip
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import zstandard
from builders import make_index, make_world

from flexctl import workspace
from flexctl.bundle.expert import open_expert
from flexctl.bundle.index import open_index
from flexctl.bundle.manifest import write_manifest
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.proxy import ProxyDocument, PublicText, open_proxy, write_proxy
from flexctl.bundle.signatures import read_signature
from flexctl.bundle.validation import read_manifest
from flexctl.evaluation.records import read_results
from flexctl.evaluation.tasks.files import read_task_file
from flexctl.text.documents import read_documents
from flexctl.tracing.spans import longest_spans
from flexctl.trust.owners import read_trust
from flexctl.trust.records import read_record

__all__ = ["Reader", "readers"]

_LINES = [{"text": "the court held that", "id": 1}, {"text": "so it is \u20ac", "id": 2}]
_ITEM = {"id": "1", "question": "Which is wet?", "choices": ["water", "sand"], "answer": 0}
_TOML = b"[workspace]\nanchor = 'anchor'\n\n[train_expert]\nlr = 1e-3\nmax_steps = 3\n"


@dataclass(frozen=True)
class Reader:
    """One reader.

    Attributes:
        file: Where the file lies that is changed.
        valid: What is right there.
        read: Reads it.
    """

    file: Path
    valid: bytes = field(repr=False)
    read: Callable[[], object] = field(repr=False)

    def __call__(self, data: bytes) -> None:
        """Read other bytes in place of the file's."""
        self.file.write_bytes(data)
        self.read()


def readers(root: Path) -> dict[str, Reader]:
    """Return every reader by name; their files lie in ``root``."""
    world = make_world(root / "world", ("law", "low"))
    found = {
        "expert": _opened(world.files("law")[0]),
        "low-rank expert": _opened(world.files("low")[0]),
        "anchor's manifest": _opened(root / "world/anchor/flexctl.json", root / "world/anchor"),
        "anchor's weights": _opened(root / "world/anchor/model.safetensors", root / "world/anchor"),
        "manifest": _manifest(root / "manifest.json", write_manifest(world.experts["law"].manifest)),
        "proxy list": _proxy(root / "law.proxy.json", world.anchor.manifest.ref),
        "flexctl.toml": _toml(root / "space"),
        "task file": _task(root / "task.jsonl"),
        "results": Reader(root / "results.json", b'{"digest":"sha256:0"}', lambda: read_results(root / "results.json")),
    }
    found |= _signed(root / "signed")
    found |= {f"index, {name}": reader for name, reader in _index(root / "index").items()}
    return found | {f"text, {name}": _text(root / name, data) for name, data in _corpora().items()}


def _opened(file: Path, bundle: Path | None = None) -> Reader:
    return Reader(file, file.read_bytes(), lambda: open_bundle(bundle or file))


def _manifest(file: Path, data: bytes) -> Reader:
    return Reader(file, data, lambda: read_manifest(file.read_bytes(), str(file)))


def _proxy(file: Path, ref: object) -> Reader:
    write_proxy(
        file,
        name="law",
        anchor=ref,  # type: ignore[arg-type]
        public=PublicText(sha256="0" * 64, documents=9),
        encoder=None,
        documents=[ProxyDocument(index=3, sha256="0" * 16)],
        overwrite=True,
    )
    return Reader(file, file.read_bytes(), lambda: open_proxy(file))


def _toml(folder: Path) -> Reader:
    folder.mkdir()
    return Reader(folder / "flexctl.toml", _TOML, lambda: workspace.find(folder))


def _task(file: Path) -> Reader:
    return Reader(file, (json.dumps(_ITEM) + "\n").encode() * 2, lambda: read_task_file(file))


def _signed(folder: Path) -> dict[str, Reader]:
    """Return readers of what signs and what trusts, over the files that lie beside this one."""
    folder.mkdir()
    names = ("law.st", "law.st.sig", "trust.toml", "of-another-model.json")
    expert, signature, trust, record = (Path(shutil.copy(Path(__file__).with_name(name), folder)) for name in names)
    manifest = open_expert(expert).manifest
    return {
        "signature": Reader(signature, signature.read_bytes(), lambda: read_signature(signature, manifest)),
        "trust file": Reader(trust, trust.read_bytes(), lambda: read_trust(trust)),
        "removal record": Reader(record, record.read_bytes(), lambda: read_record(record)),
    }


def _index(folder: Path) -> dict[str, Reader]:
    made = {}
    for name in ("flexctl.json", "sources.json", "0000.text", "0000.suffixes", "0000.documents"):
        place = folder / name
        make_index(place, ["the court held that", "so it is"])
        index = place / "an.index"

        def look(index: Path = index) -> None:
            opened = open_index(index)
            list(longest_spans(opened, b"the court held so", 3))
            opened.count(b"court")

        made[name] = Reader(index / name, (index / name).read_bytes(), look)
        shutil.rmtree(place / "work", ignore_errors=True)
    return made


def _text(file: Path, data: bytes) -> Reader:
    return Reader(file, data, lambda: sum(map(len, read_documents([file]))))


def _corpora() -> dict[str, bytes]:
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps(line) + "\n" for line in _LINES).encode()
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [line["text"] for line in _LINES]}), table)
    return {
        "a.txt": b"plain words\n",
        "a.jsonl": lines,
        "a.json": json.dumps(_LINES).encode(),
        "a.csv": b'text,id\n"the court, held",1\nso,2\n',
        "a.tsv": b"text\tid\nso\t2\n",
        "a.parquet": table.getvalue(),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
    }
