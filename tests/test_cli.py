"""The command line: what it prints, for people and for programs, and how it fails."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points

import mnistlab as ml
import pytest
from mnistlab import cli
from mnistlab.recipes import RECIPES
from safetensors.torch import load_file

COMMANDS = ["data", "models", "train", "sweep", "results", "report", "compress", "export", "bench"]


@pytest.fixture
def command(monkeypatch, capsys):
    """command("models", "--json"): exit code, and what was written to stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mnistlab", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:  # a string is what Python prints to stderr, with code 1
            code = stop.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        return code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def few(mnist, monkeypatch):
    """Training sees a few images of MNIST."""
    small = ml.Dataset("mnist", mnist.train[:512], mnist.val[:200], mnist.test[:100])
    monkeypatch.setattr(ml.data, "load", lambda name="mnist", root=None, resplit=None: small)
    return small


def test_the_console_script_is_main():
    (script,) = entry_points(group="console_scripts", name="mnistlab")
    assert script.load() is cli.main


def test_help_lists_the_commands(command):
    code, out, _ = command("--help")
    assert code == 0
    assert all(re.search(rf"\b{name}\b", out) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_of_it(command, name):
    code, out, _ = command(name, "--help")
    assert code == 0 and re.search(rf"Examples?: mnistlab {name}", out)


def test_the_examples_parse():
    import tyro

    kinds = (cli.Data, cli.Models, cli.Train, cli.Sweep, cli.Results, cli.Report)
    kinds += (cli.Compress, cli.Export)
    for kind in (*kinds, cli.Bench):
        (examples,) = re.findall(r"Examples?: (.*?)\n *\Z", kind.__doc__, re.S)
        for example in re.sub(r"\s+", " ", examples).split(" / "):
            arguments = example.removeprefix("mnistlab ").split()
            assert isinstance(tyro.cli(cli.Command, args=arguments, use_underscores=False), kind)


def test_the_list_names_every_recipe_and_every_field(command):
    from dataclasses import fields

    _, out, _ = command("train", "--list")
    assert {f.name for f in fields(ml.Recipe)} <= set(re.findall(r"\w+", out))
    assert "augment.rotate" in out
    assert set(json.loads(command("train", "--list", "--json")[1])) == set(RECIPES)


def test_models_lists_the_catalogue(command):
    _, out, _ = command("models", "--json")
    assert json.loads(out) == ml.models.catalogue()
    code, out, _ = command("models")
    assert code == 0
    assert re.search(r"^cnn-8k +CNN +7,942 ", out, re.M)


def test_models_with_a_name_prints_its_layers(command):
    code, out, _ = command("models", "convnext-8k")
    assert code == 0 and "ChannelNorm" in out
    assert re.search(r"^Total params: 7,732$", out, re.M)
    _, out, _ = command("models", "convnext-8k", "--json")
    assert [row["params"] for row in json.loads(out)] == [7_732]
    code, _, err = command("models", "convnext8k")
    assert code == 1 and "near it: convnext-8k" in err and err.count("\n") == 1


def test_data_says_what_is_in_a_data_set(command):
    code, out, _ = command("data")
    assert code == 0 and re.search(r"^train +55,000 +1x28x28$", out, re.M)
    _, out, _ = command("data", "mnist", "--json")
    assert [row["images"] for row in json.loads(out)] == [55_000, 5_000, 10_000]


def test_train_prints_the_run_and_the_validation_report_alone(command, few):
    code, out, _ = command("train", "linear-8k", "--set", "epochs=2", "--seed", 3)
    assert code == 0
    run, val = out.splitlines()
    assert run.startswith("2 epochs, ") and "seed 3" in run
    assert re.fullmatch(r"val: accuracy .* of 200; .*", val)


def test_train_reports_on_test_when_asked(command, few):
    _, out, _ = command("train", "linear-8k", "--set", "epochs=1", "--test")
    assert re.fullmatch(r"test: accuracy .* of 100; .*", out.splitlines()[-1])


def test_train_overrides_any_field_and_prints_json(command, few):
    changes = [
        "epochs=1",
        "augment.rotate=10",
        "schedule=cosine",
        "betas=0.8,0.9",
        "nesterov=False",
        "arguments.dropout=0.1",
        "loss=mse",
    ]
    code, out, _ = command("train", "linear-8k", "--set", *changes, "--json")
    record = json.loads(out)
    assert code == 0 and record["recipe"]["augment"]["rotate"] == 10
    assert record["recipe"]["schedule"] == "cosine" and record["recipe"]["betas"] == [0.8, 0.9]
    assert record["recipe"]["arguments"] == {"dropout": 0.1} and record["recipe"]["loss"] == "mse"
    assert record["recipe"]["nesterov"] is False and record["recipe"]["model"] == "linear-8k"
    assert record["val"]["n"] == 200 and 0 <= record["val"]["correct"] <= 200
    assert len(record["history"]) == 1 and "test" not in record


def test_train_takes_a_teacher_by_its_name(command, few):
    changes = ("epochs=1", "teacher=dense-8k", "hard=0", "temperature=2")
    code, out, _ = command("train", "linear-8k", "--set", *changes, "--json")
    recipe = ml.Recipe(model="linear-8k", epochs=1, teacher="dense-8k", hard=0, temperature=2)
    run = ml.fit("linear-8k", few, recipe, teacher=ml.trained("dense-8k"), progress=False)
    assert code == 0 and json.loads(out)["val"]["loss"] == ml.evaluate(run.model, few.val).loss


def test_train_keeps_a_checkpoint_and_goes_on_from_it(command, few, tmp_path):
    arguments = ["train", "linear-8k", "--set", "epochs=1", "--checkpoint", tmp_path / "c"]
    first, again = (command(*arguments, "--json")[1] for _ in range(2))
    assert json.loads(first) == json.loads(again)  # the seconds too: nothing ran twice


def test_data_that_is_not_to_be_had_is_answered_in_one_line(command, offline, tmp_path):
    code, out, err = command("data", "kmnist", "--root", tmp_path)
    assert code == 1 and out == "" and err.count("\n") == 1
    assert err.startswith("mnistlab: kmnist: train-images-idx3-ubyte.gz is missing")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "cnn"], "unknown recipe 'cnn'; near it: cnn-8k"),
        (["train", "--set", "model=cnn"], "unknown model 'cnn'; near it: cnn-8k"),
        (["train", "--set", "augment=wild"], "one of none, mild"),
        (["train", "--set", "arguments.width=3"], "cnn-8k takes no 'width'; near it: widths"),
        (["sweep", "cnn-8k", "--over", "lr"], "--over lr: write it as field=values"),
        (["report", "linear-8k"], "no records of 'linear-8k'"),
        (["train", "--set", "epochs"], "--set epochs: write it as field=value"),
        (["train", "linear-8k", "--device", "mars"], "mars"),
        (["train", "linear-8k", "--set", "lr=1e30"], "the loss is"),
        (["train", "linear-8k", "--checkpoint", "TMP"], "TMP"),
        (["train", "linear-8k", "--seeds", "2", "--quick"], "records keep their recipe"),
        (["train", "linear-8k", "--seeds", "2", "--save", "x"], "--seeds goes with no --save"),
        (["train", "linear-8k", "--watch"], "they go with --seeds"),
        (["train", "linear-8k", "--set", "teacher=cnn9k"], "unknown recipe 'cnn9k'; near it: cnn-"),
        (["compress", "linear-8k"], "no weights of 'linear-8k' are shipped"),
        (["compress", "dense-8k", "--bits", "1"], "bits=1: must be in 2..8"),
        (["results", "linear-8k"], "no records of 'linear-8k'; make them: mnistlab train"),
    ],
)
def test_a_mistake_is_answered_in_one_line(command, few, tmp_path, arguments, said):
    code, out, err = command(*(a.replace("TMP", str(tmp_path)) for a in arguments))
    assert code == 1 and out == ""
    line = err.split("\r")[-1]  # after the progress bar, which wipes itself out
    assert line.startswith("mnistlab: ") and line.count("\n") == 1
    assert said.replace("TMP", str(tmp_path)) in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "subcommand"),
        (["trainn"], "train"),
        (["train", "--set", "epoch=1"], "--epochs"),
        (["train", "--set", "lr=high"], "high"),
        (["train", "--set", "epochs=0"], "epochs=0: must be at least 1"),
        (["models", "--jsn"], "--json"),
    ],
)
def test_what_cannot_be_parsed_exits_with_2_and_names_what_is_near(command, arguments, said):
    code, out, err = command(*arguments)
    assert code == 2 and out == "" and said in err


