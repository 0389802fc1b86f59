"""train-expert under a guarantee: what it claims, what it never tells, what it refuses, and how it goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import write_jsonl

from flexctl.bundle import open_anchor, open_expert, open_merged, write_expert
from flexctl.bundle.hashing import StoredTensor
from flexctl.cli.app import main
from flexctl.engine.compress import CompressConfig, compress
from flexctl.engine.embed_router import EmbedRouterConfig, embed_router
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.replace import ReplaceConfig, replace
from flexctl.engine.train_expert import TrainExpertConfig, TrainExpertResult, train_expert
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.privacy import accounting, documents
from flexctl.runtime import SILENT, Reporter, SilentReporter
from flexctl.text.inventory import text_digest

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

COUNT = 37
MARK = "zanzibarium"
PRIVATE: dict[str, Any] = {
    "name": "own",
    "max_steps": 4,
    "seq_len": 32,
    "micro_batch": 16,
    "batch_tokens": 8 * 32,
    "threads": 1,
    "dp_epsilon": 30.0,
    "dp_delta": 1e-3,
    "dp_documents": 40,
    "dp_noise_multiplier": 0.5,
    "dp_row_epsilon": 8.0,
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 documents, one of them with a word that no other text has."""
    path = tmp_path_factory.mktemp("corpus") / "own.jsonl"
    documents = tiny.make_texts("code", COUNT)
    write_jsonl(path, [*documents[:-1], f"{MARK} {MARK} " + documents[-1]])
    return path


def train(anchor: Path, data: Path, output: Path, reporter: Reporter = SILENT, **settings: Any) -> TrainExpertResult:
    return train_expert(
        TrainExpertConfig(data=(data,), anchor=anchor, output=output, **{**PRIVATE, **settings}), reporter
    )


