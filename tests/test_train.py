"""The training loop: every field of a recipe against its formula, resuming, and what is refused."""

import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import mnistlab as ml
import pytest
import torch
import torch.nn.functional as F
from mnistlab import Augment, Dataset, Recipe, Split, fit, train
from mnistlab.models import Dense
from torch import nn

CPU = torch.device("cpu")


def linear() -> nn.Module:
    """Softmax regression on `tiny`, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Dense(hidden=(), image_size=8, num_classes=4)


def small(dropout: float = 0.2) -> nn.Module:
    """A net with batch normalisation and dropout, the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Dense(hidden=(12,), image_size=8, num_classes=4, dropout=dropout)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have the same weights and buffers, bit for bit."""
    ours, other = a.state_dict(), b.state_dict()
    return ours.keys() == other.keys() and all(torch.equal(ours[k], other[k]) for k in ours)


@pytest.fixture
def steps(monkeypatch) -> list[dict]:
    """What every step of SGD saw: its learning rate, and the weights that it left."""
    seen, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        lr = self.param_groups[0]["lr"]
        result = step(self, *args, **kwargs)
        weights = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        seen.append({"lr": lr, "weights": weights})
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    return seen


# --- optimisers ---------------------------------------------------------------------------------

PLAIN = {"schedule": "constant", "batch_size": 256, "weight_decay": 0.1, "lr": 0.02}


def by_hand(recipe: Recipe, data: Dataset) -> dict[str, torch.Tensor]:
    """Weights after `recipe.epochs` steps over all images, by the formulas of the papers."""
    model = linear().double()
    images, labels = data.train.inputs().double(), data.train.labels
    b1, b2 = recipe.betas
    m, v = {}, {}
    for t in range(1, recipe.epochs + 1):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for name, w in model.named_parameters():
                decay = recipe.weight_decay * (w.ndim >= 2)
                g = w.grad + decay * w * (recipe.optimizer in ("sgd", "adam"))
                if recipe.optimizer == "sgd":
                    m[name] = recipe.momentum * m.get(name, 0) + g
                    step = g + recipe.momentum * m[name] if recipe.nesterov else m[name]
                elif recipe.optimizer == "rmsprop":  # Hinton's lecture, as torch has it
                    g = g + decay * w
                    v[name] = 0.99 * v.get(name, 0) + 0.01 * g**2
                    step = g / (v[name].sqrt() + 1e-8)
                else:  # Kingma & Ba 2014, algorithm 1
                    m[name] = b1 * m.get(name, 0) + (1 - b1) * g
                    v[name] = b2 * v.get(name, 0) + (1 - b2) * g**2
                    step = (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
                if recipe.optimizer == "adamw":  # Loshchilov & Hutter 2017: apart from the gradient
                    step = step + decay * w
                w -= recipe.lr * step
    return model.float().state_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"momentum": 0.0, "nesterov": False},
        {"momentum": 0.8, "nesterov": False},
        {"momentum": 0.8, "nesterov": True},
        {"optimizer": "adam", "betas": (0.8, 0.9)},
        {"optimizer": "adamw", "betas": (0.8, 0.9)},
        {"optimizer": "rmsprop"},
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw", "rmsprop"],
)
def test_three_steps_of_an_optimizer_are_its_formula(tiny, change):
    recipe = Recipe(epochs=3, **PLAIN | change)
    model = fit(linear(), tiny, recipe, progress=False).model
    for name, expected in by_hand(recipe, tiny).items():
        torch.testing.assert_close(model.state_dict()[name], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", train.CHOICES["optimizer"])
def test_biases_and_norms_do_not_decay(optimizer):
    recipe, model = Recipe(optimizer=optimizer, weight_decay=0.3), small()
    groups = train.make_optimizer(model.parameters(), recipe).param_groups
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[p] == (0.3 if p.ndim >= 2 else 0) for p in model.parameters())


def test_frozen_parameters_stay(tiny):
    model = small()
    model[1].weight.requires_grad = False
    fit(model, tiny, Recipe(epochs=1), progress=False)
    assert torch.equal(model[1].weight, small()[1].weight)
    assert not torch.equal(model[-1].weight, small()[-1].weight)


# --- schedules: 8 steps an epoch ----------------------------------------------------------------


def rates(tiny, steps, **recipe) -> list[float]:
    """The learning rate of every step."""
    fit(linear(), tiny, Recipe(batch_size=32, **recipe), progress=False)
    return [row["lr"] for row in steps]


def test_onecycle_is_that_of_torch(tiny, steps):
    ours = rates(tiny, steps, schedule="onecycle", epochs=4, lr=0.3, warmup=0.4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.3, total_steps=32, pct_start=0.4, cycle_momentum=False
    )
    theirs = []
    steps.clear()
    for _ in range(32):
        optimizer.step()
        schedule.step()
    theirs = [row["lr"] for row in steps]
    assert ours == pytest.approx(theirs)
    assert max(ours) == pytest.approx(0.3, rel=0.01) and ours.index(max(ours)) in (11, 12)
    assert ours[-1] < 0.001


def test_onecycle_leaves_momentum_alone(tiny, monkeypatch):
    seen, step = set(), torch.optim.SGD.step

    def spy(self, *args):
        seen.add(self.param_groups[0]["momentum"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    fit(linear(), tiny, Recipe(epochs=2, momentum=0.7), progress=False)
    assert seen == {0.7}


@pytest.mark.parametrize("warmup", [0.25, 0.0, 0.9])
def test_cosine_rises_in_a_line_then_falls_as_a_cosine(tiny, steps, warmup):
    ours = rates(tiny, steps, schedule="cosine", epochs=4, lr=0.3, warmup=warmup)
    w = int(32 * warmup)
    expected = [0.3 * (t + 1) / w for t in range(w)]
    expected += [0.15 * (1 + math.cos(math.pi * (t - w) / (32 - w))) for t in range(w, 32)]
    assert ours == pytest.approx(expected)


def test_step_multiplies_by_gamma_every_step_epochs(tiny, steps):
    ours = rates(tiny, steps, schedule="step", epochs=5, lr=0.3, step_epochs=2, gamma=0.5)
    assert ours == pytest.approx([0.3] * 16 + [0.15] * 16 + [0.075] * 8)


def test_constant_stays(tiny, steps):
    assert rates(tiny, steps, schedule="constant", epochs=2, lr=0.3) == [0.3] * 16


def test_plateau_waits_for_patience_then_lowers(tiny, steps):
    # So small a rate does not lower the loss by the 0.01% that counts.
    ours = rates(
        tiny, steps, schedule="plateau", epochs=7, lr=1e-7, gamma=0.5, patience=1, weight_decay=0
    )
    assert ours[::8] == pytest.approx([1e-7] * 3 + [5e-8] * 2 + [2.5e-8] * 2)
    assert ours == [rate for rate in ours[::8] for _ in range(8)]  # never within an epoch


def test_plateau_keeps_the_rate_while_the_validation_loss_falls(tiny, steps):
    ours = rates(tiny, steps, schedule="plateau", epochs=5, lr=0.01, patience=0)
    assert set(ours) == {0.01}


@pytest.mark.parametrize("schedule", train.CHOICES["schedule"])
@pytest.mark.parametrize(
    ("epochs", "warmup"),
    [(1, 0.25), (1, 0.999), (4, 0.25), (1, 0.0), (2, 0.5), (3, 1 / 3)],
    ids=["one step", "one step of warm-up", "warm-up of 1", "none", "half", "a third"],
)
def test_runs_of_few_steps_have_finite_rates_that_reach_lr(tiny, steps, schedule, epochs, warmup):
    recipe = Recipe(schedule=schedule, epochs=epochs, warmup=warmup, batch_size=256, lr=0.3)
    fit(linear(), tiny, recipe, progress=False)
    ours = [row["lr"] for row in steps]
    assert len(ours) == epochs and all(0 <= rate <= 0.3 * (1 + 1e-9) for rate in ours)
    assert max(ours) > 0.1  # it does train


# --- the other fields ---------------------------------------------------------------------------


def test_a_recipe_has_no_field_that_these_tests_do_not_name():
    text = Path(__file__).read_text("utf-8")
    assert [
        f.name for f in fields(Recipe) if f'"{f.name}"' not in text and f"{f.name}=" not in text
    ] == []


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_is_the_formula_of_szegedy(tiny, smoothing):
    run = fit(
        linear(), tiny, Recipe(epochs=1, batch_size=256, label_smoothing=smoothing), progress=False
    )
    log_p = linear()(tiny.train.inputs()).log_softmax(1)
    target = F.one_hot(tiny.train.labels, 4) * (1 - smoothing) + smoothing / 4
    expected = -(target * log_p).sum(1).mean().item()
    assert run.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)


def test_ema_is_the_average_of_the_weights_after_each_step(tiny, steps):
    run = fit(linear(), tiny, Recipe(epochs=2, batch_size=64, ema=0.7), progress=False)
    weight = steps[0]["weights"][0]
    for row in steps[1:]:
        weight = 0.7 * weight + 0.3 * row["weights"][0]
    torch.testing.assert_close(run.model[-1].weight, weight)
    logits = run.model(tiny.val.inputs())
    assert run.history[-1]["val_loss"] == pytest.approx(
        F.cross_entropy(logits, tiny.val.labels).item()
    )


def test_ema_averages_buffers_too_and_leaves_the_model_trained(tiny):
    model = small()
    run = fit(model, tiny, Recipe(epochs=2, batch_size=64, ema=0.9), progress=False)
    assert run.model is not model and not same(run.model, model)
    assert not torch.equal(run.model[2].running_mean, model[2].running_mean)


def test_clip_bounds_the_norm_of_a_step(tiny, steps):
    recipe = {"momentum": 0.0, "nesterov": False, "weight_decay": 0, "lr": 1.0, "epochs": 1}
    recipe |= {"schedule": "constant", "batch_size": 256}

    def length(clip):
        steps.clear()
        fit(linear(), tiny, Recipe(clip=clip, **recipe), progress=False)
        before = [linear()[1].weight, linear()[1].bias]
        moved = [(a - b).flatten() for a, b in zip(steps[0]["weights"], before, strict=True)]
        return torch.cat(moved).norm().item()

    free = length(0)
    assert length(free / 5) == pytest.approx(free / 5, rel=1e-3)
    assert length(free * 5) == pytest.approx(free, rel=1e-3)


def test_the_last_clean_epochs_see_no_augmentation(tiny, steps, monkeypatch):
    calls = []

    def spy(self, images, generator):
        calls.append(len(steps))
        return images

    monkeypatch.setattr(Augment, "__call__", spy)
    recipe = Recipe(epochs=3, batch_size=64, augment=Augment(rotate=5), clean_epochs=1)
    fit(linear(), tiny, recipe, progress=False)
    assert calls == list(range(8))  # of 12 steps
    calls.clear()
    fit(linear(), tiny, replace(recipe, augment=Augment()), progress=False)
    assert calls == []


def test_augmentation_changes_training_and_not_validation(tiny):
    run = fit(linear(), tiny, Recipe(epochs=1, augment=Augment(shift=3)), progress=False)
    plain = fit(linear(), tiny, Recipe(epochs=1), progress=False)
    assert run.history[0]["train_loss"] > plain.history[0]["train_loss"]
    report = ml.evaluate(run.model, tiny.val)
    assert run.history[0]["val_accuracy"] == report.accuracy
    assert run.history[0]["val_loss"] == pytest.approx(report.loss)


@pytest.mark.skipif(not train.has_bf16(CPU), reason="this processor has no bfloat16 arithmetic")
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(tiny):
    seen = []

    def loss(output, labels):
        seen.append(output.dtype)
        return F.cross_entropy(output.float(), labels)

    recipe = Recipe(epochs=3, batch_size=32, precision="bf16", loss=loss)
    run = fit(small(), tiny, recipe, device="cpu", progress=False)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    assert run.history[-1]["val_accuracy"] > 0.9


def test_bf16_is_refused_where_the_processor_lacks_it(tiny, monkeypatch):
    monkeypatch.setattr(train, "has_bf16", lambda device: False)
    with pytest.raises(ValueError, match="precision='bf16': this cpu has no such arithmetic"):
        fit(linear(), tiny, Recipe(precision="bf16"), device="cpu", progress=False)


@pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="no C++ compiler"
)
def test_compile_gives_the_same_weights_but_for_rounding(tiny, monkeypatch):
    compiled, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compiled(model))
    recipe = Recipe(epochs=1, batch_size=64)
    run = fit(linear(), tiny, replace(recipe, compile=True), device="cpu", progress=False)
    plain = fit(linear(), tiny, recipe, device="cpu", progress=False)
    assert len(calls) == 1 and isinstance(run.model, Dense)
    torch.testing.assert_close(state(run.model), state(plain.model), atol=1e-5, rtol=1e-4)


def test_channels_last_changes_the_layout_and_not_the_result(tiny):
    def conv():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return ml.models.CNN(widths=(4, 8), num_classes=4)

    recipe = Recipe(epochs=1, batch_size=64)
    run = fit(conv(), tiny, replace(recipe, channels_last=True), progress=False)
    plain = fit(conv(), tiny, recipe, progress=False)
    layout = {"memory_format": torch.channels_last}
    assert run.model[1][0].weight.is_contiguous(**layout)
    assert not plain.model[1][0].weight.is_contiguous(**layout)
    torch.testing.assert_close(state(run.model), state(plain.model), atol=1e-4, rtol=1e-3)


def test_any_callable_serves_as_the_loss(tiny):
    def squared_error(output, labels):
        return (output - F.one_hot(labels, 4)).square().mean()

    recipe = Recipe(epochs=1, batch_size=256, loss=squared_error)
    run = fit(linear(), tiny, recipe, progress=False)
    expected = squared_error(linear()(tiny.train.inputs()), tiny.train.labels).item()
    assert run.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert recipe.describe()["loss"].endswith("squared_error")


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("cross-entropy", lambda z, y: -z.log_softmax(1)[range(len(y)), y].mean()),
        ("mse", lambda z, y: ((z - torch.eye(4)[y]) ** 2).mean()),
        ("margin", lambda z, y: ((1 - z.gather(1, y[:, None]) + z).relu().sum(1) - 1).mean() / 4),
    ],
)
def test_a_loss_by_name_is_its_formula(tiny, name, by_hand):
    recipe = Recipe(epochs=1, batch_size=256, loss=name)
    run = fit(linear(), tiny, recipe, progress=False)
    expected = by_hand(linear()(tiny.train.inputs()), tiny.train.labels).item()
    assert run.history[0]["train_loss"] == pytest.approx(expected, rel=1e-5)
    assert recipe.describe()["loss"] == name


def test_swa_is_the_mean_of_the_last_epochs_weights(tiny):
    seen = []

    def keep(row, model):  # before the last epoch, what is validated is the running model
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    recipe = Recipe(epochs=3, batch_size=64)
    fit(linear(), tiny, recipe, on_epoch=keep, progress=False)
    run = fit(linear(), tiny, replace(recipe, swa_epochs=2), progress=False)
    for name, average in run.model.named_parameters():
        torch.testing.assert_close(average, (seen[1][name] + seen[2][name]) / 2)


def test_swa_refreshes_batch_normalisation_on_images_without_augmentation(tiny):
    recipe = Recipe(epochs=2, batch_size=64, swa_epochs=2, augment=Augment(rotate=20))
    run = fit(small(dropout=0.0), tiny, recipe, progress=False)
    flatten, linear_layer, norm = run.model[0], run.model[1], run.model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    inputs = linear_layer(flatten(tiny.train.inputs())).detach()
    torch.testing.assert_close(norm.running_mean, inputs.mean(0), atol=1e-4, rtol=1e-4)
    report = ml.evaluate(run.model, tiny.val)
    assert run.history[-1]["val_loss"] == pytest.approx(report.loss)


def test_a_hook_sees_each_epoch_and_does_not_change_the_run(tiny):
    seen = []

    def hook(row, model):
        seen.append((row["epoch"], ml.evaluate(model, tiny.val).accuracy == row["val_accuracy"]))
        torch.rand(3)  # its draws are its own

    watched = fit(small(), tiny, replace(FULL, epochs=2), on_epoch=hook, progress=False)
    assert seen == [(1, True), (2, True)]
    assert same(watched.model, fit(small(), tiny, replace(FULL, epochs=2), progress=False).model)


def test_arguments_of_a_recipe_change_the_preset(mnist):
    few = Dataset("few", mnist.train[:64], mnist.val[:64], test=None)
    recipe = Recipe(model="tinymnistnet-16k", arguments={"activation": "silu"}, epochs=1)
    run = fit(recipe.model, few, recipe, progress=False)
    assert any(isinstance(layer, nn.SiLU) for layer in run.model)
    with pytest.raises(ValueError, match="takes no 'activatio'; near it: activation"):
        fit(recipe.model, few, replace(recipe, arguments={"activatio": "silu"}))


def test_resplit_deals_the_images_out_anew_for_each_seed(monkeypatch, tiny):
    asked = []
    monkeypatch.setattr(train, "load", lambda name, resplit: asked.append(resplit) or tiny)
    fit(linear(), "mnist", Recipe(epochs=1, resplit=True), seed=7, progress=False)
    fit(linear(), "mnist", Recipe(epochs=1), seed=7, progress=False)
    assert asked == [7, None]


def test_training_stops_at_the_target_on_validation(tiny):
    full = fit(linear(), tiny, Recipe(epochs=6, lr=0.02), progress=False)
    accuracy = [row["val_accuracy"] for row in full.history]
    assert accuracy[0] < accuracy[-1]
    stopped = fit(linear(), tiny, Recipe(epochs=6, lr=0.02, target=max(accuracy)), progress=False)
    assert len(stopped.history) == accuracy.index(max(accuracy)) + 1
    assert stopped.history[-1]["val_loss"] == full.history[len(stopped.history) - 1]["val_loss"]


# --- the run ------------------------------------------------------------------------------------

FULL = Recipe(
    model="unused",
    epochs=4,
    batch_size=32,
    augment=Augment(rotate=10, shift=1, elastic=5),
    ema=0.9,
    clip=1.0,
)


def test_same_seed_same_weights_bit_for_bit(tiny):
    first = fit(small(), tiny, FULL, seed=3, progress=False)
    torch.rand(7)  # the caller's random state has no part in it
    again = fit(small(), tiny, FULL, seed=3, progress=False)
    other = fit(small(), tiny, FULL, seed=4, progress=False)
    assert same(first.model, again.model)
    assert not same(first.model, other.model)


def test_order_and_dropout_are_drawn_anew_for_every_epoch_and_seed(tiny):
    def draws(seed: int) -> list[torch.Tensor]:
        """Of two epochs: the order of the labels, and what dropout left."""
        orders, masks = [], []

        def loss(output, labels):
            orders.append(labels)
            masks.append(output != 0)
            return output.square().mean()

        model = nn.Sequential(linear(), nn.Dropout(0.5))
        recipe = Recipe(epochs=2, batch_size=256, loss=loss)
        fit(model, tiny, recipe, seed=seed, progress=False)
        return orders + masks

    order, next_order, mask, next_mask = draws(seed=0)
    assert not torch.equal(order, next_order) and not torch.equal(mask, next_mask)
    other_order, _, other_mask, _ = draws(seed=1)
    assert not torch.equal(order, other_order) and not torch.equal(mask, other_mask)


def test_a_preset_is_built_under_the_seed(mnist):
    few = Dataset("few", mnist.train[:256], mnist.val[:64], test=None)
    runs = [fit("dense-8k", few, Recipe(epochs=1), seed=s, progress=False) for s in (0, 0, 1)]
    assert same(runs[0].model, runs[1].model) and not same(runs[0].model, runs[2].model)


def test_the_callers_random_state_is_left_alone(tiny, random_state_is_kept):
    fit(small(), tiny, FULL, progress=False)


def test_the_test_split_is_never_touched(tiny):
    class Untouchable:
        def __getattribute__(self, name):
            raise AssertionError("the test split was looked at")

    guarded = replace(tiny, test=Untouchable())
    assert fit(linear(), guarded, Recipe(epochs=1), progress=False).history


def test_a_run_says_what_happened(tiny):
    run = fit(
        linear(), tiny, Recipe(epochs=2, batch_size=100), seed=5, device="cpu", progress=False
    )
    assert [row["epoch"] for row in run.history] == [1, 2]
    names = {
        "epoch",
        "lr",
        "train_loss",
        "val_loss",
        "val_accuracy",
        "seconds",
        "images_per_second",
    }
    assert all(row.keys() == names for row in run.history)
    assert (run.seed, run.device, run.threads) == (5, "cpu", torch.get_num_threads())
    assert not run.model.training
    assert run.seconds == pytest.approx(sum(row["seconds"] for row in run.history))
    images = sum(row["seconds"] * row["images_per_second"] for row in run.history)
    assert images == pytest.approx(2 * 200)  # two whole batches an epoch
    assert run.images_per_second == pytest.approx(images / run.seconds)
    assert str(run).startswith("2 epochs, ") and "seed 5" in str(run)


def test_a_batch_larger_than_the_split_is_the_split(tiny):
    run = fit(linear(), tiny, Recipe(epochs=1, batch_size=1000), progress=False)
    assert run.seconds * run.images_per_second == pytest.approx(256)


def test_the_progress_bar_shows_loss_accuracy_and_rate(tiny, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    bar = train.tqdm
    monkeypatch.setattr(train, "tqdm", lambda **kwargs: bar(**kwargs, mininterval=0, ncols=200))
    fit(linear(), tiny, Recipe(epochs=2, batch_size=8))
    shown = capsys.readouterr().err
    assert "epoch 1, loss " in shown and "val after the epoch" in shown
    assert "epoch 2, loss " in shown and "%, " in shown.split("epoch 2")[1]
    assert " images/s" in shown


@pytest.mark.parametrize(("progress", "variable"), [(False, ""), (True, "1")])
def test_the_progress_bar_is_silenced_in_a_notebook_too(tiny, monkeypatch, progress, variable):
    # tqdm's bar for notebooks passes over its own environment variable.
    bar, seen = train.tqdm, []
    monkeypatch.setenv("TQDM_DISABLE", variable)
    monkeypatch.setattr(train, "tqdm", lambda **kw: seen.append(kw["disable"]) or bar(**kw))
    fit(linear(), tiny, Recipe(epochs=1), progress=progress)
    assert seen == [True]


@pytest.mark.parametrize(("training", "view"), [(True, None), (False, lambda pixels: 1 - pixels)])
def test_predict_gives_logits_in_order_and_leaves_the_mode(tiny, training, view):
    model = small(dropout=0.5).train(training)
    logits = ml.predict(model, tiny.val, view=view, batch_size=7)
    pixels = tiny.val.images.float() / 255
    inputs = tiny.val.normalise(pixels if view is None else view(pixels))
    assert model.training == training
    torch.testing.assert_close(logits, model.eval()(inputs))


# --- checkpoints --------------------------------------------------------------------------------

# Killed by itself, as by the machine's owner: no `finally` runs, no buffer is written.
KILLED = """
import os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
import test_train as t
from conftest import squares
torch.set_num_threads(int(sys.argv[4]))
step, count = torch.optim.SGD.step, 0
def killer(self, *args):
    global count
    count += 1
    if count == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)