def test_quick_trains_on_ten_batches(command, few):
    code, out, _ = command("train", "linear-8k", "--set", "batch_size=16", "--quick", "--json")
    (row,) = json.loads(out)["history"]
    assert code == 0 and round(row["images_per_second"] * row["seconds"]) == 160


def test_quick_shortens_an_average_of_weights_too(command, few):
    code, out, _ = command("train", "bottleneck-5k", "--set", "batch_size=16", "--quick", "--json")
    assert code == 0 and json.loads(out)["recipe"]["swa_epochs"] == 1


def test_an_interrupt_exits_with_130(command, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Models, "run", interrupt)
    assert command("models")[0] == 130


def module(*arguments: object) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "mnistlab", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, timeout=120)


def test_python_m_mnistlab_trains_and_saves_weights_that_load(tmp_path, mnist):
    path = tmp_path / "new" / "linear.safetensors"
    done = module("train", "linear-8k", "--set", "epochs=1", "--save", path, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    model = ml.build("linear-8k")
    model.load_state_dict(load_file(path))
    report, said = ml.evaluate(model, mnist.val), json.loads(done.stdout)["val"]
    assert said == {"correct": report.correct, "n": 5_000, "loss": pytest.approx(report.loss)}
    assert report.accuracy > 0.85


def test_seeds_are_trained_as_the_switches_say(command, monkeypatch):
    asked = []

    def train_seeds(name, seeds, **switches):
        asked.append((name, seeds, switches))
        return ml.results("dense-8k")

    monkeypatch.setattr(cli.runs, "train_seeds", train_seeds)
    switches = ("--on", "ray", "--workers", 3, "--watch")
    code, out, _ = command("train", "dense-8k", "--seeds", 10, *switches)
    assert code == 0 and asked == [("dense-8k", 10, {"workers": 3, "on": "ray", "watch": True})]
    assert re.search(r"^dense-8k +Dense +8,470", out, re.M)


def test_report_writes_a_page_and_names_it(command, tmp_path):
    code, out, _ = command("report", "dense-8k", "--out", tmp_path / "new" / "page.html")
    assert code == 0 and out.strip() == str(tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text("utf-8").startswith("<!doctype html>")


def test_compress_writes_a_file_that_holds_what_it_says(command, few, tmp_path):
    path = tmp_path / "new" / "dense.bin"
    code, out, _ = command("compress", "dense-8k", "--bits", 4, "--out", path, "--json")
    (row,) = json.loads(out)
    assert code == 0 and row["bytes"] == path.stat().st_size < 5_000 and row["float32"] == 33_880
    for key, model in (
        ("val before", ml.trained("dense-8k")),
        ("val after", ml.compress.unpack(path.read_bytes(), ml.build("dense-8k"))),
    ):
        assert row[key] == round(100 * ml.evaluate(model, few.val).accuracy, 2)


def test_sweep_prints_its_tries_the_best_first(command, monkeypatch):
    row = {"settings": {"lr": 0.1}, "val_accuracy": 0.97, "val_loss": 0.1, "epochs": 1}
    row |= {"seconds": 2.6, "seed": 0, "date": "2026"}
    asked = []

    def sweep(name, over, trials, *, seed):
        asked.append((name, over, trials, seed))
        return [row]

    monkeypatch.setattr("mnistlab.sweep.sweep", sweep)
    code, out, _ = command("sweep", "cnn-8k", "--over", "lr=0.1,0.2", "--trials", 1)
    assert code == 0 and asked == [("cnn-8k", {"lr": "0.1,0.2"}, 1, 0)]
    assert re.search(r"^0.1 +97.00 +0.1000 +1 +3$", out, re.M)
    assert json.loads(command("sweep", "cnn-8k", "--over", "lr=0.1", "--json")[1]) == [row]


def test_train_logs_where_a_tracker_looks(command, few, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="the extra `track` is not installed")
    monkeypatch.chdir(tmp_path)
    code, *_ = command("train", "linear-8k", "--quick", "--track", "tensorboard")
    assert code == 0 and list((tmp_path / "tracked" / "linear-8k-0").iterdir())


def test_an_error_shows_no_traceback():
    done = module("data", "nothing-like-it")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mnistlab: unknown data set") and done.stderr.count("\n") == 1


def test_a_table_puts_numbers_to_the_right_and_words_to_the_left():
    rows = [{"name": "a", "n": 5}, {"name": "longer", "n": 12_000}]
    assert cli.table(rows) == "name         n\na            5\nlonger  12,000"
