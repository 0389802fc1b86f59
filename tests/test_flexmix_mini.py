"""The comparison of examples/flexmix_mini: its table, its skipping of what is done, and, slowly, the whole of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import flexctl

FOLDER = Path(__file__).parent.parent / "examples" / "flexmix_mini"
MODULES = ("budgets", "recipes", "work", "table", "stages", "scoring", "run")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Give a function that imports a module of the example."""
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module
    for name in MODULES:
        sys.modules.pop(name, None)


def scored(bits: float, documents: int = 20, seed: int = 0) -> list[list[float]]:
    """Documents of 100 bytes and about that many bits per byte, which add up to it exactly."""
    noise = np.random.default_rng(seed).normal(0, 0.1, documents)
    return [[float(b * math.log(2) * 100), 50.0, 100.0] for b in bits + noise - noise.mean()]


def write_scores(root: Path, found: dict[str, dict[str, float]], seed: int = 0) -> None:
    for name, domains in found.items():
        path = root / "scores" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({domain: scored(bits, seed=seed) for domain, bits in domains.items()}))


FOUND = {
    "anchor": {"public": 2.0, "code": 4.0, "math": 3.0},
    "pairs/discriminant": {"code": 3.0, "math": 2.5},
    "pairs/no-pair": {"code": 3.5, "math": 2.5},
    "variants/flexctl": {"public": 2.1, "code": 3.1, "math": 2.8},
    "variants/no pair training": {"public": 2.1, "code": 3.5, "math": 2.5},
}


def test_table_of_known_scores(tmp_path: Path, example: Any) -> None:
    table = example("table")
    write_scores(tmp_path / "seed-0", FOUND)
    rows = {row.name: row for row in table.rows_of([table.read_scores(tmp_path / "seed-0")], {"flexctl": 3e12})}
    assert list(rows) == ["anchor", "own pair", "flexctl", "no pair training"]
    assert rows["flexctl"].bits_per_byte == pytest.approx({"public": 2.1, "code": 3.1, "math": 2.8})
    assert rows["flexctl"].average == pytest.approx(2.95)
    assert rows["flexctl"].gains == pytest.approx({"code": 0.9, "math": 0.4})
    assert rows["flexctl"].retained == pytest.approx((3.5 - 2.95) / (3.5 - 2.75))
    assert rows["own pair"].retained == pytest.approx(1.0)
    assert rows["no pair training"].retained == pytest.approx(1.0)
    assert rows["anchor"].retained == pytest.approx(0.0)
    low, high = rows["flexctl"].interval
    assert low < 2.95 < high
    assert high - low < 0.1
    # The documents' noise is the same in every model, so paired figures do not vary.
    assert rows["flexctl"].retained_interval == pytest.approx((0.55 / 0.75, 0.55 / 0.75))
    assert rows["anchor"].margin == pytest.approx((2.0 + 4.0 + 3.0 - 2.1 - 3.1 - 2.8) / 3)
    table.write_results(tmp_path, list(rows.values()), [], {"budget": "none"})
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| flexctl | 2.100 | 3.100 | 2.800 | 2.667 | 2.950 |" in text
    assert "| 0.73 | 0.73 to 0.73 | +0.000 | 0.000 to 0.000 | 3 |" in text
    assert "| left out |" not in text
    assert json.loads((tmp_path / "results.json").read_text())["rows"][2]["retained"] == pytest.approx(0.55 / 0.75)


def test_seeds_are_averaged_and_their_spread_is_told(tmp_path: Path, example: Any) -> None:
    table = example("table")
    better = {name: {domain: bits - 0.2 for domain, bits in by.items()} for name, by in FOUND.items()}
    for seed, found in enumerate((FOUND, better)):
        write_scores(tmp_path / f"seed-{seed}", found)
    rows = table.rows_of([table.read_scores(tmp_path / f"seed-{seed}") for seed in range(2)], {})
    assert rows[0].average == pytest.approx(3.4)
    assert rows[0].spread == pytest.approx(np.std([3.5, 3.3], ddof=1))


def test_rows_that_one_seed_has_are_held_against_that_seed(tmp_path: Path, example: Any) -> None:
    table = example("table")
    write_scores(tmp_path / "seed-0", FOUND)
    main = {name: by for name, by in FOUND.items() if "pair training" not in name and "no-pair" not in name}
    better = {name: {domain: bits - 0.2 for domain, bits in by.items()} for name, by in main.items()}
    write_scores(tmp_path / "seed-1", better)
    rows = {row.name: row for row in table.rows_of([table.read_scores(tmp_path / f"seed-{i}") for i in range(2)], {})}
    assert (rows["flexctl"].seeds, rows["no pair training"].seeds) == (2, 1)
    assert rows["flexctl"].average == pytest.approx(2.85)
    assert rows["no pair training"].retained == pytest.approx(1.0)
    assert rows["no pair training"].margin == pytest.approx((2.1 + 3.5 + 2.5 - 2.1 - 3.1 - 2.8) / 3)


