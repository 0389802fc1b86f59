"""tune-router: only rows change, the owners' stay beside them, and every change of the set goes back to those."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import apart
import pytest
import tiny
import torch
from builders import read_directory
from conftest import write_jsonl

from flexctl.bundle import open_merged
from flexctl.bundle.proxy import open_proxy, write_proxy
from flexctl.engine.inspect import InspectConfig, inspect
from flexctl.engine.merge import MergeConfig, merge
from flexctl.engine.remove import RemoveConfig, remove
from flexctl.engine.select_proxy import SelectProxyConfig, select_proxy
from flexctl.engine.tune_router import TuneRouterConfig, TuneRouterResult, tune_router
from flexctl.engine.verify import VerifyConfig, verify
from flexctl.errors import BundleError, FlexctlError, UsageError
from flexctl.model.building import build_model, stock_problems
from flexctl.model.tensors import to_torch
from flexctl.training import tuning

pytestmark = pytest.mark.usefixtures("one_thread", "in_empty_folder")

SMALL = {"max_steps": 10, "seq_len": 32, "batch_tokens": 192, "lr": 0.2, "tether": 0.01, "threads": 1}
CHANGED = {"README.md", "flexctl.json", "model-router.safetensors", "router-untuned.safetensors", "run.json"}


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crawl") / "crawl.jsonl"
    write_jsonl(path, [text for kind in ("public", "code", "sums") for text in tiny.make_texts(kind, 24, seed=7)])
    return path


@pytest.fixture(scope="module")
def proxies(tmp_path_factory: pytest.TempPathFactory, anchor: Path, texts: Any, crawl: Path) -> tuple[Path, ...]:
    """Lists of "code" and "sums", of 24 documents each."""
    root = tmp_path_factory.mktemp("proxies")
    for name in ("code", "sums"):
        config = SelectProxyConfig(
            data=(getattr(texts, name),), anchor=anchor, public=crawl, count=24, output=root / name, threads=1
        )
        select_proxy(config)
    return root / "code", root / "sums"


def tune(anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path, **settings: Any) -> TuneRouterResult:
    return tune_router(
        TuneRouterConfig(merged=merged, proxy=proxies, anchor=anchor, public=crawl, **{**SMALL, **settings})
    )


@pytest.fixture(scope="module")
def tuned(
    tmp_path_factory: pytest.TempPathFactory, anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path
) -> TuneRouterResult:
    return tune(anchor, merged, proxies, crawl, output=tmp_path_factory.mktemp("tuned") / "tuned")


def test_only_the_router_changes_and_the_owners_rows_stay(tuned: TuneRouterResult, merged: Path) -> None:
    before, after = read_directory(merged), read_directory(tuned.path)
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == CHANGED
    assert after["router-untuned.safetensors"] == before["model-router.safetensors"]
    opened = open_merged(tuned.path)
    assert (opened.digest, opened.manifest.router.tuned_with) == (tuned.digest, ("code", "sums"))
    assert tuned.tuned_with == ("code", "sums")
    assert (tuned.documents, tuned.steps, tuned.tokens) == ({"code": 24, "sums": 24}, 10, 10 * 192)
    old, new = open_merged(merged).weights().router, opened.weights().router
    for mine, theirs in zip(new, old, strict=True):
        assert not to_torch(mine)[0].any()
        assert not torch.equal(to_torch(mine)[1:], to_torch(theirs)[1:])
    assert [span.load() for span in opened.untuned_router()] == [bytes(rows.data) for rows in old]
    assert list(inspect(InspectConfig(path=tuned.path)).manifest["router"]["tuned_with"]) == ["code", "sums"]


def test_held_out_loss_is_better_on_the_whole(tuned: TuneRouterResult) -> None:
    assert set(tuned.held_out) == {"code", "sums", "public"}
    gains = [losses["before"] - losses["after"] for losses in tuned.held_out.values()]
    assert sum(gains) > 0


def test_every_change_of_the_set_goes_back_to_the_owners_rows(
    tmp_path: Path, tuned: TuneRouterResult, anchor: Path, merged: Path, experts: dict[str, Path]
) -> None:
    """Law 2 and adding, from a tuned model."""
    remove(RemoveConfig(names=("code",), source=tuned.path, output=tmp_path / "removed"))
    merge(MergeConfig(experts=(experts["sums"],), anchor=anchor, output=tmp_path / "alone"))
    assert read_directory(tmp_path / "removed") == read_directory(tmp_path / "alone")
    merge(MergeConfig(experts=(tuned.path,), output=tmp_path / "same"))
    assert read_directory(tmp_path / "same") == read_directory(merged)
    assert verify(VerifyConfig(path=tmp_path / "removed", absent=("code",), anchor=anchor)).ok


def test_adding_to_a_tuned_model_is_merging_all(
    tmp_path: Path, anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path, experts: dict[str, Path]
) -> None:
    remove(RemoveConfig(names=("sums",), source=merged, output=tmp_path / "code"))
    tune(anchor, tmp_path / "code", proxies[:1], crawl, overwrite=True)
    assert open_merged(tmp_path / "code").manifest.router.tuned_with == ("code",)
    merge(MergeConfig(experts=(tmp_path / "code", experts["sums"]), output=tmp_path / "both"))
    assert read_directory(tmp_path / "both") == read_directory(merged)


def test_verify_holds_every_byte_of_both_routers(tmp_path: Path, tuned: TuneRouterResult, anchor: Path) -> None:
    assert verify(VerifyConfig(path=tuned.path, anchor=anchor)).ok
    assert not verify(VerifyConfig(path=tuned.path, absent=("code",), anchor=anchor)).ok
    for name in ("model-router.safetensors", "router-untuned.safetensors"):
        broken = shutil.copytree(tuned.path, tmp_path / name)
        data = bytearray((broken / name).read_bytes())
        data[-5] ^= 1
        (broken / name).write_bytes(data)
        problems = [check.detail for check in verify(VerifyConfig(path=broken)).checks if not check.ok]
        assert any(name in problem for problem in problems), problems


def test_stock_transformers_and_masking_agree_with_it(tuned: TuneRouterResult) -> None:
    """Law 9."""
    import transformers

    assert stock_problems(tuned.path) == []
    stock = transformers.AutoModelForCausalLM.from_pretrained(tuned.path, dtype=torch.float32).eval()
    model = build_model(open_merged(tuned.path).weights(), device=torch.device("cpu"), dtype=torch.float32)
    tokens = tiny.some_tokens()
    with torch.no_grad():
        assert (stock(tokens).logits - model(tokens).logits).abs().max() < 1e-4


def test_tuning_again_starts_from_the_owners_rows(
    tmp_path: Path, tuned: TuneRouterResult, anchor: Path, proxies: tuple[Path, ...], crawl: Path
) -> None:
    """Law 5 too: the same lists and settings give the same bytes."""
    again = tune(anchor, tuned.path, proxies[::-1], crawl, output=tmp_path / "again")
    assert again.held_out == tuned.held_out
    assert read_directory(again.path) == read_directory(tuned.path)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


KILLED = """
import os, signal, sys
from pathlib import Path
from flexctl.engine.tune_router import TuneRouterConfig, tune_router
from flexctl.training import checkpoints

