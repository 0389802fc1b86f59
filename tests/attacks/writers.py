"""Every command that writes, with a call that does its work on tiny things: what commands must bear is asked of all.

A new command needs a row here, or a line in ``WRITES_NOTHING`` that says why not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tiny
from conftest import Texts, write_jsonl

from flexctl.engine.evaluate import EvaluateConfig, evaluate
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy
from flexctl.engine.train_expert import TrainExpertConfig, train_expert

__all__ = ["PLANTED", "STRANGER", "WRITERS", "WRITES_NOTHING", "Writer", "make_inputs"]

PLANTED = "Quillfeather"
"""Stands in every document of an owner's among the inputs, and nowhere else."""

STRANGER = 65534
"""Whose inputs are, where tests may give them away: nobody's."""

WRITES_NOTHING = {
    "generate": "prints",
    "chat": "prints",
    "serve": "answers",
    "inspect": "prints",
    "verify": "prints",
    "check-rights": "prints",
    "list": "prints",
    "doctor": "prints",
    "push": "sends; tests/hub",
}
"""Command -> what it does with its result instead."""


@dataclass(frozen=True, kw_only=True)
class Writer:
    """One call of a command.

    Attributes:
        words: Of the command line. It runs in an empty folder; IN stands for the folder of the inputs.
        before: Place in the folder -> input that lies there as a copy from the start.
        reads: Inputs that cannot be done without, one by one.
        random: Whether its result is another one each time.
        keeps: The hidden folder that a run which did not end may leave, to go on from; "" is none.
        shows: What holds an owner's text by its nature, in the folder; "-" is what it prints.
        never_replaces: Whether what is there stays whatever is asked.
        quick: Whether the tests that always run try it.
    """

    words: str
    before: Mapping[str, str]
    reads: tuple[str, ...]
    random: bool = False
    keeps: str = ""
    shows: tuple[str, ...] = ()
    never_replaces: bool = False
    quick: bool = False

    @property
    def command(self) -> str:
        """The command's name."""
        return self.words.split()[0]


def _row(words: str, *, before: Mapping[str, str] | None = None, reads: str, **settings: object) -> Writer:
    return Writer(words=words, before=before or {}, reads=tuple(reads.split()), **settings)  # type: ignore[arg-type]


_RUN = "--threads 1 --seq-len 32 --batch-tokens 256"
_TRAIN = f"train-expert --anchor IN/anchor --max-steps 2 --checkpoint-steps 1 {_RUN}"
_RECORD = "--tombstone --reason gone --key IN/k.key"
_OLD = {"law.st": "old.st", "law.run.json": "old.run.json", "law.canaries": "old.canaries"}
_MERGED = {"merged": "merged"}