def test_removal_is_held_against_the_anchor(tmp_path: Path, example: Any) -> None:
    table = example("table")
    write_scores(tmp_path, FOUND)
    without = {"public": 2.05, "code": 3.9, "math": 2.8}
    path = tmp_path / "scores" / "removal" / "flexctl.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"code": {domain: scored(bits) for domain, bits in without.items()}}))
    (removed,) = table.read_removals(tmp_path)
    assert (removed.name, removed.worst) == ("code", "public")
    assert (removed.anchor, removed.merged, removed.without) == pytest.approx((4.0, 3.1, 3.9))
    assert removed.others == pytest.approx({"public": 0.05, "math": -0.2})
    table.write_results(tmp_path, table.rows_of([table.read_scores(tmp_path)], {}), [removed], {})
    line = "| flexctl | code | 4.000 | 3.100 | 3.900 | public | +0.050 |"
    assert line in (tmp_path / "RESULTS.md").read_text()


def test_baselines_have_a_row_each_and_the_own_dense_expert_is_put_together(tmp_path: Path, example: Any) -> None:
    table = example("table")
    write_scores(tmp_path, FOUND)
    dense = {"code": {"code": 2.9, "math": 3.2}, "math": {"code": 4.1, "math": 2.4}}
    found = {"public only": FOUND["anchor"], "soup": {"public": 2.0, "code": 3.6, "math": 2.7}}
    found |= {f"dense {name}": {"public": 2.4, **bits} for name, bits in dense.items()}
    listed = {name: {domain: scored(bits) for domain, bits in by.items()} for name, by in found.items()}
    (tmp_path / "scores" / "baselines.json").write_text(json.dumps(listed))
    rows = {row.name: row for row in table.rows_of([table.read_scores(tmp_path)], {})}
    assert list(rows)[:4] == ["anchor", "own pair", "flexctl", "own dense expert"]
    assert "public only" not in rows
    assert rows["own dense expert"].bits_per_byte == pytest.approx({"public": 2.0, "code": 2.9, "math": 2.4})
    assert rows["soup"].retained == pytest.approx((3.5 - 3.15) / (3.5 - 2.75))


def test_a_set_whose_pair_gained_nothing_has_no_retained_gain(tmp_path: Path, example: Any) -> None:
    table = example("table")
    write_scores(tmp_path, {**FOUND, "pairs/discriminant": {"code": 4.0, "math": 3.5}})
    rows = {row.name: row for row in table.rows_of([table.read_scores(tmp_path)], {})}
    assert rows["flexctl"].gains == {"code": None, "math": None}
    assert rows["flexctl"].retained is None


