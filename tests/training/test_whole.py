"""Training every weight: it learns, counts its tokens, and repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from flexctl.errors import FlexctlError
from flexctl.runtime import SILENT
from flexctl.text.tokens import TokenStream, frame_documents, pack
from flexctl.training import whole
from flexctl.training.whole import WholeSettings, train_whole

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = WholeSettings(max_tokens=5_000, seq_len=32, batch_tokens=256, lr=5e-3, seed=0)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> TokenStream:
    return pack(
        tmp_path_factory.mktemp("whole") / "t.tokens", frame_documents(tokenizer, tiny.make_texts("public", 40))
    )


def run(stream: TokenStream, work: Path) -> tuple[Any, int, float]:
    model = tiny.make_dense(tiny.dense_config())
    tokens, loss = train_whole(model, stream, SETTINGS, work=work, resume=False, autocast=None, reporter=SILENT)
    return model, tokens, loss


def test_it_learns_and_counts(stream: TokenStream, tmp_path: Path) -> None:
    untrained = tiny.make_dense(tiny.dense_config())
    model, tokens, loss = run(stream, tmp_path)
    assert tokens == 20 * 256
    inputs = torch.from_numpy(stream.sequence(0, 100))[None]
    with torch.no_grad():
        before, after = (float(which(inputs, labels=inputs).loss) for which in (untrained, model))
    assert after < before - 0.5
    assert after < loss < before
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, untrained.state_dict()[name])]
    assert set(moved) == set(model.state_dict())


def test_it_repeats_itself(stream: TokenStream, tmp_path: Path) -> None:
    (one, _, first), (other, _, second) = run(stream, tmp_path / "1"), run(stream, tmp_path / "2")
    assert first == second
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_text_is_gone_over_as_often_as_it_takes(tmp_path: Path, tokenizer: Any) -> None:
    short = pack(tmp_path / "t.tokens", frame_documents(tokenizer, tiny.make_texts("public", 2)))
    assert len(short) < 1000
    _, tokens, _ = run(short, tmp_path)
    assert tokens == 20 * 256


def test_checkpoints_of_another_start_or_another_text_are_not_gone_on_with(
    stream: TokenStream, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "_CHECKPOINT_STEPS", 4)
    run(stream, tmp_path)
    model = tiny.make_dense(tiny.dense_config())
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    again = {"work": tmp_path, "resume": True, "autocast": None, "reporter": SILENT}
    with pytest.raises(FlexctlError, match="weights"):
        train_whole(model, stream, SETTINGS, **again)
    other = pack(tmp_path / "o.tokens", frame_documents(tokenizer, tiny.make_texts("public", 40, seed=1)))
    with pytest.raises(FlexctlError, match="text"):
        train_whole(tiny.make_dense(tiny.dense_config()), other, SETTINGS, **again)
