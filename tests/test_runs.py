"""The run engine: records over seeds, resumed, checked, and never mixed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import mnistlab as ml
import pytest
import torch
from filelock import FileLock
from mnistlab import bench, recipes, runs
from mnistlab.models import PRESETS
from mnistlab.recipes import RECIPES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of the quickest recipe, recorded."""
    path = tmp_path_factory.mktemp("mnistlab") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNISTLAB_DATA", str(path / "cache"))
        patch.setitem(RECIPES, "linear-8k", QUICKEST)
        runs.train_seeds("linear-8k", 2, folder=path)
    return path


QUICKEST = ml.Recipe(model="linear-8k", epochs=1, batch_size=512, lr=0.05)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Locks and checkpoints of this test alone: not the user's, who may be training."""
    monkeypatch.setenv("MNISTLAB_DATA", str(tmp_path / "cache"))


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


def test_a_run_that_diverges_is_recorded_and_told_apart(folder, quickest, tmp_path):
    recipe = dataclasses.replace(QUICKEST, lr=1e30)
    record, files = runs.run_seed("linear-8k", recipe, 2)
    assert "the loss is" in record["diverged"] and "test" not in record and files == {}
    assert {"recipe", "device", "threads", "machine", "versions", "commit", "date"} <= set(record)

    record["recipe"] = QUICKEST.describe()  # as if it had diverged under the recipe of the others
    others = (folder / "linear-8k.jsonl").read_text()
    (tmp_path / "linear-8k.jsonl").write_text(others + json.dumps(record) + "\n")
    known = runs.results("linear-8k", tmp_path)
    assert (known.n, known.seeds, known.diverged) == (2, [0, 1], (2,))
    assert known.values == runs.results("linear-8k", folder).values
    assert str(known).endswith("(n = 2, 1 more diverged)")
    (tmp_path / "linear-8k.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="every recorded run of 'linear-8k' diverged: the loss is"):
        runs.results("linear-8k", tmp_path)
    assert (runs.recorded(tmp_path), runs.lost(tmp_path)) == ([], ["linear-8k"])
    assert (runs.recorded(folder), runs.lost(folder)) == (["linear-8k"], [])
    known = runs.train_seeds("linear-8k", 1, folder=tmp_path)  # and it can go on
    assert (known.seeds, known.diverged, known.tried) == ([0], (2,), 2)
    assert known.validated == known.records[0]["history"][-1]["val_accuracy"]


def test_a_power_law_is_found_again():
    def known(params: int, error: float) -> runs.Results:
        return runs.Results((1 - error,), "some", ({"params": params},))

    law = runs.power_law([known(n, 3 * n**-0.4) for n in (1_000, 5_000, 60_000)])
    assert law(20_000) == pytest.approx(3 * 20_000**-0.4)
    with pytest.raises(ValueError, match="two sizes"):
        runs.power_law([known(1_000, 0.1), known(1_000, 0.2)])


def test_seeds_that_are_recorded_are_left_alone(folder, quickest, monkeypatch):
    before = (folder / "linear-8k.jsonl").read_bytes()
    monkeypatch.setattr(runs, "run_seed", None)  # would fail if called
    assert runs.train_seeds("linear-8k", 2, folder=folder).n == 2
    assert (folder / "linear-8k.jsonl").read_bytes() == before


def test_a_seed_trained_again_is_the_same_to_the_last_image(folder, quickest):
    lines = list(runs.check("linear-8k", folder))
    assert lines[-1] == "the same, to the last image"


def test_a_recipe_is_trained_by_one_process_at_a_time(folder, quickest):
    with (
        FileLock(ml.data.data_root() / "runs" / "training-linear-8k.lock"),
        pytest.raises(ValueError, match="another process is training 'linear-8k'"),
    ):
        runs.train_seeds("linear-8k", 3, folder=folder)


def test_the_weights_of_seed_0_are_kept_and_are_the_ones_tested(folder, quickest, mnist):
    record = runs.read("linear-8k", folder)[0]
    model = runs.trained("linear-8k", folder=folder)
    assert not model.training
    assert ml.evaluate(model, mnist.test).correct == record["test"]["correct"]
    again = runs.trained("linear-8k", retrain=True, folder=folder)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=1e-5, rtol=1e-3)


