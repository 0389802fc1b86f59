"""The examples run, each in a process of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import apart
import pytest
import tiny
from conftest import Texts, write_jsonl

EXAMPLES = Path(__file__).parent.parent / "examples"


@dataclass(frozen=True)
class Done:
    """What came of a script."""

    returncode: int | None
    stdout: str
    stderr: str


def run(script: str, *arguments: str) -> Done:
    program = f"import runpy; runpy.run_path({str(EXAMPLES / script)!r}, run_name='__main__')"
    with TemporaryDirectory() as folder, apart.running(program, *arguments, said=Path(folder) / "said") as it:
        return Done(it.end(), it.out, it.err)


def test_two_owners(in_empty_folder: Path, texts: Texts) -> None:
    done = run("two_owners.py", str(texts.public), str(texts.code), str(texts.code_test), "--quick")
    assert done.returncode == 0, done.stderr
    assert "same bytes as a merge that never had it: True" in done.stdout
    assert (in_empty_folder / "two-owners" / "without" / "config.json").exists()


def test_smollm2_on_a_tiny_checkpoint_of_its_kind(in_empty_folder: Path, checkpoint: Path) -> None:
    source, data, output = (in_empty_folder / name for name in ("source", "data", "run"))
    shutil.copytree(checkpoint, source)
    (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    for domain in ("public", "code", "sums"):
        (data / domain).mkdir(parents=True)
        write_jsonl(data / domain / "train.jsonl", tiny.make_texts(domain, 40))
        write_jsonl(data / domain / "test.jsonl", tiny.make_texts(domain, 4, seed=1))
    sizes = ["--tokens", "600", "--sample-tokens", "2000", "--test-bytes", "1000", "--threads", "1"]
    arguments = ["--checkpoint", str(source), "--data", str(data), "--experts", "code", "sums", "-o", str(output)]

    done = run("smollm2/run.py", *arguments, *sizes)
    assert done.returncode == 0, done.stderr
    table = (output / "RESULTS.md").read_text().splitlines()
    assert table[0] == "| bits per byte | anchor | own pair | merged | without code | without sums | retained gain |"
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table[2:5]}
    assert set(rows) == {"public", "code", "sums"}
    assert all(float(cells[2]) > 0 for cells in rows.values())
    assert float(rows["code"][1]) < float(rows["code"][0])
    assert sum(line.startswith("- without code:") for line in table) == 3

    before = (output / "experts" / "code.st").stat().st_mtime_ns
    assert run("smollm2/run.py", *arguments, *sizes).stdout == done.stdout
    assert (output / "experts" / "code.st").stat().st_mtime_ns == before


@pytest.mark.slow
def test_what_privacy_costs_on_a_tiny_anchor(in_empty_folder: Path, anchor: Path) -> None:
    data, output = in_empty_folder / "data", in_empty_folder / "run"
    for domain, kind in (("public", "public"), ("math", "sums"), ("academic", "code")):
        (data / domain).mkdir(parents=True)
        write_jsonl(data / domain / "train.jsonl", tiny.make_texts(kind, 60))
        write_jsonl(data / domain / "test.jsonl", tiny.make_texts(kind, 4, seed=1))
    asked = ["--anchor", str(anchor), "--data", str(data), "-o", str(output), "--small", "--threads", "1"]
    done = run("privacy/run.py", *asked)
    assert done.returncode == 0, done.stderr
    table = (output / "table.md").read_text().splitlines()
    assert table[2] == "| documents | form | epsilon | batch | seed | noise | own text | gain kept | public text |"
    assert len(table) == 4 + 2 + 8 + 4
    again = run("privacy/run.py", *asked, "--limit", "0")
    assert (again.returncode, again.stdout) == (0, "\n".join(table) + "\n")


@pytest.mark.slow
def test_the_page_of_two_experts_on_a_tiny_anchor(in_empty_folder: Path, anchor: Path) -> None:
    pytest.importorskip("dp_accounting")
    data, output = in_empty_folder / "data", in_empty_folder / "run"
    for domain in ("sums", "code"):
        (data / domain).mkdir(parents=True)
        write_jsonl(data / domain / "train.jsonl", tiny.make_texts(domain, 60))
    sizes = {
        "documents": 60,
        "held-out": 40,
        "canaries": 24,
        "epochs": 4,
        "steps": 4,
        "batch": 16,
        "tried": 30,
        "draws": 1,
    }
    settings = [
        word for name, value in {**sizes, "recover": 2, "threads": 1}.items() for word in (f"--{name}", str(value))
    ]
    asked = ["--anchor", str(anchor), "--data", str(data), "--owner", "sums", "--neighbour", "code", "-o", str(output)]
    done = run("privacy/page.py", *asked, *settings)
    assert done.returncode == 0, done.stderr
    index = (output / "index.html").read_text()
    assert index.count("<tr><th scope='row'>") == 2
    assert "epsilon 7.9" in index or "epsilon 8" in index
    assert "no bound" in index
    for way in ("plain", "private"):
        page = (output / f"{way}.html").read_text()
        assert '<p class="answer">removed' in page
        assert ('<p class="answer">no bound' in page) == (way == "plain")
    before = (output / "plain.html").stat().st_mtime_ns
    assert run("privacy/page.py", *asked, *settings).returncode == 0
    assert (output / "plain.html").stat().st_mtime_ns == before
