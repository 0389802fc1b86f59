"""replace --data: each domain before and after, as evaluate scores them, one model in memory at a time."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
from builders import make_expert, read_directory
from conftest import Texts

from flexctl.bundle import open_anchor, open_expert
from flexctl.cli.app import main
from flexctl.engine.evaluate import EvaluateConfig, evaluate
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.errors import FlexctlError

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")


@pytest.fixture
def model(merged: Path, tmp_path: Path) -> Path:
    """A copy of the merged model that all tests share."""
    return Path(shutil.copytree(merged, tmp_path / "merged"))


@pytest.fixture
def weakened(anchor: Path, experts: dict[str, Path], tmp_path: Path) -> Path:
    """A new version of the code expert that knows no more than the public one, with the old one's router rows."""
    opened, old = open_anchor(anchor), open_expert(experts["code"])
    tensors = {**opened.weights().experts["public"], "router.weight": old.router()}
    return make_expert(tmp_path / "code-2.st", opened, "code", tensors=tensors).path


def scored(bundle: Path, data: tuple[str, ...]) -> dict[str, float]:
    found = evaluate(EvaluateConfig(bundle=bundle, data=data, seq_len=32))
    return {name: score.bits_per_byte for name, score in found.perplexity.items()}


@pytest.mark.parametrize("output", [None, Path("elsewhere")])
def test_they_are_those_of_evaluate(model: Path, weakened: Path, texts: Texts, output: Path | None) -> None:
    data = (f"code={texts.code_test}", f"public={texts.public_test}")
    before = scored(model, data)
    result = replace(ReplaceConfig(name="code", expert=weakened, source=model, output=output, data=data, seq_len=32))
    after = scored(result.path, data)
    assert result.bits_per_byte == {name: {"before": before[name], "after": after[name]} for name in ("code", "public")}
    assert after["code"] > before["code"] + 0.001


def test_without_data_nothing_is_scored(model: Path, weakened: Path) -> None:
    assert replace(ReplaceConfig(name="code", expert=weakened, source=model)).bits_per_byte == {}


def test_one_model_is_in_memory_at_a_time(
    model: Path, weakened: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexctl.model import building

    built: list[weakref.ref[Any]] = []
    build_model = building.build_model

    def build(*arguments: Any, **settings: Any) -> Any:
        assert all(one() is None for one in built), "the one before is still there"
        made = build_model(*arguments, **settings)
        built.append(weakref.ref(made))
        return made

    monkeypatch.setattr(building, "build_model", build)
    gc.disable()
    try:
        replace(ReplaceConfig(name="code", expert=weakened, source=model, data=(f"code={texts.code_test}",)))
    finally:
        gc.enable()
    assert len(built) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data": ("=nothing",)}, "data: '=nothing' is not NAME=PATH"),
        ({"data": ("a=nowhere",)}, "nowhere"),
        ({"data": ("a=empty.txt",)}, "no document with text in empty.txt"),
        ({"data": ("a=some.txt",), "seq_len": 0}, "seq_len: 0 is not above 0"),
        ({"data": ("a=some.txt",), "dtype": "int8"}, "dtype: 'int8' is not known"),
    ],
)
def test_what_cannot_be_scored_changes_nothing(
    model: Path, weakened: Path, settings: dict[str, Any], said: str
) -> None:
    Path("empty.txt").touch()
    Path("some.txt").write_text("some")
    before = read_directory(model)
    with pytest.raises(FlexctlError) as caught:
        replace(ReplaceConfig(name="code", expert=weakened, source=model, **settings))
    assert said in caught.value.message
    assert read_directory(model) == before


def test_a_dry_run_scores_nothing(model: Path, weakened: Path, texts: Texts) -> None:
    data = (f"code={texts.code_test}",)
    assert replace(ReplaceConfig(name="code", expert=weakened, source=model, data=data, dry_run=True)).digest is None


def test_how_it_reads(model: Path, weakened: Path, texts: Texts, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", f"code={texts.code_test}", "--seq-len", "32")
    assert main(["replace", "code", str(weakened), "--from", str(model), *data]) == 0
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert table[0].split() == ["bits", "per", "byte", "before", "after", "change"]
    name, before, after, change = table[1].split()
    assert name == "code"
    assert float(after) - float(before) == pytest.approx(float(change), abs=0.002)