WRITERS = {
    "init-anchor": _row(
        f"init-anchor IN/checkpoint --data IN/public --sample-tokens 2000 --anneal-tokens 512 -o anchor {_RUN}",
        reads="checkpoint/config.json checkpoint/model.safetensors checkpoint/tokenizer.json public/000.txt",
        keeps=".anchor.work",
    ),
    "init-anchor, in place of another": _row(
        "init-anchor IN/checkpoint --data IN/public --sample-tokens 2000 -o anchor --threads 1 --overwrite",
        before={"anchor": "anchor"},
        reads="",
        keeps=".anchor.work",
    ),
    "train-expert": _row(f"{_TRAIN} --data IN/code -o code.st --track", reads="code/000.py anchor", keeps=".code.work"),
    "train-expert, in place of another": _row(
        f"{_TRAIN} --data IN/code -o law.st --canaries 8 --overwrite",
        before=_OLD,
        reads="",
        random=True,
        keeps=".law.work",
    ),
    "train-expert, privately": _row(
        f"{_TRAIN} --data IN/own.jsonl -o own.st --dp-epsilon 30 --dp-delta 1e-3 --dp-documents 40 "
        "--dp-noise-multiplier 0.7",
        reads="own.jsonl",
        random=True,
        keeps=".own.work",
    ),
    "import-expert": _row(
        "import-expert IN/checkpoint --ffn-only --name dense --data IN/code --anchor IN/anchor -o dense.st --threads 1",
        reads="checkpoint/config.json checkpoint/model.safetensors code/000.py",
    ),
    "adopt": _row(
        "adopt IN/mixture --names law --data IN/public -o theirs --threads 1",
        reads="mixture/config.json mixture/model.safetensors public/000.txt",
    ),
    "embed-router": _row(
        "embed-router --data IN/code --anchor IN/anchor -o rows.st --threads 1", reads="code/000.py anchor"
    ),
    "compress": _row(
        "compress IN/code.st --data IN/code --anchor IN/anchor --rank 2 -o low.st --threads 1",
        reads="code.st code/000.py",
    ),
    "merge": _row("merge IN/code.st IN/sums.st --anchor IN/anchor -o merged", reads="code.st anchor/flexctl.json"),
    "merge, into the workspace's own": _row("merge merged IN/other.st", before=_MERGED, reads="other.st", quick=True),
    "remove": _row(f"remove code {_RECORD}", before=_MERGED, reads="k.key", quick=True),
    "remove, elsewhere": _row("remove code --from IN/merged -o rest", reads="merged/flexctl.json"),
    "replace": _row(f"replace code IN/code-2.st {_RECORD}", before=_MERGED, reads="code-2.st k.key"),
    "select-proxy": _row(
        "select-proxy --data IN/code --anchor IN/anchor -o code.proxy.json --threads 1", reads="code/000.py"
    ),
    "tune-router": _row(
        "tune-router one --proxy IN/code.proxy.json --anchor IN/anchor --max-steps 2 --checkpoint-steps 1 -o tuned "
        f"{_RUN}",
        before={"one": "one"},
        reads="code.proxy.json",
        keeps=".tuned.tuning",
    ),
    "evaluate": _row(
        "evaluate merged --data code=IN/code-test --samples s.jsonl --report r.html --threads 1",
        before=_MERGED,
        reads="code-test/000.py",
        random=True,
        shows=("r.html",),
    ),
    "audit": _row(
        "audit IN/merged --name code --data IN/code --held-out IN/code-test --anchor IN/anchor --report a.html "
        "--draws 1 --prefix-tokens 4 --max-new-tokens 4 --threads 1",
        reads="code/000.py code-test/000.py",
        random=True,
    ),
    "trace-index": _row(
        "trace-index --data IN/code -o law.index --shard-bytes 3000",
        reads="code/000.py",
        keeps=".law.index.work",
        shows=("law.index",),
        quick=True,
    ),
    "trace-index, in place of another": _row(
        "trace-index --data IN/code -o law.index --overwrite",
        before={"law.index": "law.index"},
        reads="",
        keeps=".law.index.work",
        shows=("law.index",),
    ),
    "trace-find": _row(
        "trace-find --index IN/law.index --file IN/code/000.py --report t.html",
        reads="law.index/0000.text code/000.py",
        shows=("t.html", "-"),
        quick=True,
    ),
    "keygen": _row("keygen -o new.key", reads="", random=True, never_replaces=True, quick=True),
    "sign": _row("sign code.st --key IN/k.key", before={"code.st": "code.st"}, reads="k.key", quick=True),
    "sign, a model": _row("sign merged --key IN/k.key", before=_MERGED, reads=""),
    "pull": _row("pull hf://acme/code -o code.st", reads=""),
    "pull, in place of another": _row(
        "pull hf://acme/merged -o merged --overwrite", before={"merged": "one"}, reads="", quick=True
    ),
    "demo": _row("demo --threads 1", reads="", random=True),
}
"""Every command that writes, and the ways in which some of them do."""


def make_inputs(root: Path, texts: Texts, checkpoint: Path, anchor: Path, experts: Mapping[str, Path]) -> None:
    """Fill the folder that IN stands for."""
    for name, source in (("public", texts.public), ("code", texts.code), ("code-test", texts.code_test)):
        (root / name).mkdir(parents=True)
        planted = "" if name == "public" else f"# {PLANTED}\n"
        for file in sorted(source.iterdir())[:12]:
            (root / name / file.name).write_text(planted + file.read_text())
    write_jsonl(root / "own.jsonl", [f"{PLANTED} has words of its own", f"and {PLANTED} some more of them"] * 20)
    shutil.copytree(checkpoint, root / "checkpoint")
    shutil.copytree(anchor, root / "anchor")
    for name, file in experts.items():
        shutil.copy(file, root / f"{name}.st")
    _make_mixture(root)
    for name, output in (("code", "code-2.st"), ("other", "other.st"), ("law", "old.st")):
        train_expert(
            TrainExpertConfig(
                name=name,
                data=(root / "code",),
                anchor=anchor,
                output=root / output,
                max_steps=1,
                seq_len=32,
                batch_tokens=256,
                threads=1,
                canaries=8 if name == "law" else None,
            )
        )
    merge(MergeConfig(experts=(root / "code.st", root / "sums.st"), anchor=anchor, output=root / "merged"))
    merge(MergeConfig(experts=(root / "code.st",), anchor=anchor, output=root / "one"))
    evaluate(EvaluateConfig(bundle=root / "merged", data=(f"code={root / 'code-test'}",), threads=1))
    select_proxy(SelectProxyConfig(data=(root / "code",), anchor=anchor, output=root / "code.proxy.json", threads=1))


def _make_mixture(root: Path) -> None:
    tiny.make_mixture(root / "mixture", "flex_olmo", experts=2)
    for file in (root / "checkpoint").glob("tokenizer*"):
        shutil.copy(file, root / "mixture")
