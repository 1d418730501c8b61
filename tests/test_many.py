"""Many runs in one pass: the same as one by one."""

from dataclasses import replace

import mnistlab as ml
import pytest
import torch
from mnistlab.many import ALONE, TOGETHER, WARM_UP, can_stack, fit_many

RECIPE = ml.Recipe(model="cnn-8k", epochs=2, batch_size=16, lr=0.05, augment=ml.Augment(rotate=10))
CHANGES = [
    {},
    {"optimizer": "adam", "lr": 0.001, "betas": (0.9, 0.9), "schedule": "step", "step_epochs": 1},
    {"optimizer": "adamw", "lr": 0.001, "schedule": "cosine", "channels_last": True},
    {"optimizer": "rmsprop", "lr": 0.001, "schedule": "plateau", "clip": 1.0},
    {"ema": 0.9, "label_smoothing": 0.1, "augment": ml.Augment()},
    {
        "swa_epochs": 1,
        "clean_epochs": 1,
        "schedule": "constant",
        "momentum": 0.0,
        "nesterov": False,
    },
    {"weight_bits": 4, "loss": "mse"},
    {"model": "capsules-8k", "optimizer": "adam", "lr": 0.001, "loss": "capsules"},
    {"model": "vit-8k", "loss": torch.nn.functional.cross_entropy},
]


@pytest.fixture(scope="module")
def few(mnist):
    return ml.Dataset("few", mnist.train[:200], mnist.val[:200], test=None)


def compare(few, jobs, device, tolerance, **settings):
    """Runs of one pass against the same runs alone: more steps than come before a capture."""
    assert len(few.train) // RECIPE.batch_size > 2 * WARM_UP
    together = fit_many(few, jobs, device=device, progress=False, **settings)
    for run, (recipe, seed) in zip(together, jobs, strict=True):
        alone = ml.fit(
            recipe.model, few, recipe, seed=seed, device=device, progress=False, **settings
        )
        assert (run.seed, run.recipe) == (seed, recipe) and not run.model.training
        weights, expected = run.model.state_dict(), alone.model.state_dict()
        torch.testing.assert_close(weights, expected, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip(run.history, alone.history, strict=True):
            for key in ("epoch", "lr", "train_loss", "val_loss", "val_accuracy"):
                assert ours[key] == pytest.approx(theirs[key], rel=tolerance, abs=tolerance)


def test_a_pass_trains_each_run_as_it_would_be_alone(few):
    """Of different models, optimisers, schedules and losses, all in one pass."""
    jobs = [(replace(RECIPE, **change), seed) for seed, change in enumerate(CHANGES)]
    compare(few, jobs, "cpu", 0)


def test_students_have_their_teacher(few):
    teacher = ml.build("cnn-8k")
    recipe = replace(RECIPE, teacher="cnn-8k")
    compare(few, [(recipe, 0), (replace(recipe, hard=0.5), 1)], "cpu", 0, teacher=teacher)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(change)[:30] or "plain")
def test_a_graph_steps_as_its_loops_do(few, change):
    recipe = replace(RECIPE, **change)
    compare(few, [(recipe, 0), (recipe, 1)], "cuda", 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_of_students(few):
    recipe = replace(RECIPE, teacher="cnn-8k")
    compare(few, [(recipe, 0), (recipe, 1)], "cuda", 1e-3, teacher=ml.build("cnn-8k"))


def test_dropout_is_drawn_for_each_run_alone(few):
    recipe = replace(RECIPE, model="dense-8k", arguments={"dropout": 0.5})
    first, second = fit_many(few, [(recipe, 0), (recipe, 0)], progress=False)
    assert not torch.equal(ml.predict(first.model, few.val), ml.predict(second.model, few.val))


def test_the_callers_random_state_is_left_alone(few, random_state_is_kept):
    fit_many(few, [(RECIPE, 0)], progress=False)


@pytest.mark.parametrize("change", [{"target": 0.9}, {"compile": True}, {"resplit": True}])
def test_what_a_pass_does_not_do_is_refused(few, change):
    recipe = replace(RECIPE, **change)
    assert can_stack(RECIPE) and not can_stack(recipe)
    with pytest.raises(ValueError, match=f"no {', '.join(ALONE)}"):
        fit_many(few, [(recipe, 0)])


@pytest.mark.parametrize("change", [{"epochs": 3}, {"batch_size": 32}, {"teacher": "cnn-68k"}])
def test_runs_that_cannot_go_in_step_are_refused(few, change):
    with pytest.raises(ValueError, match=f"the same {', '.join(TOGETHER)}"):
        fit_many(few, [(RECIPE, 0), (replace(RECIPE, **change), 0)])


def test_students_without_their_teacher_are_refused(few):
    with pytest.raises(ValueError, match="the recipe has a teacher"):
        fit_many(few, [(replace(RECIPE, teacher="cnn-68k"), 0)])


def test_a_run_that_diverges_leaves_the_others_as_they_are(few):
    jobs = [(replace(RECIPE, lr=1e30), 0), (RECIPE, 1)]
    error, run = fit_many(few, jobs, progress=False)
    assert isinstance(error, FloatingPointError) and "in epoch 1" in str(error)
    alone = ml.fit(RECIPE.model, few, RECIPE, seed=1, progress=False)
    assert run.history[-1]["val_loss"] == alone.history[-1]["val_loss"]


def test_no_runs_are_no_pass(few):
    assert fit_many(few, []) == []