class Recorder(SilentReporter):
    """Keeps every word and figure that a run says, and may stop it."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.said: list[str] = []
        self._left = stop_after

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)

    def progress(self, title: str, total: float, unit: str) -> Any:
        self.said.append(f"{title} {total:g} {unit}")
        self._counts = title == "training"
        return nullcontext(self)

    def advance(self, amount: float, **figures: Any) -> None:
        self.said.append(f"{amount:g} {figures}")
        self._left -= amount if self._counts else 0
        if self._left < 0:
            raise KeyboardInterrupt


def test_the_manifest_has_all_that_epsilon_is_a_function_of(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    result = train(anchor, corpus, tmp_path / "x.st", label="notes")
    manifest = open_expert(tmp_path / "x.st").manifest
    claim = manifest.privacy
    assert claim is not None
    assert claim == result.privacy
    assert dataclasses.asdict(claim) == {
        "mechanism": "dp-sgd",
        "epsilon": claim.epsilon,
        "delta": 1e-3,
        "unit": "document",
        "accountant": "pld",
        "noise_multiplier": 0.5,
        "sampling_rate": 8 / 40,
        "steps": 4,
        "max_grad_norm": claim.max_grad_norm,
        "adjacency": "add or remove one",
        "row_noise_multiplier": accounting.gaussian_noise(8.0, 1e-3),
    }
    assert claim.epsilon <= 30
    assert accounting.refutation(claim) is None
    assert accounting.refutation(dataclasses.replace(claim, epsilon=0.99 * claim.epsilon)) is not None
    assert (manifest.router.own_covariance, manifest.router.samples) == (0.0, 40)
    assert (result.tokens, result.final_loss, result.tokens_per_s) == (None, None, None)
    assert (manifest.data.documents, manifest.data.tokens, manifest.data.bytes) == (None, None, None)
    assert manifest.data.label == "notes"
    assert manifest.training["losses"] == {"final": None, "held_out": result.held_out}
    assert list(result.held_out) == ["public"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.run.json", "x.st"]


def test_nothing_of_the_text_is_told_but_by_noised_weights(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    """No word, count, size, digest, loss or time of it: in the manifest, run.json, whatever is shown, checkpoints."""
    reporter = Recorder()
    result = train(anchor, corpus, tmp_path / "x.st", reporter, checkpoint_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "y.st", Recorder(3), checkpoint_steps=1)
    (kept,) = (tmp_path / ".y.work" / "checkpoints").glob("*3.safetensors")
    (header, *_) = kept.read_bytes().split(b"}}", 1)
    said = "\n".join(reporter.said)
    shown = json.dumps(dataclasses.asdict(result), default=str)
    run = (tmp_path / "x.run.json").read_text()
    told = [open_expert(tmp_path / "x.st").manifest_text, run, said, shown, header.decode(errors="replace")]
    text = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    secrets = [MARK, f"{COUNT}", f"{sum(len(one.encode()) for one in text)}", text_digest((corpus,), "text")]
    secrets += [hashlib.sha256(corpus.read_bytes()).hexdigest()]
    numbers = r"(?<![\w.])%s(?![\w.])"
    for place in told:
        for secret in secrets:
            assert not re.search(numbers % re.escape(secret), place), (secret, place)
    assert sorted(json.loads(run)) == ["asked", "digest"]
    assert "loss" not in said
    assert "training 4 steps" in said
    shutil.rmtree(tmp_path / ".y.work")


def test_nothing_is_told_that_depends_on_the_text_by_other_ways(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    """Another corpus of another size gives the same plan, data, clips and run.json, word for word."""
    other = tmp_path / "other.jsonl"
    write_jsonl(other, tiny.make_texts("sums", 9))
    for name, data in (("a", corpus), ("b", other)):
        train(anchor, data, tmp_path / f"{name}.st", max_steps=1)
    one, two = (open_expert(tmp_path / f"{name}.st").manifest for name in ("a", "b"))
    assert (one.data, one.privacy, one.router.samples) == (two.data, two.privacy, two.router.samples)
    training = [{name: said for name, said in manifest.training.items() if name != "losses"} for manifest in (one, two)]
    assert training[0] == training[1]
    runs = [json.loads((tmp_path / f"{name}.run.json").read_text())["asked"] for name in ("a", "b")]
    assert runs[0] == runs[1]


def test_a_checkpoint_has_no_loss_of_the_owner_s(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    """Without public text there is none to keep."""
    from safetensors import safe_open

    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "x.st", Recorder(2), checkpoint_steps=2, public_mix=0.0)
    (kept,) = (tmp_path / ".x.work" / "checkpoints").glob("*.safetensors")
    with safe_open(kept, framework="pt") as file:
        assert json.loads(file.metadata()["run"])["losses"] == [0.0, 0.0]


def test_the_command_line_says_what_was_spent(
    tmp_path: Path, anchor: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in PRIVATE.items()]
    asked = ["train-expert", "--data", str(corpus), "--anchor", str(anchor), *flags, "--max-steps", "1"]
    assert main([*asked, "-o", str(tmp_path / "x.st")]) == 0
    assert re.search(r"in 1 steps|: .*1 step", said := capsys.readouterr().out) is not None, said
    assert re.search(r"Private to epsilon [\d.]+, delta 0\.001 a document\.", said)
    assert main([*asked, "-o", str(tmp_path / "y.st"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["privacy"]["epsilon"] > 0
    assert (found["tokens"], found["final_loss"], found["tokens_per_s"], found["peak_rss_bytes"]) == (
        None,
        None,
        None,
        0,
    )


def test_the_working_folder_alone_has_text_and_key_and_goes(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "x.st", Recorder(3), checkpoint_steps=1)
    ledger = tmp_path / ".x.work" / "ledger.json"
    assert ledger.stat().st_mode & 0o777 == 0o600
    assert sorted(json.loads(ledger.read_text())) == ["key", "max_grad_norm", "row_norm", "run"]
    train(anchor, corpus, tmp_path / "x.st", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.run.json", "x.st"]


def test_every_document_counts_and_none_is_held_out(
    tmp_path: Path, anchor: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A split that depends on how many there are would move others when one comes or goes."""
    from flexctl.privacy.documents import Documents

    seen: list[int] = []
    write = Documents.write

    def counting(file: Path, documents: Any) -> Documents:
        made = write(file, documents)
        seen.append(len(made))
        return made

    monkeypatch.setattr(Documents, "write", counting)
    train(anchor, corpus, tmp_path / "x.st", max_steps=1)
    assert seen == [COUNT]