torch.optim.SGD.step = killer
data = t.Dataset("squares", squares(256), squares(64, seed=1), test=None)
t.fit(t.small(), data, t.FULL, seed=2, checkpoint=sys.argv[2], progress=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_resumes_to_the_weights_of_one_never_stopped(tiny, tmp_path):
    path, here = tmp_path / "checkpoint", Path(__file__).parent
    arguments = [here, path, 8 + 8 + 3, torch.get_num_threads()]  # the third step of epoch 3
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    resumed = fit(small(), tiny, FULL, seed=2, checkpoint=path, progress=False)
    whole = fit(small(), tiny, FULL, seed=2, progress=False)
    assert same(resumed.model, whole.model)
    keys = ("epoch", "lr", "train_loss", "val_loss", "val_accuracy")
    assert [[r[k] for k in keys] for r in resumed.history] == [
        [r[k] for k in keys] for r in whole.history
    ]


@pytest.mark.parametrize(
    "change",
    [{"schedule": s} for s in train.CHOICES["schedule"]]
    + [{"optimizer": o} for o in train.CHOICES["optimizer"]]
    + [{"swa_epochs": 2, "ema": 0.0}],
    ids=lambda change: str(next(iter(change.values()))),
)
def test_every_schedule_and_optimizer_resumes_bit_for_bit(tiny, tmp_path, cut_off, change):
    recipe = replace(FULL, epochs=3, lr=0.01, patience=0, step_epochs=1, **change)
    whole = fit(small(), tiny, recipe, progress=False)
    with cut_off(3):
        fit(small(), tiny, recipe, checkpoint=tmp_path / "c", progress=False)
    assert same(
        fit(small(), tiny, recipe, checkpoint=tmp_path / "c", progress=False).model, whole.model
    )


@pytest.mark.parametrize("stop", [{}, {"target": 0.3}])
def test_a_finished_checkpoint_returns_without_training(tiny, tmp_path, steps, stop):
    recipe = Recipe(epochs=2, ema=0.5, **stop)
    first = fit(linear(), tiny, recipe, checkpoint=tmp_path / "deep" / "c", progress=False)
    steps.clear()
    again = fit(linear(), tiny, recipe, checkpoint=tmp_path / "deep" / "c", progress=False)
    assert steps == [] and same(first.model, again.model)
    assert again.history == first.history


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "another seed"),
        ({"recipe": Recipe(epochs=1, lr=0.2, momentum=0.5)}, "another lr, momentum"),
        ({"recipe": Recipe(epochs=1, augment=Augment(rotate=3))}, "another augment"),
        ({"model": small()}, "another model"),
        ({"data": "fewer"}, "another images"),
        ({"data": "renamed"}, "another data"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path, change, named):
    path = tmp_path / "c"
    given = {"model": linear(), "data": tiny, "recipe": Recipe(epochs=1), "seed": 0}
    fit(**given, checkpoint=path, progress=False)
    before = path.read_bytes()
    others = {
        "fewer": replace(tiny, train=tiny.train[:200]),
        "renamed": replace(tiny, name="other"),
    }
    change = {k: others.get(v, v) if k == "data" else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"{path} belongs to a run with {named}"):
        fit(**given | {"model": linear()} | change, checkpoint=path, progress=False)
    assert path.read_bytes() == before


