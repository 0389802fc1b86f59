"""audit: an expert that was overfitted on purpose is caught, the anchor and what is left without it are not."""

from __future__ import annotations

import dataclasses
import datetime
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import forge_expert
from conftest import Texts, write_jsonl
from signers import cheap_keys, make_key, make_trust

from flexctl import privacy
from flexctl.bundle.codec import encode
from flexctl.bundle.expert import open_expert
from flexctl.bundle.manifest import PrivacyInfo
from flexctl.bundle.merged import open_merged
from flexctl.cli.app import main
from flexctl.engine.audit import AuditConfig, AuditResult, audit
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.trace_index import TraceIndexConfig, trace_index
from flexctl.engine.train_expert import TrainExpertConfig, train_expert
from flexctl.errors import BundleError, UsageError
from flexctl.steps.claims import bound_of
from flexctl.text import canaries

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS, CANARIES = 40, 12
SMALL: dict[str, Any] = {"draws": 1, "prefix_tokens": 4, "max_new_tokens": 8, "threads": 1}


class Dice:
    """Stands for the system's entropy, the same on every machine."""

    def __init__(self) -> None:
        self._rng = random.Random(0)

    def randbelow(self, end: int) -> int:
        return self._rng.randrange(end)

    def choice(self, options: str) -> str:
        return self._rng.choice(options)


def made_up(count: int, seed: int) -> list[str]:
    """Texts that nobody can know: made of syllables drawn by a seed."""
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))

    return [" ".join(word() for _ in range(16)) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """An expert that has learned its text by heart, its model, and text of the same kind."""

    folder: Path
    expert: Path
    merged: Path
    data: Path
    other: Path
    asked: TrainExpertConfig

    @property
    def canaries(self) -> Path:
        return self.expert.with_suffix(".canaries")

    def audit(self, **settings: Any) -> AuditResult:
        given = {"bundle": self.merged, "name": "law", "data": (self.data,), "held_out": self.other}
        return audit(AuditConfig(**{**given, **SMALL, **settings}))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, anchor: Path, experts: dict[str, Path]) -> Case:
    folder = tmp_path_factory.mktemp("audit")
    data, expert = folder / "law.jsonl", folder / "law.st"
    write_jsonl(data, made_up(DOCUMENTS, seed=0))
    write_jsonl(folder / "other.jsonl", made_up(32, seed=1))
    asked = TrainExpertConfig(
        data=(data,),
        anchor=anchor,
        output=expert,
        name="law",
        canaries=CANARIES,
        epochs=100,
        max_steps=300,
        lr=1e-2,
        seq_len=64,
        batch_tokens=512,
        public_mix=0.0,
        threads=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canaries, "secrets", Dice())
        train_expert(asked)
    merge(MergeConfig(experts=(expert, experts["code"]), anchor=anchor, output=folder / "merged"))
    return Case(folder, expert, folder / "merged", data, folder / "other.jsonl", asked)


@pytest.fixture(scope="module")
def found(case: Case) -> AuditResult:
    return case.audit(planted=case.canaries, recover=4, report=case.folder / "audit.html")


def test_what_was_learned_by_heart_is_caught_and_nothing_else(found: AuditResult) -> None:
    assert list(found.models) == ["anchor", "merged", "without law"]
    assert {name: model.found for name, model in found.models.items()} == {
        "anchor": False,
        "merged": True,
        "without law": False,
    }
    learned = found.models["merged"].membership
    assert set(learned) == {"loss", "zlib", "min-k", "calibrated"}
    assert all((score.auc.low or 0) > 0.5 for score in learned.values())
    assert set(found.models["anchor"].membership) == {"loss", "zlib", "min-k"}
    assert (found.members, found.others) == (DOCUMENTS - 2, 32)


def test_canaries_bound_epsilon_for_the_model_alone(found: AuditResult) -> None:
    bounds = {name: model.canaries for name, model in found.models.items()}
    assert all(bound is not None and bound.canaries == CANARIES for bound in bounds.values())
    assert bounds["merged"] is not None
    assert bounds["merged"].auc.value > 0.8
    assert bounds["anchor"] is not None
    assert bounds["anchor"].epsilon == 0


def test_three_answers(found: AuditResult) -> None:
    answers = found.answers
    assert answers is not None
    assert (answers.at_most, answers.gone) == (None, None)
    assert answers.at_least.found
    bound = found.models["merged"].canaries
    assert bound is not None
    assert answers.at_least.epsilon == bound.epsilon