def test_weights_that_are_not_those_of_the_record_are_refused(folder, quickest, monkeypatch):
    path = folder.parent / "weights" / "linear-8k.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=r"damaged: its SHA-256 is .* give retrain=True"):
            runs.trained("linear-8k", folder=folder)
        path.unlink()
        with pytest.raises(ValueError, match="no weights of 'linear-8k' are shipped"):
            runs.trained("linear-8k", folder=folder)
    finally:
        path.write_bytes(content)
    monkeypatch.setitem(RECIPES, "linear-8k", ml.Recipe(model="linear-8k", epochs=1, lr=0.07))
    with pytest.raises(ValueError, match="weights of 'linear-8k' are of another recipe"):
        runs.trained("linear-8k", folder=folder)


def test_watching_keeps_the_predictions_and_leaves_the_run_as_it_was(
    folder, quickest, mnist, tmp_path
):
    runs.train_seeds("linear-8k", 2, watch=True, folder=tmp_path / "results")
    kept = runs.watched("linear-8k", tmp_path / "results")
    assert kept["predictions"].shape == (2, 1, 10_000)
    assert kept["probabilities"].shape == (2, 10_000, 10)
    right = (torch.from_numpy(kept["predictions"][:, -1]) == mnist.test.labels).sum(1)
    records = runs.read("linear-8k", folder)  # made without watching
    assert right.tolist() == [record["test"]["correct"] for record in records]
    assert (kept["probabilities"].argmax(2) == kept["predictions"][:, -1]).mean() > 0.99
    with pytest.raises(ValueError, match=r"without the predictions of seeds \[0, 1\]"):
        runs.train_seeds("linear-8k", 3, watch=True, folder=folder)
    with pytest.raises(ValueError, match="no predictions of 'linear-8k'"):
        runs.watched("linear-8k", folder)


def test_test_time_augmentation_is_recorded_beside_the_single_view(monkeypatch, mnist):
    few = ml.Dataset("mnist", mnist.train[:512], mnist.val[:200], mnist.test[:200])
    monkeypatch.setattr(runs, "load", lambda name, resplit=None: few)
    recipe = ml.Recipe(model="linear-8k", epochs=1, batch_size=64, tta=(-20, 0, 20))
    record, _ = runs.run_seed("t", recipe, 0)
    model = ml.fit("linear-8k", few, recipe, progress=False).model
    assert record["single"]["test"]["correct"] == ml.evaluate(model, few.test).correct
    views = ml.rotations(-20, 0, 20)
    assert record["test"]["loss"] == pytest.approx(ml.evaluate(model, few.test, tta=views).loss)
    assert record["test"]["loss"] != record["single"]["test"]["loss"]


def test_a_stack_gives_the_same_records(folder, quickest):
    """What a GPU does, here on the CPU: two seeds in one pass."""
    alone = runs.read("linear-8k", folder)
    together = list(runs._together("linear-8k", QUICKEST, [0, 1], device="cpu"))
    for (record, _), old in zip(together, alone, strict=True):
        assert record.keys() == old.keys()
        assert record["seed"] == old["seed"] and record["recipe"] == old["recipe"]
        assert abs(record["test"]["correct"] - old["test"]["correct"]) <= 5  # of 10,000
    assert together[0][1].keys() == {"weights/linear-8k.safetensors"}


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
    for line in (b'{"see', b"[1]", b"3", b'{"a": 1}', b"\xff"):
        (tmp_path / "cnn-8k.jsonl").write_bytes(b'{"seed": 0}\n' + line)
        with pytest.raises(ValueError, match=r"cnn-8k.jsonl, line 2, is damaged"):
            runs.results("cnn-8k", tmp_path)
    (tmp_path / "cnn-8k.jsonl").write_text('{"seed": 0}\n{"seed": 0}\n')
    with pytest.raises(ValueError, match=r"cnn-8k.jsonl: seed 0 is there twice"):
        runs.results("cnn-8k", tmp_path)


def test_unknown_recipes_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'cnn8k'; near it: .*cnn-8k"):
        recipes.find("cnn8k")