def test_a_checkpoint_older_than_a_field_had_its_default(tiny, tmp_path, steps):
    path, recipe = tmp_path / "c", Recipe(epochs=1)
    fit(linear(), tiny, recipe, checkpoint=path, progress=False)
    saved = torch.load(path, weights_only=True)
    for field in ("teacher", "temperature", "hard", "attention", "weight_bits"):
        del saved["identity"][field]
    torch.save(saved, path)
    steps.clear()
    fit(linear(), tiny, recipe, checkpoint=path, progress=False)
    assert steps == []
    with pytest.raises(ValueError, match="another temperature; remove it"):
        fit(linear(), tiny, replace(recipe, temperature=2.0), checkpoint=path, progress=False)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\3\4 cut off"])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tiny, tmp_path, content):
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not a checkpoint"):
        fit(linear(), tiny, Recipe(epochs=1), checkpoint=path, progress=False)
    assert path.read_bytes() == content


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    train.write_atomically(path, b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="disk full"):
        train.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="no umask on this system")
def test_a_file_written_atomically_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    train.write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


# --- what is refused ----------------------------------------------------------------------------


def test_a_loss_that_diverges_stops_the_run(tiny):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch 1.*lower learning"):
        fit(small(), tiny, Recipe(epochs=2, lr=1e30, schedule="constant"), progress=False)


