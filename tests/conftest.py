"""What several tests share: text of three kinds, a tiny stock checkpoint, an anchor and two experts made from it.

Made once a session, through the engine, in seconds. Tests must not change what they get from here.
"""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny

os.environ["HF_HUB_OFFLINE"] = "1"
# The cache of what was hashed and scored is the user's own; tests have one that nobody else reads.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="flexctl-test-cache-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from flexctl.steps.speed import remember_rates

# What dtype auto is must not depend on the processor that tests run on.
remember_rates({"float32": 1.0, "bfloat16": 1.0})


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let Python not look again and again at the million objects that imports make and that stay to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Folders and files of text.

    Attributes:
        public: Folder of .txt files.
        code: Folder of .py files.
        sums: A .jsonl file.
        code_test: Folder of other documents of the same kind.
        sums_test: Likewise.
        public_test: Likewise.
    """

    public: Path
    code: Path
    sums: Path
    public_test: Path
    code_test: Path
    sums_test: Path


@pytest.fixture(scope="session")
def one_thread() -> int:
    """Let torch use one thread: results then do not depend on the machine's cores."""
    import torch

    torch.set_num_threads(1)
    return torch.get_num_threads()


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a new folder, with no setting of the user's in the environment."""
    for name in [name for name in os.environ if name.startswith("FLEXCTL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    root = tmp_path_factory.mktemp("texts")
    write_folder(root / "public", tiny.make_texts("public", 120), "txt")
    write_folder(root / "code", tiny.make_texts("code", 40), "py")
    write_jsonl(root / "sums.jsonl", tiny.make_texts("sums", 40))
    for kind, ending in (("public", "txt"), ("code", "py"), ("sums", "txt")):
        write_folder(root / f"{kind}-test", tiny.make_texts(kind, 8, seed=1), ending)
    return Texts(
        public=root / "public",
        code=root / "code",
        sums=root / "sums.jsonl",
        public_test=root / "public-test",
        code_test=root / "code-test",
        sums_test=root / "sums-test",
    )


def write_folder(folder: Path, documents: list[str], ending: str) -> None:
    folder.mkdir()
    for i, text in enumerate(documents):
        (folder / f"{i:03}.{ending}").write_text(text, encoding="utf-8", newline="")


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, one_thread: int) -> Path:
    """A stock OLMo-2-shaped checkpoint with its tokenizer, as save_pretrained writes it, float32."""
    from flexctl.text.tokenizer import train_tokenizer

    assert one_thread == 1
    folder = tmp_path_factory.mktemp("stock") / "tiny-olmo2"
    words = [text for kind in ("public", "code", "sums") for text in tiny.make_texts(kind, 20, seed=2)]
    tokenizer = train_tokenizer(words, tiny.VOCAB_SIZE, tiny.CONTEXT)
    assert len(tokenizer) == tiny.VOCAB_SIZE
    tiny.make_dense(tiny.dense_config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def anchor(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, texts: Texts) -> Path:
    """An anchor: the checkpoint, annealed for some steps on the public text so that it knows a little."""
    from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor

    path = tmp_path_factory.mktemp("work") / "anchor"
    init_anchor(
        InitAnchorConfig(
            data=(texts.public,),
            source=str(checkpoint),
            output=path,
            anneal_tokens=40_000,
            sample_tokens=8_000,
            seq_len=64,
            batch_tokens=512,
            lr=4e-3,
            threads=1,
        )
    )
    return path


@pytest.fixture(scope="session")
def experts(anchor: Path, texts: Texts) -> dict[str, Path]:
    """Two experts, "code" and "sums", trained for a few steps against the anchor."""
    from flexctl.engine.train_expert import TrainExpertConfig, train_expert

    made = {}
    for name in ("code", "sums"):
        made[name] = anchor.parent / "experts" / f"{name}.st"
        data = (getattr(texts, name),)
        train_expert(
            TrainExpertConfig(
                data=data, anchor=anchor, output=made[name], max_steps=12, seq_len=64, batch_tokens=512, threads=1
            )
        )
    return made


@pytest.fixture(scope="session")
def merged(anchor: Path, experts: dict[str, Path]) -> Path:
    """The anchor merged with both experts."""
    from flexctl.engine.merge import MergeConfig, merge

    path = anchor.parent / "merged"
    merge(MergeConfig(experts=tuple(experts.values()), anchor=anchor, output=path))
    return path


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Any:
    from flexctl.model.building import load_tokenizer

    return load_tokenizer(checkpoint)
