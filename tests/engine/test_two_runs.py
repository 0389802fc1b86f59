"""Two runs with one name, in two processes: the second is refused, the first is what it would have been alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apart
import pytest
import tiny
from apart import Apart
from conftest import write_jsonl

from flexctl.cli.app import main
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.engine.tune_router import TuneRouterConfig, tune_router
from flexctl.errors import FlexctlError, UsageError
from flexctl.training import loop

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SMALL = {"max_steps": 4, "seq_len": 32, "batch_tokens": 256, "threads": 1}

# A run that says so in the middle of its training, and waits there to be let go.
WAITING = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import flexctl
from flexctl.training import loop
step = loop._step
def waiting(*arguments):
    if arguments[3] == 2:
        talk.send("training")
        talk.recv()
    return step(*arguments)
loop._step = waiting
CALL
"""


@contextmanager
def in_training(call: str, *arguments: object, said: Path) -> Iterator[Apart]:
    with apart.running(WAITING.replace("CALL", call), *arguments, said=said) as run:
        assert run.talk.poll(60), run.err
        assert run.talk.recv() == "training"
        yield run


def let_go(run: Apart) -> None:
    run.talk.send("go on")
    assert run.end() == 0, run.err


@pytest.fixture
def said(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the other process prints; no run sees it."""
    return tmp_path_factory.mktemp("said") / "said"


TRAIN = f"""
data, anchor, output = map(Path, sys.argv[1:])
flexctl.train_expert(flexctl.TrainExpertConfig(data=(data,), anchor=anchor, name="rd", output=output, **{SMALL!r}))
"""


def test_a_second_training_is_refused_and_the_first_keeps_its_text(
    tmp_path: Path, said: Path, anchor: Path, texts: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = train_expert(
        TrainExpertConfig(data=(texts.code,), anchor=anchor, name="rd", output=tmp_path / "alone/rd.st", **SMALL)
    )
    longer = tmp_path / "longer.jsonl"
    write_jsonl(longer, tiny.make_texts("sums", 200, seed=3))
    target = tmp_path / "experts" / "rd.st"
    with in_training(TRAIN, texts.code, anchor, target, said=said) as run:
        for more in ([], ["--dry-run"], ["--resume"], ["--seed", "1"], ["--name", "other"]):
            asked = ["train-expert", "--data", str(longer), "--anchor", str(anchor), "--name", "rd", *more]
            assert main([*asked, "-o", str(target)]) == 2
            out, err = capsys.readouterr()
            assert out == ""
            assert f".rd.work: is in use by process {run.process.pid} on " in err
            assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]
        with pytest.raises(UsageError, match=f"process {run.process.pid}"):
            train_expert(TrainExpertConfig(data=(longer,), anchor=anchor, name="rd", output=target, **SMALL))
        let_go(run)
    assert target.read_bytes() == alone.path.read_bytes()
    assert sorted(path.name for path in target.parent.iterdir()) == ["rd.run.json", "rd.st"]


INIT = """
data, output = map(Path, sys.argv[1:])
flexctl.init_anchor(flexctl.InitAnchorConfig(data=(data,), output=output, source=SOURCE, SETTINGS))
"""


def test_a_second_anchor_is_refused(tmp_path: Path, said: Path, checkpoint: Path, texts: Any) -> None:
    settings: dict[str, Any] = {
        "anneal_tokens": 2000,
        "sample_tokens": 2000,
        "seq_len": 32,
        "batch_tokens": 256,
        "threads": 1,
    }
    call = INIT.replace("SOURCE", repr(str(checkpoint))).replace("SETTINGS", f"**{settings!r}")
    with in_training(call, texts.public, tmp_path / "a", said=said) as run:
        for dry_run in (False, True):
            config = InitAnchorConfig(
                data=(texts.code,), output=tmp_path / "a", source=str(checkpoint), dry_run=dry_run, **settings
            )
            with pytest.raises(UsageError, match=rf"\.a\.work: is in use by process {run.process.pid} "):
                init_anchor(config)
        let_go(run)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_second_tuning_is_refused(tmp_path: Path, said: Path, merged: Path, anchor: Path, texts: Any) -> None:
    from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy

    for name in ("code", "sums"):
        select_proxy(
            SelectProxyConfig(
                data=(getattr(texts, name),), anchor=anchor, name=name, output=tmp_path / name, count=8, threads=1
            )
        )
    call = f"""
merged, anchor, one, other, output = map(Path, sys.argv[1:])
flexctl.tune_router(flexctl.TuneRouterConfig(
    merged=merged, anchor=anchor, proxy=(one, other), output=output, **{SMALL!r}
))
"""
    proxies = (tmp_path / "code", tmp_path / "sums")
    with in_training(call, merged, anchor, *proxies, tmp_path / "tuned", said=said) as run:
        config = TuneRouterConfig(merged=merged, anchor=anchor, proxy=proxies, output=tmp_path / "tuned", **SMALL)
        with pytest.raises(UsageError, match=rf"\.tuned\.tuning: is in use by process {run.process.pid} "):
            tune_router(config)


@pytest.mark.parametrize("checkpoint_steps", [1, 200])
def test_a_token_file_that_is_written_over_ends_the_run_and_writes_nothing(
    tmp_path: Path, anchor: Path, texts: Any, monkeypatch: pytest.MonkeyPatch, checkpoint_steps: int
) -> None:
    """Whoever writes into the mapped file against all rules is found out, and no checkpoint holds what came of it."""
    step = loop._step

    def meddling(*arguments: Any) -> float:
        if arguments[3] == 1:
            file = tmp_path / ".x.work/own.tokens"
            file.write_bytes(bytes(file.stat().st_size))
        return step(*arguments)

    monkeypatch.setattr(loop, "_step", meddling)
    config = TrainExpertConfig(
        data=(texts.code,), anchor=anchor, output=tmp_path / "x.st", checkpoint_steps=checkpoint_steps, **SMALL
    )
    with pytest.raises(FlexctlError, match=r"own\.tokens: was changed while a run used it"):
        train_expert(config)
    assert not (tmp_path / "x.st").exists()
    kept = [path.name for path in tmp_path.glob(".x.work/checkpoints/*")]
    assert kept == (["checkpoint-00000001.safetensors"] if checkpoint_steps == 1 else [])
