"""Several processes do what one does. One run of two, which torchrun starts, does all that is looked at here."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sharing
import torch
from safetensors.torch import load_file

from flexctl import processes
from flexctl.bundle import open_anchor, open_expert
from flexctl.errors import FlexctlError, UsageError
from flexctl.model import presets
from flexctl.model.tensors import to_torch
from flexctl.processes import ALONE, Echo, Joined, World, launched
from flexctl.runtime import SilentReporter
from flexctl.training import whole

TESTS = Path(__file__).parent
LOSS = 1e-5
"""Of a loss, relative, by how much several processes may differ from one in float32: they sum in another order."""

WEIGHT = 1e-4
"""Of a weight after some steps at a rate of 0.01: AdamW divides by a gradient's size, and with it what was rounded."""


ROUNDED_LOSS = 5e-3
"""Of a loss in bfloat16: several processes gather norms' weights in it, which one has in float32."""


@dataclass(frozen=True, slots=True)
class Found:
    """What two processes found, and what their launcher said when one of them had failed."""

    folder: Path
    first: dict[str, Any]
    second: dict[str, Any]
    code: int
    said: str


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, anchor: Path, texts: Any) -> Found:
    folder = tmp_path_factory.mktemp("shared")
    sharing.kill_a_run(ALONE, folder / "killed by one")
    assert sharing.anneal_until(3, checkpoint, texts.code, folder / "begun by one")[0] == 143
    # What is scored here must not be taken from what one process has scored.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*launcher, TESTS / "sharing.py", folder, checkpoint, anchor, texts.code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (folder / "found-0.pt").exists(), ended.stderr
    first, second = (torch.load(folder / f"found-{rank}.pt") for rank in range(2))
    return Found(folder, first, second, ended.returncode, ended.stderr)