def test_a_run_that_stops_closes_its_bar(tiny, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with pytest.raises(FloatingPointError):
        fit(small(), tiny, Recipe(epochs=2, lr=1e30, schedule="constant"))
    assert capsys.readouterr().err.split("\r")[-1].strip() == ""  # what follows has its own line


def test_a_diverged_epoch_leaves_no_checkpoint(tiny, tmp_path):
    recipe = Recipe(epochs=2, lr=1e30, schedule="constant")
    with pytest.raises(FloatingPointError):
        fit(small(), tiny, recipe, checkpoint=tmp_path / "c", progress=False)
    assert list(tmp_path.iterdir()) == []


class Pair(nn.Module):
    """A model that gives two things."""

    def __init__(self):
        super().__init__()
        self.net = linear()

    def forward(self, images):
        return self.net(images), images


def with_labels(split: Split, value: int) -> Split:
    labels = split.labels.clone()
    labels[-1] = value
    return replace(split, labels=labels)


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (Dense(hidden=(), image_size=9, num_classes=4), {}, r"images of shape \[1, 8, 8\]"),
        (nn.Conv2d(3, 4, 3), {}, r"images of shape \[1, 8, 8\]"),
        (nn.Conv2d(1, 4, 3), {}, r"must give \[N, num_classes\], not \[2, 4, 6, 6\]"),
        (nn.Sequential(linear(), nn.Flatten(0)), {}, r"must give \[N, num_classes\], not \[8\]"),
        (nn.Sequential(linear(), nn.Unflatten(1, (2, 2)), nn.Flatten(0, 1)), {}, r"not \[4, 2\]"),
        (Pair(), {}, "'tuple' object"),
        (nn.Flatten(), {}, "no trainable parameters"),
        (linear().requires_grad_(False), {}, "no trainable parameters"),
        (
            linear(),
            {"train": lambda s: with_labels(s, 4)},
            "train labels run from 0 to 4.*4 outputs",
        ),
        (linear(), {"val": lambda s: with_labels(s, -1)}, "val labels run from -1 to 3"),
        (linear(), {"train": lambda s: s[:0]}, "train split of 'squares' is empty"),
        (linear(), {"val": lambda s: s[:0]}, "val split of 'squares' is empty"),
        (linear(), {"val": lambda s: replace(s, images=s.images[..., 1:])}, r"\[1, 8, 7\]"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(tiny, steps, model, change, message):
    data = replace(tiny, **{name: f(getattr(tiny, name)) for name, f in change.items()})
    with pytest.raises(ValueError, match=message):
        fit(model, data, Recipe(epochs=1), progress=False)
    assert steps == []


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(tiny, device):
    if train.pick_device().type == device:
        pytest.skip(f"{device} is there")
    with pytest.raises(ValueError, match=f"device='{device}' is not available here"):
        fit(linear(), tiny, device=device)


@pytest.mark.parametrize(
    ("there", "picked"), [((True, True), "cuda"), ((False, True), "mps"), ((False, False), "cpu")]
)
def test_the_best_device_is_picked(monkeypatch, there, picked):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there[1])
    assert train.pick_device() == torch.device(picked)
    assert train.pick_device("cpu") == CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_trains_the_same_bit_for_bit(tiny):
    runs = [fit(small(), tiny, FULL, device="cuda", progress=False) for _ in range(2)]
    assert runs[0].device == "cuda" and same(runs[0].model, runs[1].model)
    assert runs[0].history[-1]["val_accuracy"] > 0.9


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"step_epochs": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"gamma": 0.0},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"betas": (1.0, 0.999)},
        {"ema": 1.0},
        {"label_smoothing": 1.0},
        {"warmup": 1.0},
        {"weight_decay": -1e-4},
        {"patience": -1},
        {"clean_epochs": -1},
        {"clip": -1.0},
        {"swa_epochs": -1},
        {"swa_epochs": 6},
        {"temperature": 0.0},
        {"hard": 1.1},
        {"attention": -1.0},
        {"weight_bits": 1},
        {"weight_bits": 9},
        {"loss": "hinge"},
        {"target": 99.0},
        {"optimizer": "SGD"},
        {"schedule": "linear"},
        {"precision": "fp16"},
    ],
    ids=lambda field: "-".join(map(str, *field.items())),
)
def test_a_field_out_of_its_range_is_named(field):
    with pytest.raises(ValueError, match=f"^{next(iter(field))}="):
        Recipe(**field)


@pytest.mark.parametrize(
    ("field", "near"), [({"optimizer": "AdamW"}, "adamw"), ({"schedule": "one-cycle"}, "onecycle")]
)
def test_a_misspelt_choice_is_answered_with_the_near_one(field, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        Recipe(**field)


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match="label_smoothing belongs to cross-entropy"):
        Recipe(loss=F.cross_entropy, label_smoothing=0.1)
    with pytest.raises(ValueError, match="nesterov=True needs momentum"):
        Recipe(momentum=0.0)
    assert Recipe(momentum=0.0, optimizer="adam").momentum == 0  # it has none
    for other in ({"ema": 0.9}, {"target": 0.99}):
        with pytest.raises(ValueError, match="swa_epochs goes with no ema"):
            Recipe(swa_epochs=2, **other)


def test_a_recipe_is_described_in_plain_values():
    import json

    described = json.loads(json.dumps(Recipe(loss=nn.CrossEntropyLoss()).describe()))
    assert described.keys() == {f.name for f in fields(Recipe)}
    assert described["loss"] == "CrossEntropyLoss" and described["augment"]["rotate"] == 0
    assert Recipe(tta=(-3, 0, 3)).describe()["tta"] == [-3, 0, 3]
