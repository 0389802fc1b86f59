"""merge: the laws of the set, exact bytes, all refusals, flat memory, stock loading."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import World, forge_expert, make_anchor, make_expert, make_tensors, make_world, read_directory
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.bundle import RawTensor, open_anchor, open_expert, open_merged
from flexctl.bundle.headers import read_header
from flexctl.bundle.lowrank import expand_bytes
from flexctl.engine.merge import MergeConfig, MergeResult, merge
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.families import FAMILIES
from flexctl.routing.overlap import overlaps
from flexctl.runtime import SilentReporter

NAMES = ("code", "law", "low", "math")


class Listener(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"), NAMES, dtype="BF16", shards=2)


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


def merged(world: World, output: Path, *experts: Path, **settings: Any) -> MergeResult:
    return merge(MergeConfig(experts=experts, anchor=world.anchor.path, output=output, **settings))


# Laws 1 and 2, and adding: the result is a function of the set.


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_the_same_set_gives_the_same_bytes_by_whatever_way(world: World, data: st.DataObject) -> None:
    root = Path("ways")
    shutil.rmtree(root, ignore_errors=True)
    names = data.draw(st.lists(st.sampled_from(NAMES), unique=True))
    first = merged(world, root / "a", *world.files(*names) if names else ())
    order = data.draw(st.permutations(names))
    cut = data.draw(st.integers(0, len(order)))
    begun, added = order[:cut], order[cut:]
    merged(world, root / "b", *world.files(*begun) if begun else ())
    in_place = data.draw(st.booleans())
    more = world.files(*added) if added else ()
    where = {"overwrite": True} if in_place else {"output": root / "c"}
    second = merge(MergeConfig(experts=(root / "b", *more), **where))
    assert second.path == (root / "b" if in_place else root / "c")
    assert read_directory(first.path) == read_directory(second.path)
    assert first.digest == second.digest
    assert [expert.name for expert in second.experts] == ["public", *sorted(names)]


def test_the_workspace_s_own_model_is_added_to_in_place(world: World) -> None:
    merged(world, Path("merged"), *world.files("law"))
    merge(MergeConfig(experts=(Path("merged"), *world.files("code"))))
    merged(world, Path("fresh"), *world.files("code", "law"))
    assert read_directory(Path("merged")) == read_directory(Path("fresh"))
    with pytest.raises(UsageError, match="exists already"):
        merge(MergeConfig(experts=(Path("fresh"), *world.files("low"))))
    with pytest.raises(UsageError, match="exists already"):
        merged(world, Path("merged"), *world.files("low"))


def test_who_will_take_whose_text_is_expected_from_the_rows_and_told_once(world: World) -> None:
    listener = Listener()
    config = MergeConfig(experts=tuple(world.files("code", "law")), anchor=world.anchor.path, output=Path("m"))
    routing = merge(config, listener).expected_routing
    assert routing is not None
    assert list(routing) == ["public", "code", "law"]
    assert all(list(shares) == list(routing) for shares in routing.values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in routing.values())
    told = [warning for warning in listener.warnings if "take each other's text" in warning]
    assert len(told) == bool(overlaps(routing))
    for overlap in overlaps(routing):
        assert f"{overlap.taker} {overlap.share:.0%} of {overlap.text}" in told[0]
    assert merged(world, Path("planned"), *world.files("code", "law"), dry_run=True).expected_routing == routing
    # Adding needs no anchor, and without one nothing can be expected.
    assert merge(MergeConfig(experts=(Path("m"),), output=Path("n"))).expected_routing is None


# Laws 3 and 4: the owner's and the anchor's bytes.


def test_every_byte_is_the_owner_s_or_the_anchor_s(world: World) -> None:
    merged(world, Path("m"), *world.files())
    weights = open_merged(Path("m")).weights()
    anchor = world.anchor.weights()
    assert {name: tensor.data.tobytes() for name, tensor in weights.shared.items()} == {
        name: tensor.data.tobytes() for name, tensor in anchor.shared.items()
    }
    for name, tensor in anchor.experts["public"].items():
        assert weights.experts["public"][name].data.tobytes() == tensor.data.tobytes()
    for index, name in enumerate(NAMES, start=1):
        expert = world.experts[name]
        rows = b"".join(router.data.reshape(5, -1)[index].tobytes() for router in weights.router)
        assert rows == expert.router().data.tobytes()
        if name != "low":
            for tensor_name, tensor in weights.experts[name].items():
                assert tensor.data.tobytes() == expert.tensor(tensor_name).data.tobytes()
    public = world.anchor.feed_forward()
    low = world.experts["low"].spans
    for tensor_name, tensor in weights.experts["low"].items():
        blocks = expand_bytes(public[tensor_name], low[f"{tensor_name}.lora_A"], low[f"{tensor_name}.lora_B"])
        assert tensor.data.tobytes() == b"".join(block.tobytes() for block in blocks)
    assert weights.num_experts_per_tok == 4
    assert list(weights.experts) == ["public", *NAMES]
    assert not any(router.data.reshape(5, -1)[0].any() for router in weights.router)


def test_an_expert_s_bytes_lie_at_the_same_offset_everywhere(world: World) -> None:
    merged(world, Path("m"), *world.files())
    own = next(iter(world.experts["law"].spans.values()))
    inside = read_header(Path("m/model-expert-law.safetensors"))
    assert next(iter(inside.tensors.values())).start == own.start
    assert inside.metadata["flexctl"] == world.experts["law"].manifest_text
    length = sum(span.stop - span.start for span in inside.tensors.values())
    data = Path("m/model-expert-law.safetensors").read_bytes()
    assert data[own.start :] == world.experts["law"].path.read_bytes()[own.start : own.start + length]


def test_the_directory_is_as_the_design_has_it(world: World) -> None:
    result = merged(world, Path("m"), *world.files("law", "code"))
    assert sorted(os.listdir("m")) == [
        "README.md",
        "config.json",
        "flexctl.json",
        "generation_config.json",
        "model-expert-code.safetensors",
        "model-expert-law.safetensors",
        "model-expert-public.safetensors",
        "model-router.safetensors",
        "model-shared.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads(Path("m/config.json").read_text())
    assert config == {**world.anchor.manifest.moe_config, "num_experts": 3, "num_experts_per_tok": 3}
    assert Path("m/config.json").read_text() == json.dumps(config, indent=2, sort_keys=True) + "\n"
    index = json.loads(Path("m/model.safetensors.index.json").read_text())
    sizes = {}
    for file in sorted(set(index["weight_map"].values())):
        for name, span in read_header(Path("m") / file).tensors.items():
            assert index["weight_map"][name] == file
            sizes[name] = span.stop - span.start
    assert sizes.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(sizes.values())
    manifest = json.loads(Path("m/flexctl.json").read_text())
    assert set(manifest["files"]) == set(os.listdir("m")) - {"flexctl.json"}
    assert set(manifest["tensors"]) == set(sizes)
    assert manifest["num_experts_per_tok_requested"] == 4
    assert manifest["router"] == {"tuned_with": None}
    assert result.bytes_written == sum(len(data) for data in read_directory(Path("m")).values())
    assert result.num_experts == 3
    assert result.num_experts_per_tok == 3
    assert result.peak_rss_bytes > 0


def test_without_an_expert_it_is_the_anchor_alone(world: World) -> None:
    result = merged(world, Path("deep/down/m"))
    assert [expert.name for expert in result.experts] == ["public"]
    assert result.num_experts_per_tok == 1
    assert verify(VerifyConfig(path=result.path, anchor=world.anchor.path)).ok


def test_top_k_is_kept_as_asked_and_clamped_where_it_is_used(world: World) -> None:
    listener = Listener()
    config = MergeConfig(experts=world.files("law"), anchor=world.anchor.path, output=Path("m"), top_k=3)
    assert merge(config, listener).num_experts_per_tok == 2
    assert listener.warnings == ["`top_k` 3 is more than there are experts: 2 are used"]
    assert merge(MergeConfig(experts=(Path("m"), *world.files()[:1]), output=Path("n"))).num_experts_per_tok == 3
    assert open_merged(Path("n")).manifest.num_experts_per_tok_requested == 3
    with pytest.raises(UsageError, match="top_k: 0"):
        merged(world, Path("o"), top_k=0)


def test_a_folder_of_experts_is_named_as_one(world: World) -> None:
    folder, files = world.root / "experts", world.files()
    for experts in ((folder,), (files[0], folder)):
        with pytest.raises(UsageError, match="is a folder with experts in it") as caught:
            merged(world, Path("m"), *experts)
        assert caught.value.hint == f"name its files: {folder}/*.st"
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("anchor_license", "licenses", "expected"),
    [
        ("Apache-2.0", ["apache-2.0", "Apache-2.0"], "Apache-2.0"),
        ("Apache-2.0", ["MIT", "Apache-2.0"], "other"),
        ("Apache-2.0", [None, "Apache-2.0"], "other"),
        (None, ["MIT", "MIT"], "other"),
        (None, [], "other"),
        (None, [None, None], "other"),
        ("ask our lawyers", ["ask our lawyers"], "other"),
    ],
)
def test_the_license_is_computed_and_never_invented(
    tmp_path: Path, anchor_license: str | None, licenses: list[str | None], expected: str
) -> None:
    anchor = make_anchor(tmp_path / "anchor", license=anchor_license)
    files = tuple(
        make_expert(tmp_path / f"{i}.st", anchor, f"e{i}", license=license).path for i, license in enumerate(licenses)
    )
    listener = Listener()
    result = merge(MergeConfig(experts=files, anchor=anchor.path, output=Path("m")), listener)
    assert result.license == expected == open_merged(Path("m")).manifest.license
    about_rights = [warning for warning in listener.warnings if "take each other's text" not in warning]
    unknown = {anchor_license, *licenses} == {None}
    assert bool(about_rights) == (expected == "other" and not unknown)
    assert listener.notes == (["license: unknown, as the inputs' are"] if unknown else [])
    card = Path("m/README.md").read_text()
    assert f"license: {expected.lower()}\n" in card
    assert ("license_name: see-experts" in card) == (expected == "other")


# Refusals: one line that names file and field, and nothing written.


@contextmanager
def refused(message: str, error: type[FlexctlError] = BundleError) -> Iterator[None]:
    before = read_directory(Path())
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in caught.value.message
    assert read_directory(Path()) == before
    assert not Path("out").exists()


def change_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def nan_in(expert: Any, name: str) -> dict[str, RawTensor]:
    tensors = {key: expert.tensor(key) for key in expert.spans}
    data = np.array(tensors[name].data)
    data[-2:] = np.frombuffer(b"\xc0\x7f", np.uint8)  # NaN in BF16, and the upper half of one in F32
    return tensors | {name: RawTensor(tensors[name].dtype, tensors[name].shape, data)}


def test_an_expert_of_another_anchor_is_refused(world: World, tmp_path: Path) -> None:
    other = make_anchor(tmp_path / "other", dtype="BF16", seed=5)
    stranger = make_expert(tmp_path / "stranger.st", other, "stranger")
    with refused(r"stranger.st: anchor.digest is sha256:\w+ \(tiny-anchor\); expected sha256:\w+"):
        merged(world, Path("out"), stranger.path)
    merged(world, Path("m"), *world.files("law"))
    with refused(r"stranger.st: anchor.digest is"):
        merge(MergeConfig(experts=(Path("m"), stranger.path), output=Path("out")))
    with refused(r"other: digest is .* m was made of"):
        merge(MergeConfig(experts=(Path("m"),), anchor=other.path, output=Path("out")))


def test_another_tokenizer_is_refused(world: World, tmp_path: Path) -> None:
    shutil.copytree(world.anchor.path, tmp_path / "anchor")
    (tmp_path / "anchor/tokenizer.json").write_text('{"version": "2.0"}\n')
    with refused(r"anchor/tokenizer.json: its bytes are not those of the manifest"):
        merge(MergeConfig(experts=world.files("law"), anchor=tmp_path / "anchor", output=Path("out")))


def test_duplicate_names_and_digests_are_refused(world: World, tmp_path: Path) -> None:
    again = make_expert(tmp_path / "again.st", world.anchor, "law", seed=77)
    with refused(r"again.st: name is 'law', and so is that of .*law.st"):
        merged(world, Path("out"), *world.files("law"), again.path)
    twin = forge_expert(tmp_path / "twin.st", world.experts["law"], name="twin")
    with refused(r"twin.st: digest is sha256:\w+, and so is that of .*law.st"):
        merged(world, Path("out"), *world.files("law"), twin)
    merged(world, Path("m"), *world.files("law"))
    with refused(r"again.st: name is 'law', and so is that of m"):
        merge(MergeConfig(experts=(Path("m"), again.path), output=Path("out")))


@pytest.mark.parametrize("name", ["layers.0.mlp.gate_proj.weight", "layers.1.mlp.down_proj.weight", "router.weight"])
def test_tampered_bytes_are_refused_with_file_and_tensor(world: World, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copy(world.experts["law"].path, tmp_path / "copy.st"))
    change_byte(copy, open_expert(copy).spans[name].stop - 1)
    with refused(rf"copy.st: .*tensor {name}: its bytes are not those of the manifest"):
        merged(world, Path("out"), *world.files("code"), copy)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_tampered_low_rank_bytes_are_refused(world: World, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copy(world.experts["low"].path, tmp_path / "copy.st"))
    name = f"layers.1.mlp.up_proj.weight.{part}"
    change_byte(copy, open_expert(copy).spans[name].start)
    with refused(rf"copy.st: tensor {name}: its bytes are not those of the manifest"):
        merged(world, Path("out"), copy)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_tampered_anchor_is_refused(world: World, tmp_path: Path, name: str) -> None:
    anchor = open_anchor(Path(shutil.copytree(world.anchor.path, tmp_path / "anchor")))
    change_byte(anchor.spans[name].path, anchor.spans[name].start)
    with refused(rf"model-0000\d-of-00002.safetensors: tensor {name}: its bytes are not those of the manifest"):
        merge(MergeConfig(anchor=anchor.path, output=Path("out")))


@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj.weight", "router.weight"])
def test_tensors_that_are_not_finite_are_refused(world: World, tmp_path: Path, name: str) -> None:
    forged = forge_expert(tmp_path / "forged.st", world.experts["law"], nan_in(world.experts["law"], name))
    with refused(r"NaN or infinity"):
        merged(world, Path("out"), forged)


def test_low_rank_matrices_that_overflow_are_refused(tmp_path: Path) -> None:
    anchor = make_anchor(tmp_path / "anchor", dtype="F16")
    expert = make_expert(tmp_path / "low.st", anchor, "low", rank=2)
    tensors = {name: expert.tensor(name) for name in expert.spans}
    for part in ("lora_A", "lora_B"):
        name = f"layers.0.mlp.gate_proj.weight.{part}"
        large = np.full(tensors[name].shape, 1000, np.float16)
        tensors[name] = RawTensor("F16", tensors[name].shape, large.reshape(-1).view(np.uint8))
    forged = forge_expert(tmp_path / "x/low.st", expert, tensors)
    with refused(r"low.st: tensor layers.0.mlp.gate_proj.weight.lora_B: expanded, overflows F16"):
        merge(MergeConfig(experts=(forged,), anchor=anchor.path, output=Path("out"), accept=("low",)))


@pytest.mark.parametrize("missing", [1, 5000, 100_000])
def test_truncated_files_are_refused(world: World, tmp_path: Path, missing: int) -> None:
    copy = Path(shutil.copy(world.experts["law"].path, tmp_path / "copy.st"))
    os.truncate(copy, max(0, copy.stat().st_size - missing))
    with refused(r"copy.st: is truncated"):
        merged(world, Path("out"), copy)


def test_expired_rights_are_refused_unless_allowed(world: World, tmp_path: Path) -> None:
    old = make_expert(tmp_path / "old.st", world.anchor, "old", expires="2026-03-01")
    config = MergeConfig(experts=(old.path,), anchor=world.anchor.path, output=Path("out"))
    after = datetime.date(2026, 3, 2)
    with refused(r"old.st: data.expires of old is 2026-03-01, which is past"):
        merge(config, today=after)
    merge(config, today=datetime.date(2026, 3, 1))
    with pytest.raises(BundleError, match=r"out: data.expires of old is 2026-03-01"):
        merge(MergeConfig(experts=(Path("out"), *world.files("law")), output=Path("m")), today=after)
    allowed = MergeConfig(experts=(Path("out"), *world.files("law")), output=Path("m"), allow_expired=True)
    assert merge(allowed, today=after).num_experts == 3


def test_other_things_are_no_experts(world: World, tmp_path: Path) -> None:
    (tmp_path / "text.st").write_text("hello, I am no expert at all")
    with refused(r"text.st: is truncated"):
        merged(world, Path("out"), tmp_path / "text.st")
    with refused(r"none.st: no such file", UsageError):
        merged(world, Path("out"), tmp_path / "none.st")
    with refused(r"kind is 'anchor'; expected 'merged'"):
        merged(world, Path("out"), world.anchor.path)
    with refused(r"no such file", UsageError):
        merged(world, Path("out"), *world.files("law"), world.anchor.path)
    with refused(r"no such directory", UsageError):
        merge(MergeConfig(experts=world.files("law"), output=Path("out")))


def test_a_tampered_merged_model_is_not_added_to(world: World) -> None:
    merged(world, Path("m"), *world.files("law"))
    good = read_directory(Path("m"))
    spans = open_merged(Path("m")).headers["model-expert-law.safetensors"].tensors
    change_byte(Path("m/model-expert-law.safetensors"), next(iter(spans.values())).start)
    with refused(r"m/model-expert-law.safetensors: tensor model.layers.0\S+ its bytes are not"):
        merge(MergeConfig(experts=(Path("m"), *world.files("code")), output=Path("out")))
    with refused(r"m/model-expert-law.safetensors: tensor"):
        merge(MergeConfig(experts=(Path("m"), *world.files("code")), overwrite=True))
    Path("m/model-expert-law.safetensors").write_bytes(good["model-expert-law.safetensors"])
    Path("m/tokenizer.json").write_text("{}")
    with refused(r"m/tokenizer.json: its bytes are not those of the manifest"):
        merge(MergeConfig(experts=(Path("m"), *world.files("code")), output=Path("out")))


# Manners.


def test_a_dry_run_tells_and_writes_nothing(world: World) -> None:
    before = read_directory(Path())
    result = merged(world, Path("out"), *world.files(), dry_run=True)
    assert read_directory(Path()) == before
    assert result.dry_run
    assert result.digest is None
    assert result.bytes_written > 0
    assert [expert.name for expert in result.experts] == ["public", *NAMES]
    merged(world, Path("m"))
    with pytest.raises(UsageError, match="exists already"):
        merged(world, Path("m"), dry_run=True)


class Interrupting(SilentReporter):
    """Presses Ctrl-C at the first progress."""

    @contextmanager
    def progress(self, *_: Any) -> Iterator[Any]:
        yield self

    def advance(self, *_: Any) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_merge_leaves_nothing(world: World) -> None:
    config = MergeConfig(experts=world.files(), anchor=world.anchor.path, output=Path("a/b/out"))
    with pytest.raises(KeyboardInterrupt):
        merge(config, Interrupting())
    assert os.listdir() == []


def test_nothing_is_linked_to_an_artefact_that_stays(world: World) -> None:
    merged(world, Path("a"), *world.files("code", "law"))
    merge(MergeConfig(experts=(Path("a"), *world.files("math")), output=Path("b")))
    for file in [*Path("a").iterdir(), *Path("b").iterdir(), *world.files(), *world.anchor.path.iterdir()]:
        assert file.stat().st_nlink == 1


def test_unchanged_files_of_the_replaced_model_move_over(world: World) -> None:
    merged(world, Path("merged"), *world.files("code", "law"))
    inodes = {file.name: file.stat().st_ino for file in Path("merged").iterdir()}
    result = merge(MergeConfig(experts=(Path("merged"), *world.files("math"))))
    kept = {file.name for file in Path("merged").iterdir() if file.stat().st_ino == inodes.get(file.name)}
    assert kept == {
        "model-shared.safetensors",
        "model-expert-public.safetensors",
        "model-expert-code.safetensors",
        "model-expert-law.safetensors",
    }
    sizes = {file.name: file.stat().st_size for file in Path("merged").iterdir()}
    assert result.bytes_written == sum(size for name, size in sizes.items() if name not in kept)
    assert all(file.stat().st_nlink == 1 for file in Path("merged").iterdir())


def test_a_file_with_another_name_elsewhere_is_copied_not_linked(world: World) -> None:
    merged(world, Path("merged"), *world.files("code"))
    os.link("merged/model-expert-code.safetensors", "backup")
    merge(MergeConfig(experts=(Path("merged"), *world.files("math"))))
    assert Path("backup").stat().st_nlink == 1


def test_the_cache_spares_hashing_until_a_file_changes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    from flexctl.bundle import hashing, placing

    def spy(path: Path, *rest: Any) -> Any:
        hashed.append(path.name)
        return hashing.hash_spans(path, *rest)

    merged(world, Path("a"), *world.files("code", "law"))
    monkeypatch.setattr(placing, "hash_spans", spy)
    merge(MergeConfig(experts=(Path("a"),), output=Path("b"), trust_cache=True))
    assert hashed == []
    assert read_directory(Path("a")) == read_directory(Path("b"))
    file = Path("a/model-expert-law.safetensors")
    change_byte(file, file.stat().st_size - 1)
    with pytest.raises(BundleError, match=r"law.safetensors: tensor .* not those of the manifest"):
        merge(MergeConfig(experts=(Path("a"),), output=Path("c"), trust_cache=True))
    assert hashed == ["model-expert-law.safetensors"]
    merge(MergeConfig(experts=(Path("b"),), output=Path("d")))
    assert len(hashed) == 5


def test_nothing_heavy_is_imported() -> None:
    script = textwrap.dedent("""
        import sys
        from flexctl.engine import inspect, list, merge, remove, replace, verify
        import flexctl.bundle.checks
        heavy = {"torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "rich", "typer"}
        sys.exit(repr(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)
    """)
    subprocess.run([sys.executable, "-c", script], check=True)


# Memory.

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

MEASURE = """
import sys
from pathlib import Path
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.verify import VerifyConfig, verify

root = Path(sys.argv[1])
merge(MergeConfig(experts=tuple(sorted(root.glob("*.st"))), anchor=root / "anchor", output=root / "m"))
remove(RemoveConfig(names=("a",), source=root / "m", output=root / "n"))
assert verify(VerifyConfig(path=root / "n", anchor=root / "anchor")).ok
# Not ru_maxrss, which a process inherits from the one that started it.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(int(status["VmHWM"].split()[0]) * 1024)
"""


def peak_of_a_life(root: Path, layers: int, hidden: int, inner: int) -> tuple[int, int]:
    """Return (bytes of the merged model, peak resident bytes of a process that merges, removes and verifies)."""
    anchor = make_anchor(root / "anchor", dtype="BF16", layers=layers, hidden=hidden, inner=inner)
    block = make_tensors(anchor, 0)
    for name in ("a", "b"):
        # One random block, shifted: quick to make, and no two experts alike.
        tensors = {key: shifted(tensor, ord(name)) for key, tensor in block.items()}
        make_expert(root / f"{name}.st", anchor, name, tensors=tensors)
    make_expert(root / "low.st", anchor, "low", rank=4)
    done = subprocess.run([sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True)
    return sum(file.stat().st_size for file in (root / "m").iterdir()), int(done.stdout)


def shifted(tensor: RawTensor, by: int) -> RawTensor:
    item = {"BF16": 2, "F32": 4}[tensor.dtype]
    return RawTensor(tensor.dtype, tensor.shape, np.roll(tensor.data, by * item))


@LINUX
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    size, peak = peak_of_a_life(tmp_path, layers=4, hidden=512, inner=2048)
    assert size > 100e6
    assert peak < 80e6


@LINUX
@pytest.mark.slow
def test_memory_does_not_grow_with_a_large_model(tmp_path: Path) -> None:
    size, peak = peak_of_a_life(tmp_path, layers=8, hidden=1024, inner=8192)
    assert size > 1.5e9
    assert peak < 250e6


# Stock software.


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.dense_type)
@pytest.mark.parametrize("tied", [False, True])
def test_stock_transformers_loads_it_without_a_missing_or_extra_key(tmp_path: Path, family: Any, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    from flexctl.model.configs import resolve_moe_config

    torch.set_num_threads(1)
    anchor = make_anchor(
        tmp_path / "anchor", model_type=family.dense_type, hidden=32, tied=tied, resolve=resolve_moe_config
    )
    experts = tuple(make_expert(tmp_path / f"{name}.st", anchor, name).path for name in ("a", "b"))
    merge(MergeConfig(experts=experts, anchor=anchor.path, output=Path("m")))
    model, report = transformers.AutoModelForCausalLM.from_pretrained("m", output_loading_info=True)
    assert model.config.model_type == family.moe_type
    assert not {name: keys for name, keys in report.items() if keys}
    tokens = torch.arange(20)[None]
    from flexctl.model.building import build_model

    own = build_model(open_merged(Path("m")).weights(), device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        difference = (model(tokens).logits - own(tokens).logits).abs().max()
    assert difference < 1e-4


def test_the_manifest_binds_every_owner_s_manifest(world: World) -> None:
    merged(world, Path("m"), *world.files("law"))
    entry = open_merged(Path("m")).manifest.experts
    anchor_manifest = (world.anchor.path / "flexctl.json").read_bytes()
    assert entry[0].manifest_sha256 == hashlib.sha256(anchor_manifest).hexdigest()
    assert entry[0].digest == world.anchor.digest
    assert entry[1].manifest_sha256 == hashlib.sha256(world.experts["law"].manifest_text.encode()).hexdigest()
    assert entry[1].digest == world.experts["law"].digest
