"""Hostile experts: out of proportion, grabbing all text, ruining public text; and honest ones, which are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from builders import World, make_expert, make_world, read_directory
from conftest import Texts
from hypothesis import given, settings
from hypothesis import strategies as st
from signers import cheap_keys, make_key, make_trust

from flexctl.bundle import Anchor, RawTensor, open_anchor, open_expert, open_merged
from flexctl.bundle.composed import composed_weights
from flexctl.bundle.composition import compose_anchor, compose_merged
from flexctl.bundle.tensors import from_float32, to_float32
from flexctl.bundle.weights import weights_digest
from flexctl.cli.app import main
from flexctl.engine.init_anchor import InitAnchorConfig, init_anchor
from flexctl.engine.merge import MergeConfig, MergeResult, merge
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.engine.sign import SignConfig, sign
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.errors import BundleError, UsageError
from flexctl.families import FAMILIES
from flexctl.runtime import SilentReporter

Change = Callable[[str, np.ndarray], np.ndarray]


class Listener(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str, /) -> None:
        self.warnings.append(text)


def changed(source: Path, anchor: Anchor, path: str, change: Change, name: str = "bad") -> Path:
    """Write a copy of an expert, whole and well-formed, whose tensors ``change`` has been at."""
    expert = open_expert(source)
    tensors = {}
    for key in expert.spans:
        raw = expert.tensor(key)
        values = change(key, to_float32(raw.dtype, raw.data).reshape(raw.shape)).astype(np.float32)
        tensors[key] = RawTensor(raw.dtype, raw.shape, from_float32(raw.dtype, values))
    return make_expert(Path(path), anchor, name, tensors=tensors, rank=expert.manifest.rank).path


def space_means(anchor: Anchor) -> np.ndarray:
    """The mean router input on public text of each layer, (layers, hidden)."""
    space = anchor.router_space()
    layers = range(anchor.manifest.architecture.num_hidden_layers)
    return np.stack([to_float32("F32", space[f"layers.{layer}.mean"].data) for layer in layers])


def larger(by: float) -> Change:
    return lambda key, values: values if key == "router.weight" else values * by


def grabbing(anchor: Anchor, logit: float) -> Change:
    """Rows whose logit on public text's mean is ``logit`` in every layer."""
    means = space_means(anchor)
    rows = logit * means / np.square(means).sum(axis=1, keepdims=True)
    return lambda key, values: rows if key == "router.weight" else values


# By bytes and rows alone: always, and no torch.


@pytest.fixture
def world(in_empty_folder: Path) -> World:
    return make_world(in_empty_folder, ("code", "law", "low"), dtype="BF16")


@pytest.mark.parametrize(
    ("source", "change", "says"),
    [
        ("law", larger(100), r"layers\.0\.mlp\.gate_proj\.weight is .* times as large as the public .*\(and 5 more\)"),
        ("law", larger(0), r"layers\.0\.mlp\.gate_proj\.weight is 0 times as large"),
        ("low", larger(100), r"layers\.0\.mlp\.gate_proj\.weight is .* times as large"),
    ],
)
def test_matrices_out_of_proportion_are_refused_and_nothing_is_written(
    world: World, source: str, change: Change, says: str
) -> None:
    bad = changed(world.experts[source].path, world.anchor, "bad.st", change)
    for dry_run in (True, False):
        with pytest.raises(BundleError, match=rf"^bad\.st: expert bad: {says}") as caught:
            merge(MergeConfig(experts=(*world.files("code"), bad), dry_run=dry_run))
        assert caught.value.hint == "`accept` bad takes it all the same"
    assert not Path("merged").exists()
    listener = Listener()
    merge(MergeConfig(experts=(*world.files("code"), bad), accept=("bad",)), listener)
    assert [text for text in listener.warnings if text.endswith("; accepted")]


def test_one_matrix_is_enough_and_an_end_of_it_is_seen(world: World) -> None:
    def last_row(key: str, values: np.ndarray) -> np.ndarray:
        if key == "layers.1.mlp.down_proj.weight":
            values = values.copy()
            values[-1] *= 200
        return values

    bad = changed(world.experts["law"].path, world.anchor, "bad.st", last_row)
    with pytest.raises(BundleError, match=r"layers\.1\.mlp\.down_proj\.weight is .* times as large"):
        merge(MergeConfig(experts=(bad,)))


def test_a_replaced_expert_is_looked_at_too(world: World) -> None:
    merge(MergeConfig(experts=world.files()))
    before = read_directory(Path("merged"))
    bad = changed(world.experts["law"].path, world.anchor, "bad.st", larger(100), "law")
    with pytest.raises(BundleError, match="times as large"):
        replace(ReplaceConfig(name="law", expert=bad))
    assert read_directory(Path("merged")) == before
    replace(ReplaceConfig(name="law", expert=bad, accept=("law",)))


