"""The search for settings: what it tries, what it keeps, and how it answers mistakes."""

import json
from dataclasses import replace
from functools import partial

import mnistlab as ml
import pytest
import torch
from mnistlab import many, recipes
from mnistlab import sweep as module
from mnistlab.models import PRESETS
from mnistlab.recipes import RECIPES
from mnistlab.runs import start_ray
from mnistlab.sweep import sweep
from tqdm.auto import tqdm


@pytest.fixture
def quickest(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_worker_niceness", "0")
    recipe = ml.Recipe(model="linear-8k", epochs=1, batch_size=512, lr=0.05)
    monkeypatch.setitem(RECIPES, "linear-8k", recipe)


@pytest.fixture
def cluster(quickest):
    """A Ray of the caller's own, which no sweep may stop."""
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    ray, _ = start_ray()
    yield ray
    ray.shutdown()


def test_every_combination_then_a_range_are_tried_and_kept(cluster, monkeypatch, tmp_path):
    rows = sweep("linear-8k", {"lr": "0.001,0.1", "augment": "none,mild"}, folder=tmp_path)
    tried = {(row["settings"]["lr"], row["settings"]["augment"]) for row in rows}
    assert tried == {(lr, augment) for lr in (0.001, 0.1) for augment in ("none", "mild")}
    accuracies = [row["val_accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True) and len(set(accuracies)) > 1
    best = next(row for row in rows if row["settings"] == {"lr": 0.1, "augment": "none"})
    recipe = recipes.override(RECIPES["linear-8k"], ["lr=0.1"])
    alone = ml.fit("linear-8k", "mnist", recipe, seed=0, progress=False).history[-1]
    assert best["val_accuracy"] == pytest.approx(alone["val_accuracy"], abs=0.002)

    monkeypatch.setattr(module, "tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE=1 does
    more = sweep("linear-8k", {"lr": "0.01..0.5"}, 2, folder=tmp_path)
    assert len(more) == 2 and all(0.01 <= row["settings"]["lr"] <= 0.5 for row in more)
    lines = (tmp_path / "linear-8k.jsonl").read_text().splitlines()
    assert len(lines) == 6 and all("val_accuracy" in json.loads(line) for line in lines)
    first = json.loads(lines[0])
    assert "test" not in first and first["recipe"]["lr"] == first["settings"]["lr"]
    assert first["recipe"]["arguments"] == {"hidden": []}  # all, though the recipe changes none

    # A sweep that was stopped: what is missing is made, the rest is left as it was. A rate that
    # diverges is a try too, the last in the list.
    (tmp_path / "linear-8k.jsonl").write_text("\n".join(lines[:3]) + "\n")
    again = sweep("linear-8k", {"lr": "0.001,0.1,1e30", "augment": "none,mild"}, folder=tmp_path)
    kept = (tmp_path / "linear-8k.jsonl").read_text().splitlines()
    assert kept[:3] == lines[:3] and len(kept) == 6
    assert len(again) == 6 and all(json.loads(line) in again for line in kept)
    assert [row["settings"]["lr"] for row in again[-2:]] == [1e30, 1e30]
    assert [row["val_accuracy"] > 0 for row in again] == [True] * 4 + [False] * 2
    assert cluster.is_initialized()


def test_a_trial_of_another_recipe_is_made_again(quickest, monkeypatch, tmp_path):
    def start():
        raise InterruptedError

    monkeypatch.setattr(module, "start_ray", start)
    row = {"settings": {"lr": 0.1}, "val_accuracy": 0.9, "val_loss": 0.3, "epochs": 1, "seed": 0}
    row["recipe"] = recipes.override(RECIPES["linear-8k"], ["lr=0.1"]).describe()
    (tmp_path / "linear-8k.jsonl").write_text(json.dumps(row) + "\n")
    assert sweep("linear-8k", {"lr": "0.1"}, folder=tmp_path) == [row]

    changed = replace(RECIPES["linear-8k"], weight_decay=0.0)
    monkeypatch.setitem(RECIPES, "linear-8k", changed)
    with pytest.raises(InterruptedError):
        sweep("linear-8k", {"lr": "0.1"}, folder=tmp_path)


def test_where_there_is_a_gpu_the_combinations_are_one_pass(quickest, monkeypatch, tmp_path):
    """Here a CPU stands in for it."""
    passes = []

    def fit_many(data, jobs, **settings):
        passes.append(jobs)
        return many.fit_many(data, jobs, device="cpu", **settings)

    monkeypatch.setattr(module, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(module, "fit_many", fit_many)
    monkeypatch.setattr(module, "start_ray", lambda: pytest.fail("it started"))
    over = {"lr": "0.1,1e30", "augment": "none,mild"}
    rows = sweep("linear-8k", over, seed=3, folder=tmp_path)
    (jobs,) = passes
    assert [seed for _, seed in jobs] == [3] * 4
    assert [row["recipe"] for row in rows[:2]] != [row["recipe"] for row in rows[2:]]
    alone = ml.fit("linear-8k", "mnist", jobs[0][0], seed=3, device="cpu", progress=False)
    best = next(row for row in rows if row["settings"] == {"lr": 0.1, "augment": "none"})
    assert best["val_accuracy"] == alone.history[-1]["val_accuracy"]
    assert [row["val_accuracy"] > 0 for row in rows] == [True, True, False, False]
    kept = (tmp_path / "linear-8k.jsonl").read_text()
    assert sweep("linear-8k", over, seed=3, folder=tmp_path) == rows and len(passes) == 1
    assert (tmp_path / "linear-8k.jsonl").read_text() == kept


def test_a_ray_that_does_not_start_is_said_in_one_line(quickest, monkeypatch, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `cluster` is not installed")

    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ConnectionError, match="Ray did not start: The current node timed out"):
        sweep("linear-8k", {"lr": "0.1"}, folder=tmp_path)


def test_values_of_tuples_are_told_apart():
    assert module._values("arguments.widths", "(8,8),(6,6,6)") == ["(8,8)", "(6,6,6)"]
    recipe = recipes.override(RECIPES["cnn-8k"], ["arguments.widths=(6,6,6)"])
    assert recipe.arguments == {"widths": (6, 6, 6)}


@pytest.mark.parametrize(
    ("over", "trials", "said"),
    [
        ({}, None, "nothing to search"),
        ({"lr": "0.01..0.1"}, None, "lr is a range: say how many trials"),
        ({"lr": "0.1..0.01"}, 3, "a range runs from above 0 upwards"),
        ({"lr": "a..b"}, 3, "write a range as low..high"),
        ({"augment": "wild"}, None, "one of none, mild"),
        ({"augment": "none,wild"}, None, "one of none, mild"),
        ({"arguments.hiddne": "3,4"}, None, "linear-8k takes no 'hiddne'"),
    ],
)
def test_a_mistake_is_answered_before_anything_runs(quickest, monkeypatch, over, trials, said):
    monkeypatch.setattr(module, "start_ray", lambda: pytest.fail("it started"))
    with pytest.raises(ValueError, match=said):
        sweep("linear-8k", over, trials)


# Of shape and recipe, or of tries that are no six: its name, and the recipe that it chose.
SEARCHED = {
    "shared-1k": "shared-1k",
    "shared-2k": "shared-2k-taught",
    "shared-8k": "shared-8k-taught",
    "cnn-10k-3bit": "cnn-10k-3bit",
    "fullcnn-4k": "fullcnn-4k-taught",
    "fullcnn-99k": "fullcnn-99k",
    "vit-68k-mild": "vit-68k-mild",
}


def test_each_tuned_recipe_is_the_best_of_its_tries_and_all_had_as_many():
    names = {path.stem for path in module.SWEEPS.glob("*.jsonl")} - SEARCHED.keys()
    assert names
    for name in names:
        rows = [json.loads(line) for line in (module.SWEEPS / f"{name}.jsonl").open()]
        assert len(rows) == 6 and len({row["epochs"] for row in rows}) == 1
        if name in ("cnn-1k", "cnn-4k"):  # one rate for all arms of chapter 10
            rows = [row for row in rows if row["settings"]["augment"] == "none"]
        best = max(rows, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
        settings = [f"{k}={v}" for k, v in best["settings"].items() if k != "epochs"]
        assert recipes.override(RECIPES[name], settings) == RECIPES[name]


@pytest.mark.parametrize("name", SEARCHED)
def test_a_searched_net_is_the_best_of_each_stage_of_its_search(name):
    """A stage has its number of epochs; the best of the last one gave the recipe too. Tries that
    are longer than the recipe came after it, and changed nothing."""
    chosen = RECIPES[SEARCHED[name]]
    rows = [json.loads(line) for line in (module.SWEEPS / f"{name}.jsonl").open()]
    rows = [row for row in rows if row["epochs"] <= chosen.epochs]
    for epochs in sorted({row["epochs"] for row in rows}):
        tried = [row for row in rows if row["epochs"] == epochs]
        best = max(tried, key=lambda row: (row["val_accuracy"], -row["val_loss"]))["recipe"]
        assert best["model"] == chosen.model
        assert best["arguments"] == json.loads(json.dumps(PRESETS[chosen.model].arguments))
    differs = {field for field, value in chosen.describe().items() if value != best[field]}
    assert differs - {"epochs"} == {"arguments"}
