"""Memory stays flat: merge, import-expert and adopt on checkpoints several times what the process may have."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from builders import make_anchor, make_checkpoint, write_zeros

from flexctl.bundle import Anchor, RawTensor, RouterInfo, anchor, write_router_file
from flexctl.bundle.headers import read_header
from flexctl.bundle.stock import checkpoint_spans

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the process by RLIMIT_DATA and reads /proc")

SMALL = {"layers": 2, "hidden": 64, "inner": 128, "vocab": 320}
HEADROOM = 64_000_000
"""What a process may still allocate, its threads' stacks included, once it has handled the small checkpoint."""

MEASURE = """
import json, re, resource, sys
from pathlib import Path
from flexctl.engine.import_expert import ImportExpertConfig, import_expert
from flexctl.engine.merge import MergeConfig, merge
from flexctl.runtime import peak_rss_bytes

def import_and_merge(root):
    import_expert(ImportExpertConfig(
        dense=str(root / "dense"), data=(root / "text.txt",), anchor=root / "anchor", name="law",
        router=str(root / "rows.st"), output=root / "law.st",
    ))
    merge(MergeConfig(experts=(root / "law.st",), anchor=root / "anchor", output=root / "merged"))
    return peak_rss_bytes()

small, large, headroom = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
peaks = [import_and_merge(small)]
status = Path("/proc/self/status").read_text()
limit = int(re.search(r"VmData:\\s+(\\d+) kB", status)[1]) * 1024 + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
peaks.append(import_and_merge(large))
print(json.dumps(peaks))
"""


def make_world(root: Path, tokenizer: Path, **sizes: int) -> int:
    """Write an anchor, a fine-tuned checkpoint and router rows, nearly all zeros; return the checkpoint's bytes."""
    made = make_anchor(root / "anchor", dtype="BF16", tokenizer=tokenizer, sparse=True, **sizes)
    dense = make_checkpoint(root / "dense", dtype="BF16", tokenizer=tokenizer, sparse=True, **sizes)
    with (dense / "model.safetensors").open("r+b") as file:
        for name, span in checkpoint_spans(dense).items():
            if ".mlp." in name:
                file.seek(span.start)
                file.write(np.array([0x3F80], "<u2").tobytes())
    write_rows(root / "rows.st", made)
    (root / "text.txt").write_text("1 + 1 = 2\n" * 20)
    return (dense / "model.safetensors").stat().st_size


def write_rows(path: Path, made: Anchor) -> None:
    layers, hidden = made.manifest.architecture.num_hidden_layers, made.manifest.architecture.hidden_size
    info = RouterInfo(kind="hidden", samples=3, encoder=None, trained=False, bias=(-1.0,) * layers)
    rows = RawTensor("F32", (layers, hidden), np.zeros(4 * layers * hidden, np.uint8))
    write_router_file(path, anchor=made, name="law", rows=rows, router=info, overwrite=False)