def test_every_record_that_is_shipped_is_of_its_recipe_as_it_is_now():
    for name in runs.recorded():
        known, recipe = ml.results(name), RECIPES[name]
        assert sorted([*known.seeds, *known.diverged]) == list(range(known.tried))
        # The grid's runs are tries, to choose by on the validation images: one seed has to do.
        assert known.n >= 3 or (known.n == 1 and name.startswith("tinymnistnet"))
        model = ml.build(recipe.model, **recipe.arguments)
        assert known.params == ml.models.count_parameters(model)


def touch_or_fail(path):
    if path.name == "1":
        raise OSError("no space")
    path.touch()


def test_after_an_error_nothing_more_is_started(tmp_path):
    jobs = [(tmp_path / str(number),) for number in range(4)]
    with pytest.raises(OSError, match="no space"):
        list(runs._here(touch_or_fail, jobs, workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


KILLS = """
import os, pathlib, signal, sys
import mnistlab as ml
from mnistlab import runs
from mnistlab.models import PRESETS
from mnistlab.recipes import RECIPES

RECIPES["linear-8k"] = ml.Recipe(model="linear-8k", epochs=1, batch_size=512, lr=0.05)
folder = pathlib.Path(sys.argv[1])
true_run = runs.run_seed

def run_seed(name, recipe, seed, *rest):  # the first to try seed 1 kills its process
    marker = folder / "killed"
    if seed == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return true_run(name, recipe, seed, *rest)

runs.run_seed = run_seed
if __name__ == "__main__":
    folder.mkdir(exist_ok=True)
    runs.train_seeds("linear-8k", 3, on=sys.argv[2], folder=folder)
"""


@pytest.mark.parametrize("on", ["here", "ray"])
def test_a_killed_worker(tmp_path, on):
    """On Ray its run is retried; here the command says so, and goes on when called again."""
    if on == "ray":
        pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    script, folder = tmp_path / "script.py", tmp_path / "results"
    script.write_text(KILLS)
    env = os.environ | {"RAY_worker_niceness": "0"}
    call = [sys.executable, script, folder, on]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=280)
    if on == "here":
        assert "ChildProcessError: a worker was killed" in done.stderr
        done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (folder / "killed").exists()
    lines = (folder / "linear-8k.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1, 2]
    assert (tmp_path / "weights" / "linear-8k.safetensors").exists()


def test_without_ray_the_answer_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'mnistlab\[cluster\]'"):
        runs.start_ray()


SCRIPT = """
import sys, pathlib, mnistlab as ml
from mnistlab import runs
from mnistlab.models import PRESETS
from mnistlab.recipes import RECIPES
RECIPES["linear-8k"] = ml.Recipe(model="linear-8k", epochs=6, batch_size=64, lr=0.05)
if __name__ == "__main__":
    runs.train_seeds("linear-8k", 2, workers=1, folder=pathlib.Path(sys.argv[1]))
"""


def test_killed_and_called_again_it_ends_with_each_seed_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    call = [sys.executable, script, tmp_path / "results"]
    quiet = {"stderr": subprocess.DEVNULL}
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


def test_speeds_are_of_every_preset_but_the_largest_and_relative_to_one():
    for what in ("inference", "training"):
        known = runs.speeds(what)
        assert known[runs.REFERENCE] == 1 and min(known.values()) > 0
        large = {"efficientnet-4m", "efficientnet-7m", "capsules-8m"}
        assert set(known) == set(PRESETS) - large


def test_the_benchmark_of_presets_writes_the_record_that_speeds_reads(monkeypatch, tmp_path):
    few = {name: PRESETS[name] for name in ("linear-8k", "cnn-8k", "capsules-8k")}
    monkeypatch.setattr(bench, "PRESETS", few)
    monkeypatch.setattr(bench, "SPEEDS", tmp_path / "speeds.csv")
    monkeypatch.setattr(runs, "SPEEDS", tmp_path / "speeds.csv")
    threads = torch.get_num_threads()
    rows = bench.presets(rounds=2)
    assert torch.get_num_threads() == threads
    assert [row["name"] for row in rows] == list(few) == list(runs.speeds())
    assert runs.speeds("training")["cnn-8k"] == 1
