"""--decontaminate, --near-duplicates, --token-cache in the commands: what is left out, told, resumed, refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import write_jsonl

from flexctl.bundle import open_anchor, open_expert
from flexctl.cli.app import main
from flexctl.engine.audit import AuditConfig, audit
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.train_expert import TrainExpertConfig, TrainExpertResult, train_expert
from flexctl.errors import UsageError
from flexctl.model.building import load_tokenizer
from flexctl.runtime import SilentReporter
from flexctl.text import documents as reading
from flexctl.text import near_duplicates
from flexctl.text.sample import PublicSample

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SMALL = {"max_steps": 2, "seq_len": 32, "batch_tokens": 256, "threads": 1}
LEAKED = [
    "Which of these is the name that was given to the third ship of the line in that year?",
    "How many letters went from the capital to the harbour before anybody there had answered one of them?",
]


class Listener(SilentReporter):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def files(in_empty_folder: Path) -> tuple[Path, Path]:
    """Text in which two documents hold questions of a test, and the test."""
    texts = tiny.make_texts("code", 30)
    leaking = [*texts[:10], f"{texts[3]} {LEAKED[0].upper()}", *texts[10:], f"Q: {LEAKED[1]} {texts[5]}"]
    write_jsonl(in_empty_folder / "own.jsonl", leaking)
    write_jsonl(in_empty_folder / "clean.jsonl", texts)
    write_jsonl(in_empty_folder / "test.jsonl", LEAKED)
    return in_empty_folder / "own.jsonl", in_empty_folder / "test.jsonl"


def train(anchor: Path, data: Path, name: str, reporter: Any = None, **settings: Any) -> TrainExpertResult:
    config = TrainExpertConfig(data=(data,), anchor=anchor, name="x", output=Path(f"{name}.st"), **(SMALL | settings))
    return train_expert(config, reporter or SilentReporter())


def test_the_expert_is_the_one_of_the_text_without_them(anchor: Path, files: tuple[Path, Path]) -> None:
    data, test = files
    listener = Listener()
    result = train(anchor, data, "x", listener, decontaminate=(test,))
    clean = train(anchor, Path("clean.jsonl"), "clean")
    assert Path("x.st").read_bytes() == Path("clean.st").read_bytes()
    assert (result.contaminated, result.duplicates, result.near_duplicates) == (2, 0, None)
    assert clean.contaminated is None
    (told,) = (note for note in listener.notes if "decontaminate" in note)
    assert f"{data}, document 11; {data}, document 32" in told
    assert told.startswith("2 of 32 documents share 13 words in a row")
    run = json.loads(Path("x.run.json").read_text())
    assert (run["contaminated"], run["duplicates"], run["near_duplicates"]) == (2, 0, None)
    assert open_expert(Path("x.st")).manifest.data.documents == 28  # and no word of what was left out
    assert "contaminated" not in open_expert(Path("x.st")).manifest_text


def test_it_is_part_of_what_resume_goes_by(anchor: Path, files: tuple[Path, Path]) -> None:
    data, test = files
    first = train(anchor, data, "x", decontaminate=(test,))
    Path("moved").mkdir()
    moved = test.rename(Path("moved/test.jsonl"))
    again = train(anchor, data, "x", decontaminate=(moved,), resume=True)
    assert (again.digest, again.contaminated) == (first.digest, 2)
    with pytest.raises(UsageError, match=r"of a run that had decontaminate = .*; this one has None"):
        train(anchor, data, "x", resume=True)
    write_jsonl(moved, LEAKED[:1])
    with pytest.raises(UsageError, match=r"of a run that had decontaminate = "):
        train(anchor, data, "x", decontaminate=(moved,), resume=True)


def test_a_run_that_was_cut_off_does_not_go_on_with_other_test_text(
    anchor: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexctl.training import loop

    data, test = files
    expected = train(anchor, data, "expected", decontaminate=(test,), max_steps=4).digest
    step = loop._step

    def stopping(*arguments: Any) -> Any:
        if arguments[3] == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    settings: dict[str, Any] = {"max_steps": 4, "checkpoint_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(anchor, data, "x", decontaminate=(test,), **settings)
    with pytest.raises(UsageError, match=r"that run had decontaminate = '[0-9a-f]+', this one has None"):
        train(anchor, data, "x", resume=True, **settings)
    assert train(anchor, data, "x", decontaminate=(test,), resume=True, **settings).digest == expected


def test_public_text_is_cleaned_too(anchor: Path, files: tuple[Path, Path]) -> None:
    data, test = files
    public = tiny.make_texts("public", 30)
    write_jsonl(Path("public.jsonl"), [*public, LEAKED[0]])
    listener = Listener()
    train(anchor, data, "x", listener, decontaminate=(test,), public=Path("public.jsonl"))
    assert re.search(r"^1 of \d+ public documents share words with `decontaminate`$", "\n".join(listener.notes), re.M)
    with pytest.raises(UsageError, match=r"^decontaminate: shares words with every document of public text"):
        train(anchor, data, "y", decontaminate=(test,), public=test)


@pytest.mark.parametrize("dry_run", [False, True])
def test_bad_input_is_refused_before_any_work(
    anchor: Path, files: tuple[Path, Path], checkpoint: Path, dry_run: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = files
    write_jsonl(Path("short.jsonl"), ["no thirteen words"])
    Path("broken.jsonl").write_text("{\n")
    before = sorted(Path().iterdir())
    settings: dict[str, Any] = {"data": (data,), "output": Path("new"), "dry_run": dry_run}

    def both(expected: str, **more: Any) -> None:
        with pytest.raises(UsageError, match=expected):
            train_expert(TrainExpertConfig(anchor=anchor, **settings, **more))
        with pytest.raises(UsageError, match=expected):
            init_anchor(InitAnchorConfig(source=str(checkpoint), **settings, **more))

    both(r"^decontaminate: nowhere does not exist", decontaminate=(Path("nowhere"),))
    both(r"^decontaminate: no document in short\.jsonl has 13 words", decontaminate=(Path("short.jsonl"),))
    both(r"^broken\.jsonl, line 1: not JSON", decontaminate=(Path("broken.jsonl"),))
    monkeypatch.setattr(near_duplicates, "find_spec", lambda _: None)
    both(r"^near_duplicates: counting them needs datasketch, which is not installed", near_duplicates=True)
    for folder, why in ((data, ": is no folder"), (Path("corpus/tokens"), " would be among the text of corpus")):
        config = TrainExpertConfig(anchor=anchor, **{**settings, "data": (data, Path("corpus"))}, token_cache=folder)
        Path("corpus").mkdir(exist_ok=True)
        write_jsonl(Path("corpus/a.jsonl"), ["a"])
        with pytest.raises(UsageError, match=f"^token_cache: {folder}{why}"):
            train_expert(config)
    assert sorted(path for path in Path().iterdir() if path.name != "corpus") == before


def test_init_anchor_leaves_them_out_of_training_and_sample(
    files: tuple[Path, Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And reads the text twice, whether it takes a checkpoint, trains it further, or trains everything."""
    data, test = files
    whole: list[str] = []
    read = reading._read_file

    def counting(file: Any, *arguments: Any, **settings: Any) -> Any:
        yield from read(file, *arguments, **settings)
        whole.append(file.name)

    monkeypatch.setattr(reading, "_read_file", counting)
    for name, settings in (
        ("taken", {"source": str(checkpoint)}),
        ("annealed", {"source": str(checkpoint), "anneal_tokens": 256}),
        ("new", {"preset": "nano", "max_tokens": 256}),
    ):
        made: dict[str, Any] = {"seq_len": 32, "batch_tokens": 128, "threads": 1, "sample_tokens": 3000, **settings}
        for output, source, without in ((name, data, (test,)), (f"{name}-clean", Path("clean.jsonl"), ())):
            whole.clear()
            result = init_anchor(
                InitAnchorConfig(data=(source,), output=Path(output), name="a", decontaminate=without, **made)
            )
            assert sorted(whole) == sorted([source.name] * 2 + [path.name for path in without])
            assert (result.contaminated, result.duplicates) == (2 if without else None, 0)
        assert open_anchor(Path(name)).digest == open_anchor(Path(f"{name}-clean")).digest
    asked = ["init-anchor", str(checkpoint), "--data", str(data), "-o", "taken", "--resume", "--name", "a"]
    asked += ["--sample-tokens", "3000", "--seq-len", "32", "--batch-tokens", "128", "--json"]
    assert main(asked) == 2
    assert "had decontaminate = " in capsys.readouterr().err
    assert main([*asked, "--decontaminate", str(test)]) == 0
    assert json.loads(capsys.readouterr().out)["contaminated"] == 2
    sample = PublicSample.from_tensors(open_anchor(Path("taken")).public_sample())
    assert not [text for text in sample.texts(load_tokenizer(checkpoint)) if "harbour before anybody" in text]