is_due = checkpoints.Checkpoints.is_due

def killing(self, step, steps):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return is_due(self, step, steps)

checkpoints.Checkpoints.is_due = killing
merged, anchor, crawl, *proxies = map(Path, sys.argv[1:])
tune_router(TuneRouterConfig(
    merged=merged, proxy=tuple(proxies), anchor=anchor, public=crawl, overwrite=True, checkpoint_steps=2, **SETTINGS
))
"""


def test_killed_leaves_the_old_model_and_resumes_to_the_same_bytes(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tuned: TuneRouterResult,
    anchor: Path,
    merged: Path,
    proxies: tuple[Path, ...],
    crawl: Path,
) -> None:
    """Laws 6 and 7."""
    place = shutil.copytree(merged, tmp_path / "merged")
    said = tmp_path_factory.mktemp("said") / "said"
    apart.killed(KILLED.replace("SETTINGS", repr(SMALL)), place, anchor, crawl, *proxies, said=said)
    assert read_directory(place) == read_directory(merged)
    work = tmp_path / ".merged.tuning" / "checkpoints"
    assert [path.name[-15:-12] for path in sorted(work.iterdir())] == ["002", "004"]
    with pytest.raises(UsageError, match="that run had tether"):
        tune(anchor, place, proxies, crawl, overwrite=True, resume=True, checkpoint_steps=2, tether=3.0)
    tune(anchor, place, proxies, crawl, overwrite=True, resume=True, checkpoint_steps=2)
    assert read_directory(place) == read_directory(tuned.path)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_router_that_is_no_better_is_not_written(
    tmp_path: Path, anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def worse(self: Any) -> torch.Tensor:
        """Push the rows of code off their own text, whatever the loss says."""
        moved: torch.Tensor = sum((row @ row.detach().sum(dim=0)).sum() for row in self._rows)
        return 1e4 * moved

    monkeypatch.setattr(tuning.RouterTuning, "penalty", worse)
    with pytest.raises(FlexctlError, match=r"no better on held-out text \(\+.* nothing was written") as caught:
        tune(anchor, merged, proxies, crawl, output=tmp_path / "x", lr=1.0)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_checks_and_writes_nothing(
    tmp_path: Path, anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path
) -> None:
    result = tune(anchor, merged, proxies, crawl, output=tmp_path / "x", dry_run=True)
    assert (result.digest, result.documents, list(tmp_path.iterdir())) == (None, {"code": 24, "sums": 24}, [])


def test_wrong_lists_and_settings_are_refused_in_one_line(
    tmp_path: Path, anchor: Path, merged: Path, proxies: tuple[Path, ...], crawl: Path, experts: dict[str, Path]
) -> None:
    code, sums = proxies
    proxy = open_proxy(code)
    other = Path(tmp_path / "other")
    settings = {"public": proxy.public, "encoder": None, "overwrite": True}
    documents = proxy.documents

    def forge(**changes: Any) -> Path:
        fields = {"name": "code", "anchor": proxy.anchor, "documents": documents, **settings, **changes}
        write_proxy(other, **fields)
        return other

    merge(MergeConfig(anchor=anchor, output=tmp_path / "bare"))
    kept = {"bare", "other"}
    wrong_anchor = type(proxy.anchor)(digest="sha256:" + "0" * 64, model_type="olmo2", name="x")
    refusals: list[tuple[type[FlexctlError], dict[str, Any], str]] = [
        (UsageError, {"proxies": (code,)}, "proxy: none for sums; every closed expert needs one"),
        (BundleError, {"proxies": (code, code, sums)}, "and so is that of"),
        (BundleError, {"proxies": (forge(name="law"), sums)}, "name is 'law'"),
        (BundleError, {"crawl": None}, "made from another public text"),
        (UsageError, {"merged": tmp_path / "bare"}, "has no closed expert"),
        (UsageError, {"output": tmp_path / "bare", "overwrite": False}, "exists already"),
        (UsageError, {"seq_len": 100_000}, "do not fill one sequence"),
        (UsageError, {"tether": -1.0}, "tether"),
        (UsageError, {"max_tokens": 0}, "max_tokens"),
        (BundleError, {"proxies": (experts["code"], sums)}, "code.st"),
    ]
    for kind, changes, says in refusals:
        arguments = {"merged": merged, "proxies": proxies, "crawl": crawl, "output": tmp_path / "x", **changes}
        with pytest.raises(kind) as caught:
            tune(anchor, **arguments)
        assert says in caught.value.message
        assert "\n" not in caught.value.message
        assert {path.name for path in tmp_path.iterdir()} == kept
    for changes, says in (
        ({"anchor": wrong_anchor}, "anchor.digest"),
        ({"documents": documents[:1]}, "expected at least 2"),
    ):
        with pytest.raises(BundleError, match=says):
            tune(anchor, merged, (forge(**changes), sums), crawl, output=tmp_path / "x")
