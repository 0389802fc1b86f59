"""The README's commands, run as they stand there, with budgets cut through the environment."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from builders import fine_tune
from conftest import Texts

from flexctl.cli.app import main
from flexctl.engine.train_expert import TrainExpertConfig, train_expert

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
FIRST_SCREEN = re.compile(r"```console\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """Return the flexctl command lines of a text's console blocks."""
    return [
        line.removeprefix("$ flexctl ")
        for block in FIRST_SCREEN.findall(text)
        for line in block.splitlines()
        if line.startswith("$ flexctl ")
    ]


HEAD, _, LIFE = README.partition("## The life of an expert")


@pytest.fixture
def folder(in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, texts: Texts) -> Path:
    """An empty workspace's folder with text under the names that the README uses."""
    for name, source in (("public", texts.public), ("news", texts.code), ("corpus", texts.code)):
        shutil.copytree(source, name)
    Path("tests").mkdir()
    for name in ("law", "public"):
        shutil.copy(texts.sums, f"tests/{name}.jsonl")
    for name, value in (("THREADS", "1"), ("MAX_STEPS", "2"), ("SAMPLE_TOKENS", "8000"), ("MAX_NEW_TOKENS", "4")):
        monkeypatch.setenv(f"FLEXCTL_{name}", value)
    return in_empty_folder


def make_expert(name: str, data: Path, output: str, seed: int = 0) -> None:
    config = TrainExpertConfig(data=(data,), name=name, output=Path(output), max_steps=1, threads=1, seed=seed)
    train_expert(config)


def run(line: str) -> None:
    assert main([*shlex.split(line), "--quiet"]) == 0, line


def test_first_screen(
    folder: Path, texts: Texts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init, *rest = commands(HEAD)
    assert [line.split()[0] for line in (init, *rest)] == ["init-anchor", "train-expert", "merge", "remove", "verify"]
    monkeypatch.setenv("FLEXCTL_MAX_TOKENS", "2000")
    run(init)
    for name in ("code", "math"):
        make_expert(name, texts.sums, f"experts/{name}.st", seed=ord(name[0]))
    for line in rest:
        run(line)
    assert "absent news" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("merged/model-expert-*")) == [
        f"model-expert-{name}.safetensors" for name in ("code", "math", "public")
    ]


def test_life_of_an_expert(folder: Path, texts: Texts, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoint, "OLMo-2-1B")
    shutil.copytree(texts.code_test, "medicine")
    fine_tune(checkpoint, Path("OLMo-2-1B-medicine"))
    lines = commands(LIFE)
    assert len(lines) >= 10
    for line in lines:
        if line.startswith("embed-router"):
            make_expert("news", texts.sums, "experts/news.st")
        if line.startswith("replace"):
            make_expert("law", texts.sums, "law-2027.st", seed=7)
        run(line)
    assert "absent law" in capsys.readouterr().out
    assert (folder / "merged" / "model-expert-news.safetensors").exists()


def test_python_example(folder: Path, texts: Texts, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"init-anchor {checkpoint} --data public")
    make_expert("law", texts.code, "experts/law.st")
    make_expert("news", texts.sums, "experts/news.st")
    capsys.readouterr()
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip().endswith(" 3")
    assert (folder / "merged" / "config.json").exists()


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
