"""Many seeds in one pass: the same as one by one."""

from dataclasses import replace

import mnistlab as ml
import pytest
import torch
from mnistlab.many import PLAIN, can_stack, fit_many

RECIPE = ml.Recipe(model="cnn-8k", epochs=1, batch_size=32, lr=0.05)


@pytest.fixture(scope="module")
def few(mnist):
    return ml.Dataset("few", mnist.train[:96], mnist.val[:200], test=None)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"augment": ml.Augment(rotate=10, shift=2)},
        {"optimizer": "adam", "lr": 0.001, "betas": (0.9, 0.9)},
        {"label_smoothing": 0.1, "schedule": "cosine"},
        {"loss": "mse", "model": "tinymnistnet-16k", "arguments": {"dropout": 0.0}},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_a_stack_trains_each_seed_as_it_would_be_alone(few, change):
    """Three steps: few enough for rounding not to grow."""
    recipe = replace(RECIPE, **change)
    for run, seed in zip(fit_many(few, recipe, [0, 3], progress=False), [0, 3], strict=True):
        alone = ml.fit(recipe.model, few, recipe, seed=seed, progress=False)
        assert run.seed == seed and not run.model.training
        torch.testing.assert_close(
            run.model.state_dict(), alone.model.state_dict(), atol=2e-4, rtol=2e-3
        )
        for key in ("epoch", "lr", "train_loss", "val_loss"):
            assert run.history[0][key] == pytest.approx(alone.history[0][key], rel=1e-3)
        logits = ml.predict(run.model, few.val)
        torch.testing.assert_close(logits, ml.predict(alone.model, few.val), atol=0.02, rtol=0.02)


def test_dropout_is_drawn_for_each_seed_alone(few):
    recipe = replace(RECIPE, model="dense-8k", arguments={"dropout": 0.5})
    first, second = fit_many(few, recipe, [0, 0], progress=False)
    assert not torch.equal(ml.predict(first.model, few.val), ml.predict(second.model, few.val))


def test_the_callers_random_state_is_left_alone(few, random_state_is_kept):
    fit_many(few, RECIPE, [0], progress=False)


@pytest.mark.parametrize(
    "change",
    [
        {"ema": 0.9},
        {"swa_epochs": 1},
        {"clip": 1.0},
        {"target": 0.9},
        {"teacher": "cnn-68k"},
        {"weight_bits": 4},
        {"schedule": "plateau"},
        {"loss": torch.nn.functional.cross_entropy},
        {"loss": "capsules"},
    ],
    ids=lambda change: "-".join(str(part) for part in next(iter(change.items()))[:2])[:30],
)
def test_what_a_stack_does_not_do_is_refused(few, change):
    recipe = replace(RECIPE, **change)
    assert not can_stack(recipe) and can_stack(RECIPE)
    with pytest.raises(
        ValueError, match=f"fit_many takes no plateau, own loss, capsules, {PLAIN[0]}"
    ):
        fit_many(few, recipe, [0])


def test_a_loss_that_diverges_stops_the_pass(few):
    with pytest.raises(FloatingPointError, match="no longer finite in epoch 1"):
        fit_many(few, replace(RECIPE, lr=1e30), [0, 1], progress=False)
