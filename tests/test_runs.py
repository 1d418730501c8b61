"""The run engine: records over seeds, resumed, checked, and never mixed."""

import json
import os
import signal
import subprocess
import sys
import time

import mnistlab as ml
import pytest
from mnistlab import recipes, runs
from mnistlab.recipes import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of the quickest recipe, recorded."""
    path = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNISTLAB_DATA", str(path / "cache"))
        patch.setitem(RECIPES, "linear-8k", QUICKEST)
        runs.train_seeds("linear-8k", 2, folder=path)
    return path


QUICKEST = ml.Recipe(model="linear-8k", epochs=1, batch_size=512, lr=0.05)


@pytest.fixture
def quickest(monkeypatch):
    monkeypatch.setitem(RECIPES, "linear-8k", QUICKEST)


def test_a_record_holds_what_the_protocol_asks(folder, quickest):
    known = runs.results("linear-8k", folder)
    first = known.records[0]
    assert {
        "recipe",
        "seed",
        "params",
        "macs",
        "val",
        "test",
        "seconds",
        "images_per_second",
    } <= set(first)
    assert {"device", "threads", "machine", "versions", "commit", "date", "history"} <= set(first)
    assert first["recipe"] == json.loads(json.dumps(QUICKEST.describe()))
    assert first["params"] == 7_850 and first["threads"] == 1
    assert first["test"]["n"] == 10_000 and len(first["history"]) == 1
    assert first["val"]["correct"] == round(5_000 * first["history"][-1]["val_accuracy"])


def test_results_are_the_summary_of_the_test_accuracies(folder, quickest):
    known = runs.results("linear-8k", folder)
    counts = [record["test"]["correct"] for record in known.records]
    assert known.seeds == [0, 1] and known.n == 2 and counts[0] != counts[1]
    assert known.mean == pytest.approx(sum(counts) / 20_000)
    assert known.interval[0] < known.mean < known.interval[1]


def test_seeds_that_are_recorded_are_left_alone(folder, quickest, monkeypatch):
    before = (folder / "linear-8k.jsonl").read_bytes()
    monkeypatch.setattr(runs, "run_seed", None)  # would fail if called
    assert runs.train_seeds("linear-8k", 2, folder=folder).n == 2
    assert (folder / "linear-8k.jsonl").read_bytes() == before


def test_a_seed_trained_again_is_the_same_to_the_last_image(folder, quickest):
    lines = list(runs.check("linear-8k", folder))
    assert lines[-1] == "the same, to the last image"


def test_a_record_that_another_recipe_made_is_stale_and_named(folder, monkeypatch):
    monkeypatch.setitem(RECIPES, "linear-8k", ml.Recipe(model="linear-8k", epochs=1, lr=0.07))
    for call in (runs.results, lambda name, folder: runs.train_seeds(name, 3, folder=folder)):
        with pytest.raises(ValueError, match="stale: the recipe has another batch_size, lr now"):
            call("linear-8k", folder)


def test_a_field_younger_than_a_record_had_its_default():
    record = {"recipe": ml.Recipe(lr=0.3).describe()}
    del record["recipe"]["ema"]
    assert runs.stale([record], ml.Recipe(lr=0.3)) == []
    assert runs.stale([record], ml.Recipe(lr=0.3, ema=0.9)) == ["ema"]


def test_no_records_and_damaged_records_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="no records of 'cnn-8k'; make them"):
        runs.results("cnn-8k", tmp_path)
    (tmp_path / "cnn-8k.jsonl").write_text('{"seed": 0}\n{"see')
    with pytest.raises(ValueError, match=r"cnn-8k.jsonl, line 2, is damaged"):
        runs.results("cnn-8k", tmp_path)


def test_unknown_recipes_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'cnn8k'; near it: .*cnn-8k"):
        recipes.find("cnn8k")


def test_every_record_that_is_shipped_is_of_its_recipe_as_it_is_now():
    for name in runs.recorded():
        known = ml.results(name)
        assert known.seeds == list(range(known.n)) and known.n >= 3
        assert known.params == ml.models.count_parameters(ml.build(RECIPES[name].model))


SCRIPT = """
import sys, pathlib, mnistlab as ml
from mnistlab import runs
from mnistlab.recipes import RECIPES
RECIPES["linear-8k"] = ml.Recipe(model="linear-8k", epochs=6, batch_size=64, lr=0.05)
if __name__ == "__main__":
    runs.train_seeds("linear-8k", 2, workers=1, folder=pathlib.Path(sys.argv[1]))
"""


def test_killed_and_called_again_it_ends_with_each_seed_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    call = [sys.executable, script, tmp_path / "results"]
    env = os.environ | {"MNISTLAB_DATA": str(tmp_path / "cache")}
    quiet = {"env": env, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(call, start_new_session=True, **quiet)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cache").rglob("*.pt")):  # until the first epoch is over
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(call, check=True, **quiet)
    lines = (tmp_path / "results" / "linear-8k.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
    assert not list((tmp_path / "cache").rglob("*.pt"))