def assert_close(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one["losses"] == pytest.approx(other["losses"], rel=LOSS)
    assert one["held_out"] == pytest.approx(other["held_out"], rel=LOSS)
    assert set(one["tensors"]) == set(other["tensors"])
    for name, tensor in one["tensors"].items():
        assert torch.allclose(tensor, other["tensors"][name], rtol=0, atol=WEIGHT), name


@pytest.mark.parametrize("case", sharing.CASES)
def test_two_processes_train_what_one_trains(found: Found, case: str, one_thread: int) -> None:
    assert one_thread == 1
    alone = sharing.train_pair(ALONE, **sharing.CASES[case])
    assert_close(found.first[case], alone)
    assert found.second[case]["losses"] == found.first[case]["losses"]
    assert found.second[case]["tensors"] == {}
    for each in (found.first, found.second, {case: alone}):
        assert each[case]["moved"] == []


def test_no_process_reads_more_of_a_layer_than_its_part(found: Found) -> None:
    for each in (found.first, found.second):
        read = each["full"]["read"]
        layers = {name for name in read if ".layers." in name or name.startswith("layers.")}
        assert len(layers) == 2 * 11
        assert {read[name] for name in layers} == {0.5}
        assert {read[name] for name in set(read) - layers} == {1.0}


def test_a_run_that_two_began_one_goes_on_with(found: Found, tmp_path: Path) -> None:
    folder = found.folder / "killed by several"
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-0000000{step}.shards" for step in (1, 2)]
    folder = shutil.copytree(folder, tmp_path / "one")
    assert_close(sharing.go_on(ALONE, folder), found.first["low-rank"])


def test_a_run_that_one_began_two_go_on_with(found: Found) -> None:
    assert_close(found.first["gone on"], found.first["low-rank"])


def test_as_many_processes_that_go_on_make_the_same_bits(found: Found) -> None:
    again, straight = found.first["gone on by as many"], found.first["low-rank"]
    assert again["losses"] == straight["losses"]
    assert all(torch.equal(tensor, straight["tensors"][name]) for name, tensor in again["tensors"].items())


def test_a_part_that_is_broken_breaks_its_checkpoint(found: Found, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(found.folder / "killed by several", folder)
    newest = folder / "checkpoint-00000002.shards"
    os.truncate(newest / "__1_0.distcp", 100)
    warnings: list[str] = []

    class Listener(SilentReporter):
        def warn(self, text: str, /) -> None:
            warnings.append(text)

    assert_close(sharing.go_on(ALONE, folder, Listener()), found.first["low-rank"])
    assert warnings == ["checkpoint-00000002.shards is broken and is passed over"]
    assert sorted(path.name for path in folder.iterdir()) == [f"checkpoint-0000000{n}.safetensors" for n in (2, 3)]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_run_ends_when_it_is(found: Found) -> None:
    first, second = found.first["aside"], found.second["aside"]
    names = [f"checkpoint-0000000{step}.shards" for step in (1, 2, 3)]
    assert first["there"] == [[], [], names[:1], names[:2]]
    assert first["last"] == names[1:]
    assert (first["warnings"], second["warnings"]) == ([], [])
    for each in (first, second):
        assert len(each["threads"]) == 3
        assert "MainThread" not in each["threads"]
    assert first["losses"] == found.first["low-rank"]["losses"]


def test_what_is_written_while_training_goes_on_is_of_its_own_step(found: Found, tmp_path: Path) -> None:
    folder = shutil.copytree(found.folder / "aside", tmp_path / "aside")
    shutil.rmtree(folder / "checkpoint-00000003.shards")
    assert_close(sharing.go_on(ALONE, folder), found.first["low-rank"])


def test_a_full_disk_met_while_training_goes_on_keeps_the_old_checkpoint_and_is_said(found: Found) -> None:
    full = found.first["aside, full"]
    names = [f"checkpoint-0000000{step}.shards" for step in (1, 2, 3)]
    assert full["there"] == [[], [], names[:1], names[:1]]
    assert full["last"] == [names[0], names[2]]
    assert full["parts"] == [], "what was begun takes no room"
    (said,) = full["warnings"]
    assert said.endswith(
        "/checkpoint-00000002.shards: cannot be written (No space left on device); that of step 1 stays, "
        "and training goes on"
    )
    assert full["losses"] == found.first["low-rank"]["losses"]


def test_the_command_makes_one_file_and_one_process_speaks(
    found: Found, tmp_path: Path, anchor: Path, texts: Any
) -> None:
    code, said, errors = sharing.train_expert(anchor, texts.code, tmp_path / "alone.st")
    assert (code, errors) == (0, "")
    alone, shared = json.loads(said), json.loads(found.first["train-expert"][1])
    assert found.first["train-expert"][0] == 0
    assert found.second["train-expert"] == (0, "", "")
    for name in ("tokens", "public_tokens", "steps", "bytes_written", "frozen_verified"):
        assert shared[name] == alone[name]
    assert shared["final_loss"] == pytest.approx(alone["final_loss"], rel=LOSS)
    for part in ("own", "public"):
        assert shared["held_out"][part] == pytest.approx(alone["held_out"][part], rel=LOSS)
    one, other = open_expert(tmp_path / "alone.st"), open_expert(found.folder / "shared.st")
    assert one.manifest.training["batch_size"] == other.manifest.training["batch_size"]
    for name in one.spans:
        assert torch.allclose(to_torch(one.tensor(name)), to_torch(other.tensor(name)), rtol=0, atol=WEIGHT), name
    assert_same_log(tmp_path / "alone.track.jsonl", found.folder / "shared.track.jsonl")


def assert_same_log(path: Path, other: Path) -> None:
    for line, theirs in zip(*(each.read_text().splitlines() for each in (path, other)), strict=True):
        mine, others = ({k: v for k, v in json.loads(each).items() if k != "tokens_per_s"} for each in (line, theirs))
        assert mine == pytest.approx(others, rel=1e-4)


def test_two_processes_score_what_one_scores(found: Found, anchor: Path, texts: Any) -> None:
    code, said, _ = sharing.evaluate(anchor, texts.code, found.folder / "shared.st")
    alone, shared = json.loads(said), json.loads(found.first["evaluate"][1])
    assert (code, found.first["evaluate"][0], found.second["evaluate"]) == (0, 0, (0, "", ""))
    assert shared["perplexity"]["x"] == pytest.approx(alone["perplexity"]["x"], rel=1e-6)
    assert shared["routing"]["x"] == pytest.approx(alone["routing"]["x"], rel=1e-6)
    assert (shared["digest"], shared["data"]) == (alone["digest"], alone["data"])


def test_two_processes_calibrate_what_one_calibrates(
    found: Found, tmp_path: Path, checkpoint: Path, texts: Any
) -> None:
    code, said, _ = sharing.init_anchor(checkpoint, texts.code, tmp_path / "alone")
    alone, shared = json.loads(said), json.loads(found.first["init-anchor"][1])
    assert (code, found.first["init-anchor"][0], found.second["init-anchor"]) == (0, 0, (0, "", ""))
    assert shared["constant_std"] == pytest.approx(alone["constant_std"], rel=1e-4)
    one, other = open_anchor(tmp_path / "alone"), open_anchor(found.folder / "shared-anchor")
    for name, raw in one.router_space().items():
        mine, theirs = (to_torch(each) for each in (raw, other.router_space()[name]))
        if name.endswith("factor"):  # its rows may have either sign
            mine, theirs = mine.T @ mine, theirs.T @ theirs
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("case", sharing.WHOLE)
def test_two_processes_train_every_weight_as_one_does(
    found: Found, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "_MICRO_BATCH_TOKENS", 16)
    alone = sharing.train_all(ALONE, tmp_path, **sharing.WHOLE[case])
    first, second = (each[f"all, {case}"] for each in (found.first, found.second))
    is_rounded = case == "bfloat16"
    assert first["losses"] == pytest.approx(alone["losses"], rel=ROUNDED_LOSS if is_rounded else LOSS)
    assert first["norms"] == pytest.approx(alone["norms"], rel=10 * ROUNDED_LOSS if is_rounded else LOSS)
    assert (second["losses"], second["norms"]) == (first["losses"], first["norms"])
    one, other = (load_file(path / "saved" / "model.safetensors") for path in (tmp_path, found.folder / case))
    assert set(one) == set(other) == set(alone["read"])
    for name, tensor in one.items():
        assert is_rounded or torch.allclose(tensor, other[name], rtol=0, atol=WEIGHT), name
    assert set(alone["read"].values()) == {1.0}
    assert set(first["read"].values()) == set(second["read"].values()) == {0.5}


def assert_same_anchor(path: Path, other: Path) -> None:
    one, two = (open_anchor(each).weights() for each in (path, other))
    for mine, theirs in ((one.shared, two.shared), (one.experts["public"], two.experts["public"])):
        assert set(mine) == set(theirs)
        for name, raw in mine.items():
            assert torch.allclose(to_torch(raw), to_torch(theirs[name]), rtol=0, atol=WEIGHT), name


def test_two_processes_anneal_what_one_anneals(found: Found, tmp_path: Path, checkpoint: Path, texts: Any) -> None:
    code, said, _ = sharing.anneal(checkpoint, texts.code, tmp_path / "annealed")
    alone, shared = json.loads(said), json.loads(found.first["anneal"][1])
    assert (code, found.first["anneal"][0], found.second["anneal"]) == (0, 0, (0, "", ""))
    assert (alone["tokens"], alone["sample_tokens"]) == (shared["tokens"], shared["sample_tokens"])
    assert shared["loss"] == pytest.approx(alone["loss"], rel=LOSS)
    assert_same_anchor(tmp_path / "annealed", found.folder / "annealed")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "public-sample.safetensors"):
        assert (tmp_path / "annealed" / name).read_bytes() == (found.folder / "annealed" / name).read_bytes()
    assert_same_log(tmp_path / "annealed.track.jsonl", found.folder / "annealed.track.jsonl")


def test_annealing_that_two_began_and_were_stopped_in_one_goes_on_with(
    found: Found, tmp_path: Path, checkpoint: Path, texts: Any
) -> None:
    codes = [each["stopped"][0] for each in (found.first, found.second)]
    assert codes == [143, 143]
    message = json.loads(found.first["stopped"][2])["error"]["message"]
    assert "stopped by SIGTERM after step 3 of 6" in message
    assert message.endswith("keeps all until step 3"), "it waits for what is written while training goes on"
    assert "MainThread" not in found.first["stopped aside"]
    shutil.copytree(found.folder / ".stopped.work", tmp_path / ".stopped.work")
    code, said, _ = sharing.anneal(checkpoint, texts.code, tmp_path / "stopped", "--resume")
    assert code == 0
    assert json.loads(said)["loss"] == pytest.approx(json.loads(found.first["anneal"][1])["loss"], rel=LOSS)
    assert_same_anchor(tmp_path / "stopped", found.folder / "annealed")


def test_annealing_that_one_began_two_go_on_with(found: Found) -> None:
    code, said, _ = found.first["begun by one"]
    assert (code, found.second["begun by one"]) == (0, (0, "", ""))
    assert json.loads(said)["loss"] == pytest.approx(json.loads(found.first["anneal"][1])["loss"], rel=LOSS)
    assert_same_anchor(found.folder / "begun by one", found.folder / "annealed")


def test_two_processes_make_an_anchor_from_nothing_as_one_does(
    found: Found, tmp_path: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "nano", presets.PRESETS["nano"])
    code, said, _ = sharing.from_scratch(texts.code, tmp_path / "nano")
    alone, shared = json.loads(said), json.loads(found.first["from scratch"][1])
    assert (code, found.first["from scratch"][0], found.second["from scratch"]) == (0, 0, (0, "", ""))
    assert shared["loss"] == pytest.approx(alone["loss"], rel=LOSS)
    assert_same_anchor(tmp_path / "nano", found.folder / "from scratch")


def test_what_is_wrong_for_all_the_first_process_says(found: Found) -> None:
    code, said, errors = found.first["exists"]
    assert (code, said) == (2, "")
    assert "shared.st exists already" in json.loads(errors)["error"]["message"]
    assert found.second["exists"] == (2, "", "")


def test_a_command_of_one_process_refuses_two(found: Found) -> None:
    code, said, errors = found.first["merge"]
    assert (code, said) == (2, "")
    assert errors.splitlines()[0] == "error: merge runs in one process; WORLD_SIZE is 2"
    assert found.second["merge"] == (2, "", "")


def test_a_process_that_fails_alone_says_so_in_one_line_and_ends_all(found: Found) -> None:
    assert found.code != 0
    told = [line for line in found.said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert told[0].startswith("error: process 1: ")
    assert "nowhere" in told[0]


def test_a_launcher_that_ends_all_does_not_keep_a_process_from_telling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the first process was killed: the second is told to end before it has told why."""
    heard: list[int] = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        joined = Joined("cpu")
        joined._store, joined._rank = torch.distributed.HashStore(), 1
        error = RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")
        with pytest.raises(FlexctlError, match="another process of the run went away"):
            joined.__exit__(RuntimeError, error, None)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM], "afterwards it is heard as before"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
    ],
)
def test_a_launcher_that_says_nonsense_is_refused(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launched()


def test_processes_that_nobody_brings_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR is not set"), Joined("cpu"):
        pass


def test_a_device_of_several_processes_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="cuda:1 is one GPU"), Joined("cuda:1"):
        pass


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_processes_beyond_the_cards_are_told_so(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    said = f"{device}: 2 processes were started on this machine, which has 1 GPU$"
    with pytest.raises(UsageError, match=said), Joined(device):
        pass


@pytest.mark.parametrize(("rank", "device", "address"), [(1, "cuda:1", "here"), (1, "cpu", None), (2, "cuda", "here")])
def test_what_another_process_tells_is_not_said_again(
    rank: int, device: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "3", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    if address is not None:
        monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    waited: list[float] = []
    monkeypatch.setattr(processes.time, "sleep", waited.append)
    with pytest.raises(Echo) as caught, Joined(device):
        pass
    assert (caught.value.exit_code, len(waited)) == (2, 1)


@pytest.mark.parametrize("command", ["train-expert --dp-epsilon 8 --dp-documents 40", "evaluate --tasks x.jsonl"])
def test_what_one_process_does_is_refused_to_two(command: str, anchor: Path, texts: Any, monkeypatch: Any) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Joined, "__enter__", lambda _: ALONE)
    code, said, errors = sharing.run(*command.split(), "--data", texts.code, "--anchor", anchor)
    assert (code, said) == (2, "")
    assert "in one process; WORLD_SIZE is 2" in errors


@pytest.mark.parametrize(("count", "size"), [(8, 2), (5, 2), (1, 3), (7, 3), (2, 4)])
def test_parts_have_like_sizes_and_every_row_once(count: int, size: int) -> None:
    rows = torch.arange(10, 10 + count)
    parts = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        parts.append(world.part(count))
    assert len({len(part.numbers) for part in parts}) == 1
    assert torch.cat([part.of(rows)[: part.real] for part in parts]).tolist() == rows.tolist()
    for part in parts:
        marked = part.marked(torch.ones(count, dtype=torch.bool))
        weights = part.weights(3)
        assert int(marked.sum()) == part.real
        assert weights is None or weights.sum() == 3 * part.real


def test_one_process_imports_nothing_distributed(
    anchor: Path, texts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself: Transformers imports FSDP at its own top."""
    real, wanted = builtins.__import__, []

    def watched(name: str, names: Any = None, local: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        full = {name, *(f"{name}.{part}" for part in fromlist or ())}
        if (names or {}).get("__name__", "").startswith("flexctl"):
            wanted.extend(each for each in full if each.startswith("torch.distributed"))
        return real(name, names, local, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", watched)
    assert sharing.train_expert(anchor, texts.code, tmp_path / "x.st")[0] == 0
    assert wanted == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="MASTER_ADDR"), Joined("cpu"):
        pass
    assert "torch.distributed" in wanted