def test_a_guarantee_is_computed_again() -> None:
    """A claim that holds, and one that is below its own figures."""
    mechanism = privacy.Mechanism(noise_multiplier=2.0, sampling_rate=0.1, steps=20, row_noise_multiplier=10.0)
    guarantee = PrivacyInfo(
        mechanism=privacy.MECHANISM,
        epsilon=privacy.spent(mechanism, 1e-3),
        delta=1e-3,
        unit=privacy.UNIT,
        accountant=privacy.ACCOUNTANT,
        noise_multiplier=mechanism.noise_multiplier,
        sampling_rate=mechanism.sampling_rate,
        steps=mechanism.steps,
        max_grad_norm=1.0,
        adjacency=privacy.ADJACENCY,
        row_noise_multiplier=mechanism.row_noise_multiplier,
    )
    honest = bound_of(guarantee)
    assert honest is not None
    assert (honest.epsilon, honest.recomputed, honest.refuted) == (guarantee.epsilon, True, None)
    boasting = bound_of(dataclasses.replace(guarantee, epsilon=guarantee.epsilon / 2))
    assert boasting is not None
    assert f"its own noise, sampling rate and steps make it {guarantee.epsilon:g}" in str(boasting.refuted)
    assert bound_of(None) is None


def test_gone_is_what_a_signed_record_proves(
    case: Case, anchor: Path, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Audited where the owner has the file; the model that was left lies beside its record."""
    cheap_keys(monkeypatch)
    key, entry = make_key("hub")
    trust = make_trust(entry)
    left = in_empty_folder / "left"
    asked: dict[str, Any] = {"removed_from": left, "trust": trust, "dry_run": True}
    remove(RemoveConfig(names=("law",), source=case.merged, output=left))
    with pytest.raises(UsageError, match=r"removed_from: .*law.removed.json: no such record"):
        case.audit(**asked)
    signed: dict[str, Any] = {"tombstone": True, "reason": "withdrawn", "key": key, "overwrite": True}
    remove(RemoveConfig(names=("law",), source=case.merged, output=left, **signed), today=datetime.date(2026, 3, 1))
    for bundle in (case.merged, case.expert):
        answers = case.audit(**{**asked, "dry_run": False}, bundle=bundle, anchor=anchor, documents=4).answers
        assert answers is not None
        assert answers.gone is not None
        assert (answers.gone.date, answers.gone.signers) == ("2026-03-01", "hub (trusted without end)")
        assert (answers.gone.before, answers.gone.after) == (open_merged(case.merged).digest, open_merged(left).digest)
        assert answers.gone.is_left
    later = in_empty_folder / "later"
    remove(RemoveConfig(names=("code",), source=left, output=later))
    with pytest.raises(BundleError, match=r"signed: .*later/flexctl.sig: is missing: nobody signed this"):
        case.audit(**{**asked, "removed_from": later})
    assert main(["sign", str(later), "--key", str(key), "-q"]) == 0
    case.audit(**{**asked, "removed_from": later})
    shutil.copy("law.removed.json", "code.removed.json")
    with pytest.raises(UsageError, match=r"code.removed.json is about law, .* audited is code, "):
        case.audit(**asked, name="code")
    with pytest.raises(UsageError, match="removed_from: is proven by a signed record: say whose keys count"):
        case.audit(removed_from=left, dry_run=True)
    with pytest.raises(UsageError, match="nowhere is no merged model"):
        case.audit(**{**asked, "removed_from": Path("nowhere")})
    with pytest.raises(BundleError, match=r"no key of .*strange.toml signed it"):
        case.audit(**{**asked, "trust": make_trust(make_key("stranger")[1], path="strange.toml")})
    shutil.rmtree(left)
    shutil.copytree(case.merged, left)
    with pytest.raises(BundleError, match="absent law: "):
        case.audit(**asked)


def test_recovery_is_measured_beside_the_anchor(found: AuditResult) -> None:
    curves = found.recovery
    assert curves is not None
    assert (curves.steps, list(curves.bits_per_byte)) == ([0, 1, 2, 4], ["without law", "anchor"])
    assert curves.bits_per_byte["anchor"][-1].value < curves.bits_per_byte["anchor"][0].value
    assert curves.faster[0].value == 0
    assert not curves.comes_back


def test_the_page_and_the_file_hold_no_text(case: Case, found: AuditResult) -> None:
    page = (case.folder / "audit.html").read_text()
    words = [text[:30] for text in [*made_up(DOCUMENTS, 0), *made_up(32, 1)]]
    words += [
        json.loads(line)["text"][:30] for file in case.canaries.iterdir() for line in file.read_text().splitlines()
    ]
    assert not [text for text in words if text in page or text in repr(found)]
    assert "Attacks find something of law in the merged model." in page
    assert "no faster than it comes to the anchor" in page


def test_nothing_that_is_shared_says_that_there_are_canaries(case: Case) -> None:
    assert b"canar" not in case.expert.read_bytes()
    assert "canar" not in json.dumps(open_expert(case.expert).manifest.training)
    assert not [item for item in case.merged.iterdir() if b"canar" in item.read_bytes()]
    assert "canar" not in case.expert.with_suffix(".run.json").read_text()


def test_a_finished_run_knows_its_canaries(case: Case) -> None:
    """--resume of it reads the same text again: data and what was planted."""
    again = train_expert(dataclasses.replace(case.asked, resume=True))
    assert again.digest == open_expert(case.expert).digest
    other = dataclasses.replace(case.asked, output=case.folder / "never.st", dry_run=True)
    assert train_expert(other).dry_run
    assert not (case.folder / "never.canaries").exists()


def test_the_expert_alone_and_what_training_held_out(case: Case, anchor: Path) -> None:
    alone = case.audit(bundle=case.expert, name=None, anchor=anchor, held_out=None, planted=case.canaries)
    assert (list(alone.models), alone.name) == (["anchor", "expert"], "law")
    assert alone.others >= 2
    assert alone.members + alone.others == DOCUMENTS
    with pytest.raises(UsageError, match="without law this model is the anchor"):
        case.audit(bundle=case.expert, anchor=anchor, recover=2)


def test_an_expert_that_does_not_say_what_was_held_out(case: Case, anchor: Path) -> None:
    """As one that was trained under a privacy guarantee."""
    silent = forge_expert(case.folder / "silent.st", open_expert(case.expert), training={"steps": 300})
    with pytest.raises(UsageError, match="held_out: the expert does not say which documents training held out"):
        case.audit(bundle=silent, anchor=anchor, held_out=None)
    assert case.audit(bundle=silent, anchor=anchor, documents=4, dry_run=True).members == 4


def test_an_index_finds_spans_of_any_document(case: Case) -> None:
    trace_index(TraceIndexConfig(data=(case.data,), output=case.folder / "law.index"))
    copied = case.audit(index=(case.folder / "law.index",), documents=6).models["merged"].extraction.copied
    assert copied is not None
    assert 0 <= copied.value <= 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": None}, "name: say which of code, law"),
        ({"name": "news"}, "name: 'news' is not in .*, which holds code, law"),
        ({"name": "public"}, "name: 'public' is not in"),
        ({"planted": Path("nowhere")}, "holds no canaries"),
        ({"held_out": Path("nowhere")}, "held_out: nowhere does not exist"),
        ({"data": (Path("nowhere"),)}, "data: nowhere does not exist"),
        ({"max_new_tokens": 5000}, "data: no document has 5004 tokens"),
        ({"documents": 0}, "documents: 0 is not above 0"),
        ({"index": (Path("nowhere"),)}, "no such directory"),
    ],
)
def test_settings_that_are_refused(case: Case, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        case.audit(**settings, dry_run=True)


def test_an_anchor_has_nothing_to_audit(case: Case, anchor: Path) -> None:
    with pytest.raises(UsageError, match="has no closed expert"):
        case.audit(bundle=anchor, name=None)


def test_a_dry_run_says_what_there_is(case: Case) -> None:
    dry = case.audit(dry_run=True, report=case.folder / "never.html")
    assert (dry.models, dry.members, dry.dry_run) == ({}, DOCUMENTS - 2, True)
    assert not (case.folder / "never.html").exists()


def test_others_of_another_kind_show_nothing(case: Case, texts: Texts) -> None:
    """The anchor tells them from members, so that the expert's doing so says nothing of what it was trained on."""
    found = case.audit(held_out=texts.public_test, planted=case.canaries)
    assert found.models["anchor"].found
    assert not found.models["without law"].found
    assert not found.models["merged"].found
    assert found.models["merged"].canaries is not None


def test_of_few_canaries_all_may_have_been_planted(case: Case, tmp_path: Path) -> None:
    copied = shutil.copytree(case.canaries, tmp_path / "some.canaries")
    (copied / "left-out.jsonl").write_text("")
    assert case.audit(planted=copied).models["merged"].found


def test_under_a_guarantee_nothing_was_held_out(case: Case, anchor: Path) -> None:
    claim = PrivacyInfo(
        mechanism="dp-sgd",
        epsilon=8.0,
        delta=1e-3,
        unit="document",
        accountant="pld",
        noise_multiplier=0.7,
        sampling_rate=0.1,
        steps=10,
        max_grad_norm=1.0,
    )
    private = forge_expert(case.folder / "private.st", open_expert(case.expert), privacy=encode(claim))
    with pytest.raises(UsageError, match="held_out: the expert does not say which documents training held out"):
        case.audit(bundle=private, anchor=anchor, held_out=None)
    found = case.audit(bundle=private, anchor=anchor, planted=case.canaries)
    assert (found.members, found.claimed) == (DOCUMENTS, claim)
    assert found.answers is not None
    assert found.answers.at_most is not None
    assert "adjacency is None" in str(found.answers.at_most.refuted)
    assert found.models["expert"].canaries is not None
    assert found.models["expert"].canaries.delta == 1e-3
