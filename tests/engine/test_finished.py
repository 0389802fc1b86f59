"""--resume of a run that has finished: done, where it came from what is asked for; refused where it did not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from builders import read_directory
from conftest import write_jsonl

from flexctl.cli.app import main
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.engine.tune_router import TuneRouterConfig, tune_router
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import SilentReporter
from flexctl.training import loop

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SMALL: dict[str, Any] = {"max_steps": 3, "seq_len": 32, "batch_tokens": 256, "threads": 1}


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        pytest.fail("nothing is to be trained")

    monkeypatch.setattr(loop, "_step", refuse)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, anchor: Path, texts: Any, one_thread: int) -> Path:
    assert one_thread == 1
    path = tmp_path_factory.mktemp("trained") / "x.st"
    train_expert(TrainExpertConfig(data=(texts.code,), anchor=anchor, output=path, label="l", **SMALL))
    return path


@pytest.fixture
def expert(tmp_path: Path, trained: Path) -> Path:
    """The same, in a folder that a test may change."""
    for name in ("x.st", "x.run.json"):
        shutil.copy(trained.with_name(name), tmp_path / name)
    return tmp_path / "x.st"


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_finished_expert_is_given_again(expert: Path, anchor: Path, texts: Any, dry_run: bool) -> None:
    before = read_directory(expert.parent)
    listener = Listener()
    config = TrainExpertConfig(
        data=(texts.code,), anchor=anchor, output=expert, label="l", resume=True, dry_run=dry_run, **SMALL
    )
    found = train_expert(config, listener)
    assert listener.notes[-1] == f"{expert}: this run has finished; there is nothing to go on with"
    assert (found.steps, found.tokens_per_s, found.frozen_verified, found.dry_run) == (3, None, True, dry_run)
    assert found.final_loss is not None
    assert found.held_out["own"]["after"] > 0
    # What people see is in this order.
    assert [list(losses) for losses in found.held_out.values()] == [["before", "after"]] * 2
    assert found.bytes_written == expert.stat().st_size
    assert read_directory(expert.parent) == before


@pytest.mark.usefixtures("no_training")
def test_what_a_run_left_that_was_killed_at_its_very_end_goes(expert: Path, anchor: Path, texts: Any) -> None:
    left = expert.parent / ".x.work"
    (left / "checkpoints").mkdir(parents=True)
    (left / "checkpoints/checkpoint-00000002.safetensors").write_text("x")
    (left / "lock").write_text("1 on nowhere")
    asked = ["--anchor", str(anchor), "-o", str(expert), "--label", "l", "--max-steps", "3", "--seq-len", "32"]
    asked += ["--batch-tokens", "256", "--threads", "3", "--device", "cpu", "--checkpoint-steps", "1"]
    assert main(["train-expert", "--data", str(texts.code), *asked, "--resume"]) == 0
    assert not left.exists()


DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"lr": 1e-3}, "lr = None; this one has 0.001"),
    ({"label": None}, "label = 'l'; this one has None"),
    ({"max_steps": 4}, "max_steps = 3; this one has 4"),
    ({"name": "other"}, "name = 'code'; this one has 'other'"),
    ({"rank": 2}, "rank = None; this one has 2"),
    ({"data": (Path("other.jsonl"),), "name": "code"}, "text = "),
    ({"public": Path("other.jsonl")}, "public = None"),
]


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(("changes", "says"), DIFFERENCES, ids=[says for _, says in DIFFERENCES])
def test_an_expert_of_other_settings_or_text_is_refused(
    expert: Path, anchor: Path, texts: Any, changes: dict[str, Any], says: str
) -> None:
    write_jsonl(Path("other.jsonl"), tiny.make_texts("code", 40, seed=1))
    settings = {"data": (texts.code,), "anchor": anchor, "output": expert, "label": "l", "resume": True, **SMALL}
    with pytest.raises(UsageError, match="exists already, of a run that had") as caught:
        train_expert(TrainExpertConfig(**{**settings, **changes}))
    assert says in caught.value.message
    assert "`overwrite`" in str(caught.value.hint)


@pytest.mark.usefixtures("no_training")
def test_an_expert_that_nothing_is_known_of_is_refused(expert: Path, anchor: Path, texts: Any, trained: Path) -> None:
    config = TrainExpertConfig(data=(texts.code,), anchor=anchor, output=expert, label="l", resume=True, **SMALL)
    run = expert.with_suffix(".run.json")
    for content in (None, "{", "[]", '{"digest": "sha256:0"}', run.read_text().replace('"digest": "', '"digest": "0')):
        run.unlink()
        if content is not None:
            run.write_text(content)
        with pytest.raises(UsageError, match=r"x\.run\.json does not say what it was made from"):
            train_expert(config)
        run.touch()
    shutil.copy(trained.with_suffix(".run.json"), run)
    data = bytearray(expert.read_bytes())
    data[-1] ^= 1
    expert.write_bytes(data)
    with pytest.raises(BundleError, match=r"router\.weight"):
        train_expert(config)


def test_a_finished_anchor_is_given_again(
    tmp_path: Path, checkpoint: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"anneal_tokens": 1000, "sample_tokens": 2000, "seq_len": 32, "batch_tokens": 256}
    source = shutil.copytree(checkpoint, tmp_path / "source")

    def make(**changes: Any) -> Any:
        asked = {"data": (texts.public,), "source": str(source), "output": tmp_path / "a", **settings, "resume": True}
        return init_anchor(InitAnchorConfig(**{**asked, **changes}))

    first = make(threads=1)
    before = read_directory(tmp_path / "a")
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("nothing is to be trained"))
    assert make() == first
    assert make(dry_run=True).dry_run
    for changes, says in (
        ({"seed": 1}, "seed = 0; this one has 1"),
        ({"license": "MIT"}, "license = None"),
        ({"data": (texts.code,)}, "text = "),
    ):
        with pytest.raises(UsageError, match="exists already, of a run that had") as caught:
            make(**changes)
        assert says in caught.value.message
    (source / "generation_config.json").write_text("{}")
    with pytest.raises(UsageError, match="of a run that had source = "):
        make()
    assert read_directory(tmp_path / "a") == before


def test_a_finished_tuning_is_given_again(
    tmp_path: Path, merged: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = []
    for name in ("code", "sums"):
        lists.append(tmp_path / name)
        data = (getattr(texts, name),)
        select_proxy(SelectProxyConfig(data=data, anchor=anchor, name=name, output=lists[-1], count=8, threads=1))
    place = shutil.copytree(merged, tmp_path / "merged")

    def tune(**changes: Any) -> Any:
        settings = {"merged": place, "anchor": anchor, "proxy": tuple(lists), "resume": True, **SMALL, **changes}
        return tune_router(TuneRouterConfig(**settings))

    made = [tune(output=tmp_path / "new"), tune(overwrite=True)]
    before = read_directory(place)
    monkeypatch.setattr(loop, "_step", lambda *_: pytest.fail("nothing is to be trained"))
    for first, again in zip(made, [tune(output=tmp_path / "new"), tune(overwrite=True)], strict=True):
        assert (again.digest, again.held_out, again.documents, again.final_loss, again.steps) == (
            first.digest,
            first.held_out,
            first.documents,
            first.final_loss,
            first.steps,
        )
        assert [list(losses) for losses in again.held_out.values()] == [["before", "after"]] * 3
        assert again.tuned_with == first.tuned_with
    with pytest.raises(UsageError, match=r"of a run that had tether = 1\.0; this one has 2\.0"):
        tune(output=tmp_path / "new", tether=2.0)
    assert read_directory(place) == before