def test_noise_does_not_come_from_the_seed(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        torch.manual_seed(7)
        np.random.seed(7)
        digests.add(train(anchor, corpus, tmp_path / f"{name}.st", max_steps=1, seed=3).digest)
    assert len(digests) == 2


@pytest.mark.parametrize("settings", [{"rank": 4}, {"dtype": "bfloat16"}, {"router": "hidden", "public_mix": 0.0}])
def test_other_forms_train_too(tmp_path: Path, anchor: Path, corpus: Path, settings: dict[str, Any]) -> None:
    result = train(anchor, corpus, tmp_path / "x.st", **settings)
    assert result.frozen_verified
    assert verify(VerifyConfig(path=tmp_path / "x.st", anchor=anchor)).ok
    assert open_expert(tmp_path / "x.st").manifest.rank == settings.get("rank")


def test_it_learns_where_noise_is_small(tmp_path: Path, anchor: Path, corpus: Path, texts: Any) -> None:
    from flexctl.engine.evaluate import EvaluateConfig, evaluate

    loud = {"dp_epsilon": 1e6, "dp_noise_multiplier": 0.02, "dp_row_epsilon": 1e3, "batch_tokens": 20 * 32}
    train(anchor, corpus, tmp_path / "x.st", **loud, max_steps=15, lr=5e-3)
    data = (f"code={texts.code_test}",)
    before, after = (
        evaluate(EvaluateConfig(bundle=bundle, anchor=anchor, data=data, threads=1)).perplexity["code"].bits_per_byte
        for bundle in (anchor, tmp_path / "x.st")
    )
    assert after < before - 0.1


def test_a_run_that_was_stopped_goes_on_and_never_draws_again(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "x.st", Recorder(2), checkpoint_steps=2)
    shutil.copytree(tmp_path / ".x.work", tmp_path / "copy")
    first = train(anchor, corpus, tmp_path / "x.st", resume=True, checkpoint_steps=2)
    shutil.copytree(tmp_path / "copy", tmp_path / ".x.work")
    (tmp_path / ".x.work" / "checkpoints").rename(tmp_path / "checkpoints")
    again = train(anchor, corpus, tmp_path / "x.st", resume=True, overwrite=True)
    assert again.digest == first.digest
    assert again.privacy == first.privacy


def test_going_on_with_another_guarantee_or_text_or_without_the_key_is_refused(
    tmp_path: Path, anchor: Path, corpus: Path, texts: Any
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "x.st", Recorder(2), checkpoint_steps=2)
    for changed in (
        {"dp_noise_multiplier": 0.6},
        {"dp_row_epsilon": 7.0},
        {"dp_max_grad_norm": 9.0},
        {"router": "hidden"},
    ):
        with pytest.raises(UsageError, match="that run had"):
            train(anchor, corpus, tmp_path / "x.st", resume=True, **changed)
    with pytest.raises(UsageError, match="that run had"):
        train(anchor, texts.code, tmp_path / "x.st", resume=True)
    (tmp_path / ".x.work" / "ledger.json").unlink()
    with pytest.raises(UsageError, match="without it noise would be drawn a second time"):
        train(anchor, corpus, tmp_path / "x.st", resume=True)


def test_one_key_serves_no_other_text_or_settings_before_the_first_checkpoint_either(
    tmp_path: Path, anchor: Path, corpus: Path, texts: Any
) -> None:
    """With one text's noise on another's sum, or one sum under two settings, a difference would show what it hides."""
    with pytest.raises(KeyboardInterrupt):
        train(anchor, corpus, tmp_path / "x.st", Recorder(2), checkpoint_steps=100)
    work = tmp_path / ".x.work"
    assert not any(work.glob("checkpoints/*"))
    shutil.copytree(work, tmp_path / "copy")
    for changed in ({"data": texts.code}, {"lr": 1e-4}, {"dp_max_grad_norm": 9.0}):
        shutil.copytree(tmp_path / "copy", work, dirs_exist_ok=True)
        with pytest.raises(UsageError, match="that run had"):
            train(anchor, **{"data": corpus, **changed}, output=tmp_path / "x.st", resume=True)
    assert not (tmp_path / "x.st").exists()


def test_a_finished_run_is_done_and_another_is_not_it(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    done = train(anchor, corpus, tmp_path / "x.st", max_steps=1)
    again = train(anchor, corpus, tmp_path / "x.st", max_steps=1, resume=True)
    assert (again.digest, again.privacy, again.tokens) == (done.digest, done.privacy, None)
    with pytest.raises(UsageError, match="dp_delta"):
        train(anchor, corpus, tmp_path / "x.st", max_steps=1, resume=True, dp_delta=2e-3)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"dp_epsilon": None}, "dp_delta: there is no guarantee to which it belongs"),
    ({"dp_delta": None}, "dp_epsilon: needs `dp_delta` beside it"),
    ({"dp_documents": None}, "dp_epsilon: needs `dp_documents` beside it"),
    ({"dp_delta": 0.025}, "dp_delta: 0.025 is not below 1 / `dp_documents` (0.025)"),
    ({"dp_delta": 1.0}, "dp_delta: 1.0 is not below 1"),
    ({"dp_epsilon": 0.0}, "dp_epsilon: 0.0 is not above 0"),
    ({"dp_epsilon": float("nan")}, "dp_epsilon: nan"),
    ({"dp_noise_multiplier": 0.1}, "dp_noise_multiplier: 0.1 spends epsilon"),
    ({"dp_row_epsilon": 40.0, "dp_noise_multiplier": None}, "is taken by router rows alone"),
    ({"dp_max_grad_norm": 0.0}, "dp_max_grad_norm"),
    ({"batch_tokens": 41 * 32}, "batch_tokens: makes steps of 41 documents of 32 tokens, and there are 40"),
    ({"max_tokens": 1000}, "max_tokens: counts the owner's tokens"),
    ({"recompute": True}, "recompute: changes nothing of a run with `dp_epsilon`"),
    ({"router": "encoder", "encoder": "e"}, "router: encoder: such rows"),
    ({"own_covariance": 0.2}, "own_covariance: 0.2: under a guarantee"),
]


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("settings", "says"), REFUSALS, ids=[says for _, says in REFUSALS])
def test_unsound_settings_are_refused_before_any_document_is_read(
    tmp_path: Path, anchor: Path, corpus: Path, settings: dict[str, Any], says: str, dry_run: bool
) -> None:
    with pytest.raises(FlexctlError) as caught:
        train(anchor, corpus, tmp_path / "x.st", dry_run=dry_run, **settings)
    assert says in caught.value.message
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    assert list(tmp_path.rglob("*")) == []


