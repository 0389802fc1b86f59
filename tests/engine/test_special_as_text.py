"""Special tokens inside text: tokens by default, plain letters where `special_as_text` says so, and never both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import flexctl
from flexctl import training
from flexctl.bundle import open_anchor, open_expert
from flexctl.commands import COMMANDS
from flexctl.engine.evaluate import EvaluateConfig, EvaluateResult, evaluate
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.errors import UsageError
from flexctl.model.building import load_tokenizer
from flexctl.options import options
from flexctl.text.encoding import PIECE_CHARACTERS, encoded

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

END = "<|endoftext|>"
SMALL: Any = {"max_steps": 4, "seq_len": 32, "batch_tokens": 128, "threads": 1}


@pytest.fixture
def quoting(tmp_path: Path) -> Path:
    """Text that quotes a special token in every document."""
    file = tmp_path / "quoting.jsonl"
    documents = [f"{text} a document ends with {END} there" for text in tiny.make_texts("code", 30)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return file


def test_a_special_token_in_text_is_one_token_or_its_letters(checkpoint: Path) -> None:
    usual, plain = load_tokenizer(checkpoint), load_tokenizer(checkpoint, special_as_text=True)
    # A short text, and one that is tokenised in pieces.
    for text in (f"one {END} two", f"one {END} two " * (PIECE_CHARACTERS // 16)):
        ((_, ours),), ((_, letters),) = encoded(usual, [text]), encoded(plain, [text])
        count = text.count(END)
        assert (ours == usual.eos_token_id).sum() == count
        assert plain.eos_token_id not in letters
        assert plain.decode(letters) == text == usual.decode(ours)


def test_every_command_that_reads_a_text_field_has_it() -> None:
    """But for an index, which is of bytes, and an audit, which reads text as the expert's training did."""
    for command in COMMANDS:
        if command.name in ("trace_index", "audit"):
            continue
        names = {option.field for option in options(getattr(flexctl, command.config))}
        assert ("text_field" in names) == ("special_as_text" in names), command


def test_an_expert_trains_on_the_letters_and_its_manifest_says_so(tmp_path: Path, anchor: Path, quoting: Path) -> None:
    made = {}
    for plain in (False, True):
        config = TrainExpertConfig(
            data=(quoting,), anchor=anchor, output=tmp_path / f"{plain}.st", special_as_text=plain, **SMALL
        )
        train_expert(config)
        made[plain] = open_expert(config.output).manifest  # type: ignore[arg-type]
    assert made[True].data.tokens > made[False].data.tokens
    assert made[True].data.bytes == made[False].data.bytes
    assert made[True].training["special_as_text"] is True
    assert "special_as_text" not in made[False].training


def test_resume_goes_on_with_the_same_reading_alone(
    tmp_path: Path, anchor: Path, quoting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"data": (quoting,), "anchor": anchor, "output": tmp_path / "x.st", "checkpoint_steps": 1, **SMALL}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Pair, "round_weights", killed)
        with pytest.raises(KeyboardInterrupt):
            train_expert(TrainExpertConfig(**settings, special_as_text=True))
    with pytest.raises(UsageError, match="special_as_text = True, this one has False"):
        train_expert(TrainExpertConfig(**settings, resume=True))
    train_expert(TrainExpertConfig(**settings, special_as_text=True, resume=True))
    # It is done, and another reading is another request.
    train_expert(TrainExpertConfig(**settings, special_as_text=True, resume=True))
    with pytest.raises(UsageError, match="had special_as_text = True; this one has False"):
        train_expert(TrainExpertConfig(**settings, resume=True))


def test_scores_are_of_one_reading(anchor: Path, quoting: Path) -> None:
    def score(plain: bool) -> EvaluateResult:
        return evaluate(EvaluateConfig(bundle=anchor, data=(f"q={quoting}",), special_as_text=plain, threads=1))

    usual, plain, again = score(False), score(True), score(False)
    assert plain.perplexity["q"].tokens > usual.perplexity["q"].tokens
    assert again.perplexity == usual.perplexity
    assert (usual.settings.special_as_text, plain.settings.special_as_text) == (False, True)


def test_an_anchor_keeps_a_stock_tokenizer(tmp_path: Path, checkpoint: Path, quoting: Path) -> None:
    config = InitAnchorConfig(
        data=(quoting,),
        source=str(checkpoint),
        output=tmp_path / "anchor",
        anneal_tokens=1_000,
        sample_tokens=1_000,
        seq_len=64,
        batch_tokens=256,
        special_as_text=True,
        threads=1,
    )
    init_anchor(config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert b"split_special" not in (tmp_path / "anchor" / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "anchor")
    assert tokenizer.eos_token_id in tokenizer(END)["input_ids"]
    sample = open_anchor(tmp_path / "anchor").public_sample()
    # Read as letters, the token stands between documents alone: each begins and ends with it.
    ends = np.frombuffer(sample["tokens"].data, dtype="<i4") == tokenizer.eos_token_id
    assert ends.sum() == 2 * (sample["offsets"].shape[0] - 1)
