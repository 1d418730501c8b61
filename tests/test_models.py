"""Architectures: exact sizes, shapes, and that each of them can learn."""

import mnistlab as ml
import pytest
import torch
from mnistlab.models import CNN, PRESETS, Dense, catalogue, count_macs, count_parameters
from torch import nn

EXACT = {
    "linear-8k": 7_850,
    "dense-8k": 8_470,
    "dense-68k": 67_978,
    "simplecnn-8k": 7_546,
    "simplecnn-65k": 65_414,
    "simplecnn-421k": 421_834,
    "cnn-8k": 7_942,
    "cnn-68k": 67_994,
    "fastcnn-106k": 106_234,
    "tinymnistnet-15k": 15_774,  # layer by layer in its text; without batch normalisation
    "tinymnistnet-16k": 15_882,
    "bottleneck-5k": 5_904,  # the playground's models 1, 2, 3 and 3a
    "bottleneck-6k": 6_056,
    "bottleneck-7k": 7_602,
    "separable-4k": 4_560,
    "separable-9k": 9_730,
}


def test_every_preset_has_its_exact_number_of_parameters():
    assert {name: count_parameters(ml.build(name)) for name in PRESETS} == EXACT


def test_the_catalogue_agrees_with_the_models():
    rows = catalogue()
    assert {row["name"]: row["params"] for row in rows} == EXACT
    for row in rows:
        assert row["family"] == type(ml.build(row["name"])).__name__
        assert row["macs"] == count_macs(ml.build(row["name"])) > 0
        assert row["source"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_budget_in_a_name_is_the_size_to_within_a_thousand(name):
    thousands = int(name.split("-")[1].removesuffix("k"))
    assert abs(EXACT[name] / 1000 - thousands) < 1


def test_presets_compared_have_the_same_budget():
    assert EXACT["cnn-8k"] < 8_000 and EXACT["cnn-8k"] < EXACT["dense-8k"]
    assert abs(EXACT["cnn-68k"] / EXACT["dense-68k"] - 1) < 0.03


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 28, 10), (3, 32, 100)])
def test_output_is_one_logit_a_class_for_grey_and_for_colour(name, channels, size, classes):
    arguments = {"in_channels": channels, "num_classes": classes}
    if PRESETS[name].family is Dense:
        arguments["image_size"] = size
    model = ml.build(name, **arguments).eval()
    assert model(torch.zeros(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "near"), [("cnn68k", "cnn-68k"), ("Dense-8k", "dense-8k"), ("simple", "simplecnn-8k")]
)
def test_an_unknown_name_is_answered_with_the_near_ones(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; near it: .*{near}"):
        ml.build(name)


def test_a_name_near_to_none_is_answered_with_all():
    with pytest.raises(ValueError, match=", ".join(PRESETS)):
        ml.build("zzz")


def test_build_draws_from_the_global_random_state():
    def weights(seed):
        torch.manual_seed(seed)
        return ml.build("cnn-8k")[-1].weight

    with torch.random.fork_rng():
        assert torch.equal(weights(0), weights(0))
        assert not torch.equal(weights(0), weights(1))


def test_build_overrides_a_presets_arguments():
    assert count_parameters(ml.build("dense-8k", hidden=(), num_classes=2)) == 784 * 2 + 2


def test_cnn_needs_two_widths():
    with pytest.raises(ValueError, match="two widths or more"):
        CNN(widths=(8,))


def test_only_trainable_parameters_are_counted():
    model = nn.Linear(3, 4)
    model.bias.requires_grad = False
    assert count_parameters(model) == 12


def test_macs_of_a_convolution_are_those_counted_by_hand():
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
    positions, each = 14 * 14, 8 * 3 * 5 * 5  # output pixels; products for one of them
    assert count_macs(conv, (3, 28, 28)) == positions * each


def test_macs_of_the_linear_model_are_its_parameters():
    assert count_macs(ml.build("linear-8k")) == 7_850  # torchinfo counts a bias as one each


def test_counting_macs_leaves_the_mode_as_it_was():
    model = ml.build("cnn-8k")
    count_macs(model)
    assert model.training


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_64_images_to_the_last(name, mnist):
    few = mnist.train[:64]
    recipe = ml.Recipe(epochs=600, batch_size=64, optimizer="adam", lr=0.01, target=1.0)
    run = ml.fit(name, ml.Dataset("few", few, few, test=None), recipe, progress=False)
    assert run.history[-1]["val_accuracy"] == 1