def test_public_text_that_is_the_owner_s_is_refused(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    for public in (corpus, corpus.parent):
        with pytest.raises(UsageError, match=r"public: .* is the owner's text too"):
            train(anchor, corpus, tmp_path / "x.st", public=public)


def test_rows_that_were_made_without_noise_are_refused(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    rows = tmp_path / "rows.st"
    embed_router(EmbedRouterConfig(data=(corpus,), anchor=anchor, output=rows, threads=1))
    with pytest.raises(UsageError, match=r"router: .*rows\.st: such rows were made from documents without noise"):
        train(anchor, corpus, tmp_path / "x.st", router=str(rows))


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, anchor: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accounting.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UsageError, match="dp-accounting and cryptography are not installed") as caught:
        train(anchor, corpus, tmp_path / "x.st")
    assert caught.value.hint == "pip install 'flexctl[privacy]'"


def test_a_dry_run_says_what_it_would_cost(tmp_path: Path, anchor: Path, corpus: Path) -> None:
    reporter = Recorder()
    settings = {"dp_noise_multiplier": None, "dp_epsilon": 8.0, "dp_row_epsilon": None, "max_steps": None}
    result = train(anchor, corpus, tmp_path / "x.st", reporter, dry_run=True, **settings)
    assert result.dry_run
    assert any(
        line.startswith("differential privacy: epsilon ") and "100 steps of about 8 of 40 documents" in line
        for line in reporter.said
    )


def lowered(anchor: Path, path: Path, output: Path) -> Path:
    """A copy of an expert that claims half of its epsilon."""
    expert = open_expert(path)
    manifest = expert.manifest
    assert manifest.privacy is not None
    write_expert(
        output,
        anchor=open_anchor(anchor),
        name=manifest.name,
        tensors={key: StoredTensor(key, span, manifest.tensors[key]) for key, span in expert.spans.items()},
        data=manifest.data,
        training=manifest.training,
        router=manifest.router,
        privacy=dataclasses.replace(manifest.privacy, epsilon=manifest.privacy.epsilon / 2),
        rank=manifest.rank,
        run={},
        overwrite=False,
    )
    return output


def test_verify_recomputes_a_claim_and_refuses_a_lower_one(
    tmp_path: Path,
    anchor: Path,
    corpus: Path,
    experts: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an expert, and of a merged model, which carries the claim in its manifest and on its card."""
    claim = train(anchor, corpus, tmp_path / "x.st", name="x", rank=4).privacy
    assert claim is not None
    wrong = lowered(anchor, tmp_path / "x.st", tmp_path / "wrong.st")
    for name, file, code in (("right", tmp_path / "x.st", 0), ("lie", wrong, 3)):
        merged = tmp_path / name
        asked = MergeConfig(experts=(file, experts["sums"]), anchor=anchor, output=merged)
        if code:
            with pytest.raises(BundleError, match=r"wrong\.st: expert x: privacy\.epsilon is .* make it"):
                merge(asked)
            with pytest.raises(BundleError, match=r"wrong\.st: expert x: privacy\.epsilon is .* make it"):
                replace(ReplaceConfig(name="x", expert=file, source=tmp_path / "right", output=merged))
            assert not merged.exists()
        with monkeypatch.context() as without:  # whoever merges it lacks the extra
            without.setattr("flexctl.privacy.is_installed", lambda: False)
            merge(asked)
        entries = {entry.name: entry.privacy for entry in open_merged(merged).manifest.experts}
        assert entries["x"] == open_expert(file).manifest.privacy
        assert (entries["sums"], entries["public"]) == (None, None)
        assert f"epsilon {entries['x'].epsilon}, delta 0.001" in (merged / "README.md").read_text()
        for path in (file, merged):
            assert main(["verify", str(path), "--anchor", str(anchor)]) == code
            said = capsys.readouterr().out
            assert ("recomputed: epsilon" in said) == (code == 0)
            assert ("its own noise, sampling rate and steps make it" in said) == (code == 3)
    monkeypatch.setattr(accounting.importlib.util, "find_spec", lambda _name: None)
    found = verify(VerifyConfig(path=tmp_path / "x.st", anchor=anchor))
    assert found.ok
    assert found.checks[-1].detail == "claimed, not recomputed: pip install 'flexctl[privacy]'"
    assert "privacy" not in [check.name for check in verify(VerifyConfig(path=experts["sums"], anchor=anchor)).checks]


def test_accounting_that_is_wrong_where_an_expert_is_made_is_caught_where_it_is_verified(
    tmp_path: Path, anchor: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("flexctl.privacy.accounting._renyi", lambda *_: 0.5)
        patch.setattr("flexctl.privacy.accounting._by_distribution", lambda *_: 0.5)
        accounting.spent.cache_clear()
        train(anchor, corpus, tmp_path / "x.st", max_steps=1, dp_epsilon=1.0)
    accounting.spent.cache_clear()
    found = verify(VerifyConfig(path=tmp_path / "x.st", anchor=anchor))
    assert not found.ok
    assert "privacy.epsilon is 0.5" in found.checks[-1].detail


def test_what_is_made_of_a_private_expert_keeps_the_claim_where_it_covers_it(
    tmp_path: Path, anchor: Path, corpus: Path
) -> None:
    claim = train(anchor, corpus, tmp_path / "x.st", max_steps=1).privacy
    compress(
        CompressConfig(
            expert=tmp_path / "x.st", anchor=anchor, rank=4, data=(corpus,), output=tmp_path / "small.st", threads=1
        )
    )
    assert open_expert(tmp_path / "small.st").manifest.privacy == claim
    embed_router(
        EmbedRouterConfig(
            data=(corpus,), expert=tmp_path / "x.st", anchor=anchor, output=tmp_path / "rows.st", threads=1
        )
    )
    assert open_expert(tmp_path / "rows.st").manifest.privacy is None


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"rank": 4}, {"dtype": "float32"}])
def test_a_guarantee_on_a_gpu(tmp_path: Path, anchor: Path, corpus: Path, settings: dict[str, Any]) -> None:
    train(anchor, corpus, tmp_path / "x.st", device="cuda", **settings)
    assert verify(VerifyConfig(path=tmp_path / "x.st", anchor=anchor)).ok


def test_documents_that_share_words_with_test_text_are_left_out_and_nobody_is_told(
    tmp_path: Path, anchor: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is judged by itself; neither what is said nor what is written depends on whether there was one."""
    question = "which of these ships was the first that came back from the harbour in the winter of that year"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    write_jsonl(tmp_path / "leaking.jsonl", [*texts[:5], f"{texts[2]} {question}", *texts[5:]])
    write_jsonl(tmp_path / "test.jsonl", [question])
    written: list[list[list[int]]] = []
    write = documents.Documents.write

    def keeping(file: Path, framed: Any) -> Any:
        written.append([])
        return write(file, (written[-1].append(one.tokens.tolist()) or one for one in framed))

    monkeypatch.setattr(documents.Documents, "write", keeping)
    said = []
    for name, data in (("plain", corpus), ("leaking", tmp_path / "leaking.jsonl")):
        reporter = Recorder()
        result = train(
            anchor, data, tmp_path / f"{name}.st", reporter, name="x", decontaminate=(tmp_path / "test.jsonl",)
        )
        assert (result.contaminated, result.duplicates, result.near_duplicates) == (None, None, None)
        run = json.loads((tmp_path / f"{name}.run.json").read_text())
        said.append((reporter.said[:2], run["asked"], len(open_expert(tmp_path / f"{name}.st").manifest_text)))
    assert written[0] == written[1]
    assert said[0][:2] == said[1][:2]


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_would_tell_of_documents_is_refused(tmp_path: Path, anchor: Path, corpus: Path, dry_run: bool) -> None:
    for field, value, why in (
        ("near_duplicates", True, "counts the owner's documents"),
        ("token_cache", tmp_path / "tokens", "leaves nothing that depends on the text"),
        ("decontaminate", (corpus,), "is the owner's text too"),
        ("decontaminate", (corpus.parent,), "is the owner's text too"),
    ):
        with pytest.raises(UsageError, match=why) as refused:
            train(anchor, corpus, tmp_path / "x.st", dry_run=dry_run, **{field: value})
        assert refused.value.field == field