def peaks(small: Path, large: Path, script: str = MEASURE) -> list[int]:
    """Return the peak resident bytes of a process after the small world, and after the large one under the limit."""
    command = [sys.executable, "-c", script, str(small), str(large), str(HEADROOM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


def test_import_and_merge_of_a_checkpoint_four_times_the_limit(tmp_path: Path, checkpoint: Path) -> None:
    make_world(tmp_path / "small", checkpoint, **SMALL)
    size = make_world(tmp_path / "large", checkpoint, layers=2, hidden=2048, inner=8192, vocab=320)
    assert size > 4 * HEADROOM
    small, large = peaks(tmp_path / "small", tmp_path / "large")
    assert large - small < 24_000_000, "less than one of its matrices, 33.6 MB"


ADOPT = MEASURE.replace(
    "def import_and_merge(root):\n",
    """from flexctl.engine.adopt import AdoptConfig, adopt

def import_and_merge(root):
    adopt(AdoptConfig(mixture=str(root / "moe"), names=("law",), output=root / "w"))
    return peak_rss_bytes()
""",
)


@pytest.mark.slow
def test_adopting_a_checkpoint_twice_the_limit(tmp_path: Path) -> None:
    """Its experts are packed into tensors of 100 and 50 MB, of which each takes a part."""
    for name, hidden, inner in (("small", 64, 128), ("large", 2048, 6144)):
        tiny.make_sparse_mixture(tmp_path / name / "moe", hidden, inner)
    assert (tmp_path / "large/moe/model.safetensors").stat().st_size > 2 * HEADROOM
    small, large = peaks(tmp_path / "small", tmp_path / "large", ADOPT)
    assert large - small < 24_000_000, "less than one of its matrices, 25.2 MB"


FRAME = """
import resource, sys
from pathlib import Path
from flexctl.model.building import load_tokenizer
from flexctl.text.documents import read_documents
from flexctl.text.tokens import frame_documents

def frame(path):
    for document in frame_documents(tokenizer, read_documents([Path(path)])):
        print(len(document.tokens))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

tokenizer = load_tokenizer(Path(sys.argv[1]))
frame(sys.argv[2])
frame(sys.argv[3])
"""


def test_a_long_document_takes_little_memory(tmp_path: Path, checkpoint: Path) -> None:
    """1.8 million characters take 280 MB at once."""
    for name, times in (("short", 10_000), ("long", 120_000)):
        (tmp_path / name).write_text("one and another\n" * times)
    command = [sys.executable, "-c", FRAME, str(checkpoint), str(tmp_path / "short"), str(tmp_path / "long")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fewer, before, more, after = map(int, done.stdout.split())
    assert (more - 2) == 12 * (fewer - 2)
    assert after - before < 80_000_000


FIT = """
import torch
from flexctl.routing.space import InputStatistics, fit_space
from flexctl.runtime import peak_rss_bytes

def fit(layers, hidden):
    second = torch.eye(hidden, dtype=torch.float64).repeat(layers, 1, 1)
    mean, kind = torch.zeros(layers, hidden, dtype=torch.float64), second.float()
    before = peak_rss_bytes()
    fit_space(InputStatistics(count=9, mean=mean, second=second), [kind])
    return peak_rss_bytes() - before

fit(1, 512)
print(fit(24, 512))
"""


def test_fitting_a_space_takes_less_than_its_covariances_all_together() -> None:
    """They are twice 50 MB in float64; what is kept for public text is a quarter of that, and so is what is for all."""
    done = subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 90_000_000


PREPARE = """
import json, sys
from pathlib import Path
from flexctl.model.building import load_tokenizer
from flexctl.runtime import SILENT, peak_rss_bytes
from flexctl.text.corpus import prepare_corpus
from flexctl.text.decontamination import Decontamination

def prepare(name):
    work = root / f"{name}.work"
    work.mkdir()
    for _ in range(2):  # the second time its tokens are there already
        corpus = prepare_corpus(
            [root / name], tokenizer, work, seed=0, passages=512, reporter=SILENT,
            decontamination=Decontamination.read([root / "test.jsonl"], "text"), near_duplicates=True,
        )
        corpus.stream.refuse_change()
    return peak_rss_bytes()

root, tokenizer = Path(sys.argv[1]), load_tokenizer(Path(sys.argv[2]))
print(json.dumps([prepare("small.jsonl"), prepare("large.jsonl")]))
"""


@pytest.mark.slow
def test_preparing_a_corpus_takes_no_more_memory_for_a_larger_one(tmp_path: Path, checkpoint: Path) -> None:
    """Of documents of 2 kB: 8 bytes of memory for each, some 40 while near duplicates are counted."""
    documents, sizes = {"small.jsonl": 4_000, "large.jsonl": 20_000}, {}
    for name, count in documents.items():
        with (tmp_path / name).open("w") as file:
            for number in range(count):
                words = " ".join(f"{word} {number * word % 7919}" for word in range(230))
                sizes[name] = sizes.get(name, 0) + file.write(json.dumps({"text": words}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": " ".join(map(str, range(99, 199)))}) + "\n")
    assert sizes["large.jsonl"] - sizes["small.jsonl"] > 25_000_000
    command = [sys.executable, "-c", PREPARE, str(tmp_path), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout)
    assert large - small < 8_000_000, "its tokens alone are more than 25 MB"


@pytest.mark.slow
def test_import_and_merge_of_a_checkpoint_larger_than_most_machines_memory(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 GB in holes, a single tensor 12 GB; the merged model takes that room on the disk."""
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("needs 40 GB of free disk")
    copy = anchor._copy

    def with_holes(source: Path, target: Path) -> None:
        if source.name == "model.safetensors":
            write_zeros(target, read_header(source).tensors)
        else:
            copy(source, target)

    monkeypatch.setattr(anchor, "_copy", with_holes)
    make_world(tmp_path / "small", checkpoint, **SMALL)
    size = make_world(tmp_path / "large", checkpoint, layers=1, hidden=4096, inner=4096, vocab=1_500_000)
    assert size > 24e9
    small, large = peaks(tmp_path / "small", tmp_path / "large")
    shutil.rmtree(tmp_path / "large")
    assert large - small < 24_000_000
