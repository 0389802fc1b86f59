"""Makes tests/vectors/, small bundles that are right or wrong in one way: ``python tests/make_vectors.py``.

vectors.json says of each what a reader must say; docs/format.md, section 12, has its fields. Bundles of a released
schema version are never made again: a change here that moves their bytes is a new version of the format.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from builders import forge_expert, make_checkpoint, make_expert, random_tensor, simple_moe_config

from flexctl.bundle import Anchor, Expert, RawTensor, RouterInfo, open_anchor, open_expert, write_anchor
from flexctl.bundle import expert as expert_module
from flexctl.bundle.codec import canonical_json, encode
from flexctl.bundle.headers import header_bytes
from flexctl.bundle.manifest import MANIFEST_KEY
from flexctl.bundle.router import write_router_file
from flexctl.engine.merge import MergeConfig, merge

FOLDER = Path(__file__).parent / "vectors"
GATE, UP = (f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
SIZES: dict[str, Any] = {"layers": 1, "hidden": 4, "inner": 4, "vocab": 8, "dtype": "BF16"}


def small_anchor(path: Path, seed: int = 0) -> Anchor:
    """Write an anchor of one layer of four, whose public sample holds two documents."""
    checkpoint = make_checkpoint(path.with_name(f"{path.name}-checkpoint"), seed=seed, **SIZES)
    config = json.loads((checkpoint / "config.json").read_text())
    rng = np.random.PCG64(1)
    hidden = SIZES["hidden"]
    space = {"mean": (hidden,), "covariance_factor": (hidden, hidden), "covariance_diagonal": (hidden,)}
    tokens, offsets = np.array([1, 5, 6, 2, 1, 7, 2], "<i4"), np.array([0, 4, 7], "<i8")
    write_anchor(
        path,
        checkpoint=checkpoint,
        name="vectors",
        moe_config=simple_moe_config(config),
        router_space={f"layers.0.{name}": random_tensor(rng, "F32", shape) for name, shape in space.items()},
        public_sample={
            "tokens": RawTensor("I32", tokens.shape, tokens.view(np.uint8)),
            "offsets": RawTensor("I64", offsets.shape, offsets.view(np.uint8)),
        },
        overwrite=False,
        license="Apache-2.0",
    )
    shutil.rmtree(checkpoint)
    (path / "run.json").unlink(missing_ok=True)
    return open_anchor(path)


def small_expert(path: Path, anchor: Anchor, name: str, **changes: Any) -> Expert:
    """Write an expert, with nothing beside it."""
    make_expert(path, anchor, name, **changes)
    path.with_suffix(".run.json").unlink(missing_ok=True)
    return open_expert(path)


class Maker:
    """Writes vectors into a folder and keeps what is to be said of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vectors: list[dict[str, Any]] = []

    def say(self, path: str, about: str, says: str = "ok", names: str | None = None, **more: Any) -> Path:
        """Note one vector; return where it belongs."""
        entry = {"path": path, "about": about, "says": says, **({"names": names} if names else {}), **more}
        self.vectors.append(entry)
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


def valid(make: Maker) -> tuple[Anchor, Expert]:
    """Write one bundle of each kind."""
    anchor = small_anchor(make.say("anchor", "one layer of four, a public sample of two documents"))
    code = small_expert(make.say("code.st", "a full expert"), anchor, "code")
    low = small_expert(make.say("low.st", "a low-rank expert, rank 2"), anchor, "low", rank=2)
    rows = write_router_file(
        make.say("rows.st", "router rows alone"),
        anchor=anchor,
        name="code",
        rows=code.tensor("router.weight"),
        router=RouterInfo(
            kind="discriminant", samples=3, encoder=None, trained=False, bias=(-1.5,), own_covariance=0.1
        ),
        overwrite=False,
    )
    rows.path.with_suffix(".run.json").unlink(missing_ok=True)
    other_layout(make.say("code-other-layout.st", "the same expert: no padding, tensors in another order"), code)
    merged = make.say("merged", "anchor, code.st and low.st, merged in whatever order", merge_of=["code.st", "low.st"])
    merge(MergeConfig(experts=(code.path, low.path), anchor=anchor.path, output=merged))
    (merged / "run.json").unlink(missing_ok=True)
    return anchor, code


