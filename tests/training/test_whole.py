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
from flexctl.training.checkpoints import Checkpoints
from flexctl.training.whole import WholeSettings, train_whole

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = WholeSettings(max_tokens=5_000, seq_len=32, batch_tokens=256, lr=5e-3, seed=0)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> TokenStream:
    return pack(
        tmp_path_factory.mktemp("whole") / "t.tokens", frame_documents(tokenizer, tiny.make_texts("public", 40))
    )


def run(
    stream: TokenStream, work: Path, *, dropout: float = 0.0, resume: bool = False, **settings: Any
) -> tuple[Any, int, float]:
    model = tiny.make_dense(tiny.dense_config(attention_dropout=dropout))
    told: dict[str, Any] = {"work": work, "resume": resume, "autocast": None, "reporter": SILENT, **settings}
    tokens, loss = train_whole(model, stream, SETTINGS, **told)
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
    stream: TokenStream, tmp_path: Path, tokenizer: Any
) -> None:
    run(stream, tmp_path, checkpoint_steps=4)
    model = tiny.make_dense(tiny.dense_config())
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    again = {"work": tmp_path, "resume": True, "autocast": None, "reporter": SILENT}
    with pytest.raises(FlexctlError, match="weights"):
        train_whole(model, stream, SETTINGS, **again)
    other = pack(tmp_path / "o.tokens", frame_documents(tokenizer, tiny.make_texts("public", 40, seed=1)))
    with pytest.raises(FlexctlError, match="text"):
        train_whole(tiny.make_dense(tiny.dense_config()), other, SETTINGS, **again)


def test_dropout_goes_on_where_it_was(stream: TokenStream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint holds torch's random state, and a run begins with its seed, whatever was drawn before."""
    straight, _, loss = run(stream, tmp_path / "1", dropout=0.3)
    torch.rand(7)
    stop, is_due = iter(range(1, 100)), Checkpoints.is_due

    def stopping(self: Checkpoints, step: int, steps: int) -> bool:
        if next(stop) == 7:
            raise KeyboardInterrupt
        return is_due(self, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "is_due", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(stream, tmp_path / "2", dropout=0.3, checkpoint_steps=4)
    resumed, _, again = run(stream, tmp_path / "2", dropout=0.3, resume=True)
    assert again == loss
    assert run(stream, tmp_path / "3")[2] != loss
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in resumed.state_dict().items())