def test_what_is_there_is_skipped_and_what_failed_is_not(
    tmp_path: Path, example: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    work, budgets = example("work"), example("budgets")
    run = work.Work(root=tmp_path, budget=budgets.BUDGETS["smoke"])
    made: list[int] = []

    def make() -> None:
        made.append(1)
        work.write_json(tmp_path / "scores" / "a.json", {"a": 1})

    def fail() -> None:
        with work.whole(tmp_path / "folder") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    for _ in range(2):
        run.stage(tmp_path / "scores" / "a.json", make)
    assert made == [1]
    assert capsys.readouterr().out.splitlines()[1] == "scores/a.json: there"
    with pytest.raises(KeyboardInterrupt):
        run.stage(tmp_path / "folder", fail)
    assert not (tmp_path / "folder").exists()
    work.hold_settings(tmp_path, {"seed": 0, "sizes": (1, 2)})
    work.hold_settings(tmp_path, {"seed": 0, "sizes": (1, 2)})
    with pytest.raises(SystemExit, match="was begun with other settings"):
        work.hold_settings(tmp_path, {"seed": 1, "sizes": (1, 2)})


def write_sets(root: Path) -> Path:
    """Three sets of made-up text under the names that the smoke budget asks for, and one that it leaves out."""
    for name, kind in (("public", "public"), ("code", "code"), ("math", "sums"), ("other", "sums")):
        (root / name).mkdir(parents=True)
        for part, count, seed in (("train", 60, 0), ("test", 8, 1)):
            texts = tiny.make_texts(kind, count, seed)
            (root / name / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return root


def test_sets_are_cut_to_the_budget(tmp_path: Path, example: Any) -> None:
    work, budgets = example("work"), example("budgets")
    data = write_sets(tmp_path / "data")
    run = work.Work(root=tmp_path / "run", budget=budgets.BUDGETS["smoke"])
    work.prepare_data(data, run)
    assert run.names == ["code", "math"]
    cut = run.test("code").read_bytes()
    assert (data / "code" / "test.jsonl").read_bytes().startswith(cut)
    assert len(cut.splitlines()) >= 2
    assert len(cut) <= budgets.BUDGETS["smoke"].test_bytes
    with pytest.raises(SystemExit, match="is missing"):
        work.prepare_data(tmp_path, run)


def test_sets_are_cut_and_test_documents_shortened_at_whole_characters(tmp_path: Path, example: Any) -> None:
    texts = ["é" * 40, "b" * 50, "c" * 20, "d" * 500]
    lines = [json.dumps({"text": text, "source": "made"}) + "\n" for text in texts]
    for part in ("train", "test"):
        (tmp_path / "source" / "public").mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / "public" / f"{part}.jsonl").write_text("".join(lines))
    budgets, work = example("budgets"), example("work")
    small = dataclasses.replace(
        budgets.BUDGETS["smoke"], domains=("public",), public_bytes=650, test_bytes=140, document_bytes=31
    )
    run = work.Work(root=tmp_path / "run", budget=small)
    work.prepare_data(tmp_path / "source", run)
    assert run.train("public").read_text() == "".join(lines[:3])
    kept = [json.loads(line)["text"] for line in run.test("public").read_text().splitlines()]
    assert kept == ["é" * 15, "b" * 31]


def test_every_variant_has_a_recipe_and_a_name_of_its_own(example: Any) -> None:
    recipes = example("recipes")
    names = [variant.name for variant in recipes.VARIANTS]
    assert len(set(names)) == len(names)
    known = {recipe.name for recipe in recipes.RECIPES}
    assert {variant.recipe for variant in recipes.VARIANTS} == known
    assert set(recipes.MAIN_RECIPES) <= known
    assert set(recipes.MAIN_VARIANTS) <= set(names)
    for budget in example("budgets").BUDGETS.values():
        assert set(budget.recipes or ()) <= known
        assert set(budget.variants or ()) <= set(names)


def test_seeds_run_apart_and_seed_0_alone_tries_everything(
    tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example("run")
    tried: list[int] = []

    def run_main(work: Any, _data: Path) -> None:
        main = {name: by for name, by in FOUND.items() if "no-pair" not in name and "no pair" not in name}
        write_scores(work.root, main, seed=work.seed)

    def run_everything(work: Any) -> None:
        tried.append(work.seed)
        write_scores(work.root, FOUND)

    monkeypatch.setattr(run, "run_main", run_main)
    monkeypatch.setattr(run, "run_everything", run_everything)
    monkeypatch.setattr(run, "training_cost", lambda _work: {})

    def seeds_of_rows(*seeds: str) -> dict[str, int]:
        settings = ["--data", "none", "--budget", "smoke", "--output", str(tmp_path), "--seeds", *seeds]
        monkeypatch.setattr(sys, "argv", ["run.py", *settings])
        run.main()
        return {row["name"]: row["seeds"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]}

    assert seeds_of_rows("1") == {"anchor": 1, "own pair": 1, "flexctl": 1}
    assert tried == []
    assert seeds_of_rows("0")["no pair training"] == 1
    assert seeds_of_rows("0", "1") == {"anchor": 2, "own pair": 2, "flexctl": 2, "no pair training": 1}
    assert tried == [0, 0]


def test_tuning_that_gains_nothing_is_told_and_anything_else_stops(
    tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, work, budgets = example("stages"), example("work"), example("budgets")
    (tmp_path / "data" / "public").mkdir(parents=True)
    run = work.Work(root=tmp_path, budget=budgets.BUDGETS["smoke"])

    def failing(error: Exception) -> None:
        def tune_router(_: Any) -> None:
            raise error

        monkeypatch.setattr(stages.flexctl, "tune_router", tune_router)
        stages.tune(run, tmp_path / "merged")

    failing(flexctl.FlexctlError("no better"))
    assert "merged: stays as it is: no better" in capsys.readouterr().out
    with pytest.raises(flexctl.BundleError, match="of another anchor"):
        failing(flexctl.BundleError("made of another anchor"))


@pytest.mark.slow
def test_the_whole_of_it(tmp_path: Path) -> None:
    data = write_sets(tmp_path / "data")
    arguments = ["--data", str(data), "--budget", "smoke", "--output", str(tmp_path / "out")]

    def run() -> str:
        done = subprocess.run(
            [sys.executable, str(FOLDER / "run.py"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run()
    rows = {row["name"]: row for row in json.loads((tmp_path / "out" / "results.json").read_text())["rows"]}
    baselines = {"soup", "weighted soup", "btm", "btm oracle", "btx", "prompt routing", "perplexity routing", "ties"}
    assert {"anchor", "own pair", "flexctl", "no bias", "no pair training", "unrestricted-2x", *baselines} <= set(rows)
    assert all(math.isfinite(bits) for row in rows.values() for bits in row["bits_per_byte"].values())
    assert rows["own pair"]["average"] < rows["anchor"]["average"]
    assert rows["flexctl"]["average"] < rows["anchor"]["average"]
    assert rows["unrestricted-2x"]["training"] == pytest.approx(2 * rows["unrestricted"]["training"])
    *stages, last = run().splitlines()
    assert all(line.endswith(": there") for line in stages)
    assert last.endswith("are written")