def other_layout(path: Path, expert: Expert) -> None:
    """Write an expert as a writer that knows nothing of our layout might."""
    tensors = {name: expert.tensor(name) for name in sorted(expert.spans, reverse=True)}
    head = header_bytes(tensors, {MANIFEST_KEY: canonical_json(encode(expert.manifest)).decode()})
    text = head[8:].rstrip(b" ")
    data = b"".join(bytes(tensor.view()) for tensor in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def broken_files(make: Maker, code: Expert) -> None:
    """Write files that are wrong before anybody looks at the manifest."""
    data = code.path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    opened = "refused when opened"

    def put(name: str, content: bytes, about: str, names: str, says: str = opened) -> None:
        make.say(f"invalid/{name}.st", about, says, names).write_bytes(content)

    put("truncated", data[:-4], "four bytes are missing at the end", "truncated")
    put("trailing", data + b"\0" * 4, "four bytes follow the last tensor", "belong to no tensor")
    put("long-header", (2**40).to_bytes(8, "little") + data[8:], "the header claims a terabyte", "header")
    put("after-header", data[: start - 1] + b"x" + data[start:], "a letter among the spaces after it", "header")
    twice = data.replace(b'{"__metadata__"', b'{"a":0,"a":0,"__metadata__"')
    put("name-twice", cut_spaces(twice, start, len(twice) - len(data)), "a name twice in the header", "stands twice")
    overlap = data.replace(b'"data_offsets":[32,64]', b'"data_offsets":[31,63]')
    put("overlap", overlap, "two tensors share a byte", "data_offsets")
    keys = data.replace(b'"__metadata__":{', b'"__metadata__":{"format":"pt",')
    keys = cut_spaces(keys, start, len(keys) - len(data))
    put("two-keys", keys, "a second key in __metadata__", "__metadata__")
    flipped = bytearray(data)
    flipped[start] ^= 1
    put("flipped-bit", bytes(flipped), "one bit of the first tensor is another", GATE, "refused when verified")


def cut_spaces(data: bytes, start: int, count: int) -> bytes:
    """Return a file whose header grew by ``count``, with as many of its last spaces gone."""
    end = start + count
    assert data[end - count : end] == b" " * count
    return data[: end - count] + data[end:]


def broken_experts(make: Maker, anchor: Anchor, code: Expert) -> None:
    """Write experts whose file is sound and whose manifest or tensors are not."""

    def forge(file: str, about: str, names: str, says: str = "refused when opened", **changes: Any) -> None:
        forge_expert(make.say(f"invalid/{file}.st", about, says, names), code, **changes)

    def tensors(**changes: RawTensor | None) -> dict[str, RawTensor]:
        found = {name: code.tensor(name) for name in code.spans} | changes
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    forge("version-2", "a schema version that is not known", "schema_version", schema_version=2)
    forge("kind", "a kind that is not known", "kind", kind="model")
    forge("unknown-field", "a field that is not known", "colour", colour="red")
    forge("digest", "a digest that its content does not have", "digest", digest="sha256:" + "0" * 64)
    forge("reserved-name", "the name of the anchor's own expert", "name", name="public")
    forge("path-in-name", "a name that is a path", "name", name="../code")
    forge("bias-count", "a bias for a layer that is not there", "router.bias", router__bias=[-1.5, -1.5])
    forge("date", "a day that no calendar has", "data.expires", data__expires="2030-02-30")
    forge("rank", "whole matrices, and a rank", "lora_A", rank=2)
    spaced(make.say("invalid/spaces.st", "a manifest with spaces", "refused when opened", "canonical"), code)
    forge("missing-tensor", "no up projection", UP, tensors=tensors(**{UP: None}))
    extra = RawTensor("F32", (1,), np.zeros(4, np.uint8))
    forge("extra-tensor", "a tensor that belongs nowhere", "surprise", tensors=tensors(surprise=extra))
    flat = RawTensor("BF16", (16,), code.tensor(UP).data)
    forge("shape", "an up projection of one dimension", UP, tensors=tensors(**{UP: flat}))
    wide = RawTensor("F32", (4, 4), np.zeros(64, np.uint8))
    forge("dtype", "an up projection in float32, the anchor's are bfloat16", UP, tensors=tensors(**{UP: wide}))
    nan = RawTensor("BF16", (4, 4), np.full(32, 0x7F, np.uint8) | np.uint8(0x80))
    forge("not-finite", "NaN in the up projection", UP, "refused when verified", tensors=tensors(**{UP: nan}))
    merged = "refused when merged"
    forge("other-anchor", "made for another anchor", "anchor", merged, anchor__digest="sha256:" + "1" * 64)
    forge("expired", "its last day was in 2020", "expires", merged, data__expires="2020-12-31")
    path = make.say(
        "invalid/same-name.st", "merged beside code.st, another of its name", merged, "code", beside=["code.st"]
    )
    small_expert(path, anchor, "code", seed=99)


def spaced(path: Path, expert: Expert) -> None:
    """Write an expert whose manifest is JSON, but not canonical."""
    tensors = {name: expert.tensor(name) for name in expert.spans}
    head = header_bytes(tensors, {MANIFEST_KEY: json.dumps(encode(expert.manifest), sort_keys=True)})
    path.write_bytes(head + b"".join(bytes(tensor.view()) for tensor in tensors.values()))


def broken_directories(make: Maker) -> None:
    """Write merged models and an anchor with one thing changed."""

    def change(
        name: str, about: str, names: str, says: str, spoil: Callable[[Path], None], source: str = "merged"
    ) -> None:
        target = make.say(f"invalid/{name}", about, says, names)
        shutil.copytree(make.folder / source, target)
        spoil(target)

    opened, verified = "refused when opened", "refused when verified"
    change("merged-config", "config.json has another byte", "config.json", opened, lambda at: add(at / "config.json"))
    change("merged-card", "README.md has another byte", "README.md", verified, lambda at: add(at / "README.md"))
    change("merged-stranger", "a file that is not listed", "notes.txt", verified, lambda at: add(at / "notes.txt"))
    change("merged-router", "one bit of a router is another", "mlp.gate.weight", verified, flip_last_bit)
    change("merged-gap", "an expert's file is gone", "model-expert-code", opened, lambda at: expert_of(at).unlink())
    change("anchor-code", "its manifest lists code", "tokenizer_x.py", opened, list_code, "anchor")


def add(path: Path) -> None:
    """Write one more byte at a file's end."""
    with path.open("ab") as file:
        file.write(b"\n")


def expert_of(merged: Path) -> Path:
    """Return the file of the expert called code."""
    return merged / "model-expert-code.safetensors"


def flip_last_bit(merged: Path) -> None:
    """Change the last bit of the router's file."""
    path = merged / "model-router.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def list_code(anchor: Path) -> None:
    """List a Python file in an anchor's manifest, with the digest that it then has."""
    from flexctl.bundle.manifest import TensorInfo, digest_of

    path = anchor / "flexctl.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["tokenizer_x.py"] = "0" * 64
    infos = {name: TensorInfo(t["dtype"], tuple(t["shape"]), t["sha256"]) for name, t in manifest["tensors"].items()}
    manifest["digest"] = digest_of(infos, manifest["files"])
    path.write_bytes(canonical_json(manifest))


def write_vectors(folder: Path) -> None:
    """Write all vectors and vectors.json; the bytes are the same on every machine."""
    expert_module.software_versions = lambda: {"flexctl": "0.1.0"}  # type: ignore[assignment]
    make = Maker(folder)
    anchor, code = valid(make)
    broken_files(make, code)
    broken_experts(make, anchor, code)
    broken_directories(make)
    text = json.dumps({"schema_version": 1, "vectors": make.vectors}, indent=1)
    (folder / "vectors.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fresh:
        write_vectors(Path(fresh))
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(fresh, FOLDER)
    sys.stdout.write(f"{FOLDER}\n")