def test_train_expert_reads_text_twice_and_its_test_text_once(
    anchor: Path, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, test = files
    whole: list[str] = []
    read = reading._read_file

    def counting(file: Any, *arguments: Any, **settings: Any) -> Any:
        yield from read(file, *arguments, **settings)
        whole.append(file.name)

    monkeypatch.setattr(reading, "_read_file", counting)
    cached = {"token_cache": Path("tokens"), "decontaminate": (test,), "near_duplicates": True}
    first = train(anchor, data, "x", **cached)
    assert sorted(whole) == ["own.jsonl", "own.jsonl", "test.jsonl"]
    assert first.near_duplicates == 0
    whole.clear()
    second = train(anchor, data, "y", **cached, lr=1e-3)
    assert sorted(whole) == ["own.jsonl", "own.jsonl", "test.jsonl"]
    assert len(list(Path("tokens").iterdir())) == 2
    assert second.digest != first.digest
    Path("x.st").unlink()
    assert (
        train(anchor, data, "x", **cached).digest
        == first.digest
        == train(anchor, data, "z", decontaminate=(test,)).digest
    )


def test_an_audit_takes_out_what_training_took_out(anchor: Path, files: tuple[Path, Path]) -> None:
    data, test = files
    train(anchor, data, "x", decontaminate=(test,))
    settings: dict[str, Any] = {"draws": 1, "prefix_tokens": 4, "max_new_tokens": 4, "threads": 1}
    config = AuditConfig(bundle=Path("x.st"), anchor=anchor, data=(data,), decontaminate=(test,), **settings)
    assert (audit(config).members, audit(config).others) == (28, 2)
    assert audit(dataclasses.replace(config, decontaminate=())).members == 30
    with pytest.raises(UsageError, match=r"^decontaminate: nowhere does not exist"):
        audit(dataclasses.replace(config, decontaminate=(Path("nowhere"),), dry_run=True))
