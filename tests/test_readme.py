"""The README's commands, run as they stand there, with budgets cut through the environment."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
from builders import fine_tune
from conftest import Texts

from flexctl.cli.app import main
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from tools import compared
from tools.picture import PICTURE, life
from tools.readme import README as README_FILE
from tools.readme import current, filled

README = README_FILE.read_text(encoding="utf-8")
SVG = "{http://www.w3.org/2000/svg}"
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
    names = [Path(path).stem for path in rest[1].split()[1:]]
    trained = rest[0].split("--data ")[1]
    others = [name for name in names if name != trained]
    assert len(others) == 2
    assert rest[2:] == [f"remove {trained}", f"verify merged --absent {trained}"]
    if not Path(trained).exists():
        shutil.copytree(texts.code, trained)
    monkeypatch.setenv("FLEXCTL_MAX_TOKENS", "2000")
    run(init)
    for name in others:
        make_expert(name, texts.sums, f"experts/{name}.st", seed=ord(name[0]))
    for line in rest:
        run(line)
    assert f"absent {trained}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.glob("merged/model-expert-*")) == [
        f"model-expert-{name}.safetensors" for name in sorted([*others, "public"])
    ]


def test_its_blocks_are_what_the_committed_figures_give() -> None:
    assert current(README) == README, "run: make docs"


def test_a_record_fills_the_blocks_and_nothing_else() -> None:
    recorded = {
        "commit": "abc",
        "date": "2026-01-01",
        "text": "two songs",
        "software": {"flexctl": "9"},
        "commands": [
            {"command": "flexctl train-expert --data one", "output": "not shown\n"},
            {"command": "flexctl train-expert --data two", "output": "x" * 200 + "\n"},
            {"command": "flexctl remove two", "output": "gone \\1\n"},
        ],
        "bits_per_byte": {"anchor": {"public": 2.0, "one": 3.0}, "own expert": {"one": 2.5}},
    }
    text = "a\n" + "".join(
        f"<!-- recorded: {name} -->\n\n<!-- end -->\nb\n" for name in ("transcript", "source", "table")
    )
    once = filled(text, "recorded", recorded)
    assert filled(once, "recorded", recorded) == once
    assert "not shown" not in once
    assert f"$ flexctl train-expert --data two\n{'x' * 200}\n\n$ flexctl remove two\ngone \\1\n```" in once
    assert (
        "| text | anchor | own expert |\n|---|---|---|\n| public | **2.000** |  |\n| one | 3.000 | **2.500** |" in once
    )
    assert "2026-01-01 at commit abc: flexctl 9. Text: two songs." in once
    assert re.sub(r"(recorded: \w+ -->\n).*?(\n<!-- end)", r"\1\2", once, flags=re.DOTALL) == text


def test_the_picture_is_what_the_script_draws() -> None:
    assert PICTURE.read_text(encoding="utf-8") == life(), "run: make docs"
    assert ElementTree.fromstring(life()).tag.endswith("svg")


def test_the_comparison_is_that_of_the_results_and_its_picture_is_drawn_from_it() -> None:
    figures = json.loads(compared.COMPARED.read_text(encoding="utf-8"))
    drawn = compared.chart(figures)
    assert compared.CHART.read_text(encoding="utf-8") == drawn, "run: make docs"
    root = ElementTree.fromstring(drawn)
    circles = [float(dot.attrib["cx"]) for dot in root.iter(f"{SVG}circle")]
    assert circles == sorted(circles)
    _, _, width, _ = map(float, root.attrib["viewBox"].split())
    assert all(0 < x < width for x in circles)
    said = [text.text for text in root.iter(f"{SVG}text")]
    results = (README_FILE.parent / "docs" / "results.md").read_text(encoding="utf-8")
    section = results.partition("## 8. ")[2].partition("## 9. ")[0]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in section.splitlines()]
    measured = {cells[0]: cells for cells in reversed(rows) if len(cells) == 13}
    assert len(circles) == len(figures["rows"])
    for row in figures["rows"]:
        cells = measured[row["row"]]
        assert row["name"] in said
        assert (row["bits_per_byte"], row["worse"], row["kept"]) == (
            float(cells[9]),
            estimate(cells[11]),
            estimate(cells[12]),
        )


def estimate(cell: str) -> dict[str, float] | None:
    """Return a figure and its interval, as ``+0.051 (0.044 to 0.056)`` has them."""
    numbers = [float(number) for number in re.findall(r"[+-]?[\d.]+", cell)]
    return dict(zip(("value", "low", "high"), numbers, strict=False)) or None


def test_life_of_an_expert(folder: Path, texts: Texts, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoint, "OLMo-2-1B")
    tiny.make_mixture(Path("their-mixtral"), "mixtral")
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