def test_an_expert_of_a_trusted_key_is_taken_as_it_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_keys(monkeypatch)
    bad = changed(world.experts["law"].path, world.anchor, "bad.st", larger(100))
    trust = make_trust(make_key("owner")[1])
    sign(SignConfig(path=bad, key=Path("owner.key")))
    with pytest.raises(BundleError, match="times as large"):
        merge(MergeConfig(experts=(bad,)))
    assert merge(MergeConfig(experts=(bad,), trust=trust)).screening == {}


def test_who_is_accepted_must_be_there(world: World) -> None:
    with pytest.raises(UsageError, match="accept: there is no expert 'lw' to accept"):
        merge(MergeConfig(experts=world.files(), accept=("lw",)))
    with pytest.raises(UsageError, match="admit: needs text to try experts on"):
        merge(MergeConfig(experts=world.files(), admit=True))
    with pytest.raises(UsageError, match="screen: needs the anchor's public sample"):
        merge(MergeConfig(experts=(_model_elsewhere(world), Path("news.st")), output=Path("out"), screen=True))


def _model_elsewhere(world: World) -> Path:
    path = merge(MergeConfig(experts=world.files("code"), output=Path("far/merged"))).path
    world.anchor.path.rename("hidden")
    make_expert(Path("news.st"), open_anchor(Path("hidden")), "news")
    return path


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_what_is_tried_is_what_will_be_written(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.mktemp("law")
    world = make_world(root, ("code", "law", "low"), dtype="BF16")
    names = data.draw(st.lists(st.sampled_from(["code", "law", "low"]), unique=True))
    composition = compose_anchor(world.anchor).adding(world.experts[name] for name in names)
    merge(MergeConfig(experts=world.files(*names) if names else (), anchor=world.anchor.path, output=root / "m"))
    written = open_merged(root / "m")
    assert weights_digest(composed_weights(composition)) == weights_digest(written.weights())
    assert weights_digest(composed_weights(compose_merged(written))) == weights_digest(written.weights())


@pytest.mark.usefixtures("in_empty_folder", "one_thread")
@pytest.mark.parametrize("model_type", [family.dense_type for family in FAMILIES])
def test_in_every_family_trained_experts_are_taken_and_hostile_ones_are_not(
    model_type: str, tokenizer: Any, texts: Texts
) -> None:
    """Full and low-rank, trained hard on little text; nobody asked for a look, and no model runs for it."""
    tiny.make_dense(tiny.dense_config(model_type)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    init_anchor(InitAnchorConfig(data=(texts.public_test,), source="base", sample_tokens=2000, threads=1))
    anchor = open_anchor(Path("anchor"))
    settings: dict[str, Any] = {"data": (texts.code_test,), "max_steps": 12, "epochs": 50, "seq_len": 32, "lr": 1e-2}
    for name, rank in (("full", None), ("low", 4)):
        train_expert(TrainExpertConfig(name=name, output=Path(f"{name}.st"), rank=rank, threads=1, **settings))
    honest = (Path("full.st"), Path("low.st"))
    assert merge(MergeConfig(experts=honest)).screening == {}
    for change, says in ((larger(100), "times as large"), (grabbing(anchor, 30), "by its rows it takes")):
        bad = changed(honest[0], anchor, "bad.st", change)
        with pytest.raises(BundleError, match=rf"^bad\.st: expert bad: .*{says}"):
            merge(MergeConfig(experts=(*honest, bad), output=Path("never")))
        merge(MergeConfig(experts=(*honest, bad), output=Path("taken"), accept=("bad",), overwrite=True))
        bad.unlink()


# By running it: on a trained anchor.


@pytest.fixture
def honest(in_empty_folder: Path, anchor: Path, experts: dict[str, Path]) -> Anchor:
    assert in_empty_folder.is_dir()
    assert len(experts) == 2
    Path("flexctl.toml").write_text(f"[workspace]\nanchor = '{anchor}'\n")
    return open_anchor(anchor)


def tried(*files: Path, **asked: Any) -> MergeResult:
    return merge(MergeConfig(experts=files, threads=1, seq_len=64, overwrite=True, **asked))


def random_weights(key: str, values: np.ndarray) -> np.ndarray:
    """Matrices of the same size, and nothing learnt."""
    if key == "router.weight":
        return values
    return np.random.default_rng(len(key)).standard_normal(values.shape) * values.std() * 4


def test_honest_experts_pass_and_their_figures_are_told(honest: Anchor, experts: dict[str, Path]) -> None:
    result = tried(*experts.values(), screen=True)
    assert set(result.screening) == {"code", "sums"}
    for figures in result.screening.values():
        assert 0 <= figures["public_share"] < 0.9
        assert abs(figures["public_cost"]) < 0.25
    again = tried(*reversed(experts.values()), screen=True)
    assert again.screening == result.screening
    assert result.digest == tried(*experts.values()).digest
    assert honest.digest == open_merged(Path("merged")).manifest.anchor.digest


def test_an_expert_that_ruins_public_text_is_refused(honest: Anchor, experts: dict[str, Path]) -> None:
    def ruin(key: str, values: np.ndarray) -> np.ndarray:
        return grabbing(honest, 1.5)(key, random_weights(key, values))

    bad = changed(experts["code"], honest, "bad.st", ruin)
    assert tried(experts["sums"], bad).screening == {}
    with pytest.raises(BundleError, match=r"^bad\.st: expert bad: it costs public text [\d.]+ nats a token"):
        tried(experts["sums"], bad, screen=True)
    accepted = tried(experts["sums"], bad, screen=True, accept=("bad",))
    assert accepted.screening["bad"]["public_cost"] > 0.25


def test_rows_that_take_nearly_all_public_text_are_refused(honest: Anchor, experts: dict[str, Path]) -> None:
    bad = changed(experts["code"], honest, "bad.st", grabbing(honest, 8))
    with pytest.raises(BundleError, match=r"bad\.st: expert bad: by its rows it takes (9\d|100)% of public text"):
        tried(bad)


def test_an_expert_that_takes_nearly_all_when_it_runs_is_refused(
    honest: Anchor, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its rows had shown nothing."""
    bad = changed(experts["code"], honest, "bad.st", grabbing(honest, 8))
    monkeypatch.setattr("flexctl.steps.screening.refuse_implausible", lambda *_: None)
    with pytest.raises(BundleError, match=r"bad\.st: expert bad: it takes (9\d|100)% of public text"):
        tried(bad, screen=True)


def test_two_that_hide_behind_each_other_are_refused(honest: Anchor, experts: dict[str, Path]) -> None:
    """With either left out, the other still does the harm."""
    files = []
    for name in ("one", "two"):
        noise = np.random.default_rng(len(files)).standard_normal

        def ruin(key: str, values: np.ndarray, noise: Any = noise) -> np.ndarray:
            return grabbing(honest, 2.0)(key, random_weights(key, values) + 1e-3 * noise(values.shape))

        files.append(changed(experts["code"], honest, f"{name}.st", ruin, name))
    with pytest.raises(BundleError, match=r"one\.st: expert one: with two it costs public text [\d.]+ nats a token"):
        tried(*files, screen=True)


def test_with_a_trust_file_strangers_are_tried_unasked(
    honest: Anchor, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert honest.path.is_dir()
    cheap_keys(monkeypatch)
    trust = make_trust(make_key("owner")[1])
    signed = Path("sums.st")
    signed.write_bytes(experts["sums"].read_bytes())
    sign(SignConfig(path=signed, key=Path("owner.key")))
    assert set(tried(experts["code"], signed, trust=trust).screening) == {"code"}


def test_an_expert_that_makes_a_domain_worse_is_not_admitted(
    honest: Anchor, experts: dict[str, Path], texts: Texts, capsys: pytest.CaptureFixture[str]
) -> None:
    domains = (f"code={texts.code_test}", f"public={texts.public_test}")
    result = tried(*experts.values(), admit=True, data=domains[:1], accept=("sums",))
    assert result.admission["code"]["code"].value < 0

    def ruin(key: str, values: np.ndarray) -> np.ndarray:
        return grabbing(honest, 1.0)(key, random_weights(key, values))

    bad = changed(experts["code"], honest, "bad.st", ruin)
    with pytest.raises(BundleError, match=r"bad\.st: expert bad: it makes public worse by "):
        tried(bad, admit=True, data=domains)
    reported = tried(bad, data=domains, accept=("bad",))
    assert reported.admission["public"]["bad"].low > 0
    assert tried(bad, data=domains).admission == reported.admission  # told, and not refused
    command = ["merge", str(bad), "-o", "new", "--admit", "--threads", "1", "--seq-len", "64"]
    assert main([*command, *(word for domain in domains for word in ("--data", domain)), "-q"]) == 3
    assert "hint: --accept bad takes it all the same\n" in capsys.readouterr().err
    assert not Path("new").exists()


def test_a_new_version_that_is_worse_is_not_admitted(honest: Anchor, experts: dict[str, Path], texts: Texts) -> None:
    tried(*experts.values())
    before = read_directory(Path("merged"))

    def ruin(key: str, values: np.ndarray) -> np.ndarray:
        return random_weights(key, values)

    worse = changed(experts["code"], honest, "code.st", ruin, "code")
    asked: dict[str, Any] = {"data": (f"code={texts.code_test}",), "threads": 1, "seq_len": 64}
    with pytest.raises(BundleError, match=r"code\.st: expert code: it makes code worse by"):
        replace(ReplaceConfig(name="code", expert=worse, admit=True, **asked))
    assert read_directory(Path("merged")) == before
    assert replace(ReplaceConfig(name="code", expert=worse, **asked)).bits_per_byte["code"]["after"] > 0
    assert replace(ReplaceConfig(name="code", expert=experts["code"], admit=True, **asked)).name == "code"
