"""Pruning, folding, quantisation and the packed file: what they change, and what they must not."""

import zlib
from dataclasses import replace

import mnistlab as ml
import pytest
import torch
from mnistlab import compress
from mnistlab.models import CNN, Dense, SeparableCNN, SimpleCNN, TinyMNISTNet, count_parameters
from torch import nn

RECIPE = ml.Recipe(epochs=2, batch_size=64, lr=0.05)


def lived_in(model: nn.Module) -> nn.Module:
    """In eval mode, with random biases, norms and statistics, as a trained net has them."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def net() -> nn.Module:
    """For `tiny`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lived_in(CNN(widths=(6, 8), num_classes=4))


@pytest.fixture(scope="module")
def images(mnist) -> torch.Tensor:
    return mnist.val[:32].inputs()


@torch.no_grad()
def outputs(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


# --- pruning ------------------------------------------------------------------------------------


def test_the_smallest_weights_of_all_layers_are_masked(net):
    before = [w.clone() for w in weights(net)]
    pruned = compress.prune(net, 0.75)
    sizes = torch.cat([w.abs().flatten() for w in before])
    limit = sizes.sort().values[round(0.75 * len(sizes))]
    for old, new in zip(before, weights(pruned), strict=True):
        assert torch.equal(new, old * (old.abs() >= limit))
    assert compress.sparsity(pruned) == pytest.approx(0.75, abs=1 / len(sizes))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))


@pytest.mark.parametrize("change", [{}, {"ema": 0.5}, {"swa_epochs": 1}, {"weight_bits": 4}])
def test_masks_survive_fine_tuning_and_become_permanent(tiny, net, change):
    pruned = compress.prune(net, 0.5)
    before = [w.clone() for w in weights(pruned)]
    run = ml.fit(pruned, tiny, replace(RECIPE, **change), progress=False)
    finished = compress.finish(run.model)
    zeros = zip(before, weights(finished), strict=True)
    assert all(not torch.equal(a, b) and (b[a == 0] == 0).all() for a, b in zeros)
    assert finished.state_dict().keys() == net.state_dict().keys()
    torch.testing.assert_close(ml.predict(finished, tiny.val), ml.predict(run.model, tiny.val))


def test_pruning_again_takes_of_what_is_left(net):
    twice = compress.prune(compress.prune(net, 0.5), 0.5)
    assert compress.sparsity(twice) == pytest.approx(0.75, abs=0.01)


def test_what_was_trained_channels_last_can_be_pruned_and_pruned_again(tiny, net):
    recipe = replace(RECIPE, epochs=1, channels_last=True)
    model = ml.fit(net, tiny, recipe, progress=False).model
    assert not weights(model)[1].is_contiguous()
    for share in (0.5, 0.75):
        model = compress.prune(model, 0.5)
        assert compress.sparsity(model) == pytest.approx(share, abs=0.01)
        model = ml.fit(model, tiny, recipe, progress=False).model


CHAINS = [
    ("CNN", lambda: CNN(widths=(6, 8, 8))),
    ("TinyMNISTNet", lambda: TinyMNISTNet(channels=(4, 4, 6, 6, 8, 8), norm="none")),
    ("SeparableCNN", lambda: SeparableCNN(widths=(4, 6, 8), bias=True)),  # depthwise
    ("SimpleCNN", lambda: SimpleCNN(channels=(3, 4), hidden=8)),  # 49 columns a channel
    ("Dense", lambda: Dense(hidden=(8, 6))),
]


@pytest.mark.parametrize("make", [make for _, make in CHAINS], ids=[name for name, _ in CHAINS])
def test_to_cut_channels_that_are_zero_changes_no_logit(make, images):
    model = lived_in(make())
    layers = list(compress._sequence(model))
    dead: list[int] = []
    with torch.no_grad():
        for layer in layers[: layers.index([m for m in layers if hasattr(m, "weight")][-1])]:
            depthwise = compress._depthwise(layer)
            if isinstance(layer, nn.Conv2d | nn.Linear) and not depthwise:
                dead = list(range(len(layer.weight)))[1::2] or [0]
            for name, value in layer.named_parameters():
                if name == "bias" or not depthwise:
                    value[dead] = 0.0  # of a normalisation, weight and bias
    cut = compress.prune(model, 0.5, structured=True)
    assert count_parameters(cut) < 0.7 * count_parameters(model)
    torch.testing.assert_close(outputs(cut, images), outputs(model, images), atol=1e-4, rtol=1e-4)
    for old, new in zip(layers, compress._sequence(cut), strict=True):
        if isinstance(old, nn.Conv2d) and new is not list(compress._sequence(cut))[-1]:
            assert new.weight.shape[0] == new.out_channels
            assert new.weight.shape[1] == new.in_channels // new.groups
    assert repr(make()) == repr(model)  # the argument is left as it was


def test_a_cut_net_is_one_of_smaller_widths_and_trains(tiny, net):
    cut = compress.prune(net, 0.5, structured=True)
    assert repr(cut) == repr(CNN(widths=(3, 4), num_classes=4))
    norms = weights(net)[0].abs().sum((1, 2, 3))
    kept = norms.argsort(descending=True)[:3].sort().values
    assert torch.equal(weights(cut)[0], weights(net)[0][kept])
    run = ml.fit(cut, tiny, RECIPE, progress=False)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    least = compress.prune(net, 0.99, structured=True)
    assert repr(least) == repr(CNN(widths=(1, 1), num_classes=4))


@pytest.mark.parametrize(
    ("name", "said"),
    [("vit-8k", "cut ViT"), ("efficientnet-8k", "cut "), ("convnext-8k", "cut ")],
)
def test_what_structured_pruning_cannot_cut_is_named(name, said):
    with pytest.raises(ValueError, match=f"structured pruning does not know how to {said}"):
        compress.prune(ml.build(name), 0.5, structured=True)


def test_what_cannot_be_pruned_is_refused(net):
    for fraction in (-0.1, 1, 1.0):
        with pytest.raises(ValueError, match=f"fraction={fraction}: must be in 0..1, below 1"):
            compress.prune(net, fraction)
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        compress.prune(nn.BatchNorm2d(3), 0.5)
    twice = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU())
    twice.append(twice[1])
    with pytest.raises(ValueError, match="a layer that runs twice"):
        compress.prune(twice, 0.5, structured=True)
    masked = compress.prune(net, 0.5)
    for call in (
        lambda: compress.prune(masked, 0.5, structured=True),
        lambda: compress.fold(masked),
        lambda: compress.quantize(masked, 4),
        lambda: compress.pack(masked, 4),
    ):
        with pytest.raises(ValueError, match="the model has masked weights"):
            call()


# --- folding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["cnn-8k", "dense-8k", "efficientnet-8k", "separable-4k", "bottleneck-7k"]
)
def test_folding_changes_no_logit(name, images):
    model = lived_in(ml.build(name))
    folded = compress.fold(model)
    torch.testing.assert_close(
        outputs(folded, images), outputs(model, images), atol=1e-4, rtol=1e-4
    )
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert bool(left) == (name == "bottleneck-7k")  # which normalises behind the activation


def test_what_runs_twice_is_not_folded():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = lived_in(nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), conv, nn.BatchNorm2d(2)))
    x = torch.randn(2, 2, 5, 5)
    folded = compress.fold(model)
    assert torch.equal(outputs(folded, x), outputs(model, x))
    assert count_parameters(folded) == count_parameters(model)


# --- quantisation -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", compress.BITS)
def test_a_channels_weights_are_few_multiples_of_a_half_precision_step(bits):
    weight = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    weight[2], weight[3] = 0.0, weight[3] * 1e-9
    codes, step = compress._codes(weight, bits)
    top = 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round()) and codes.abs().max() == top
    assert torch.equal(step, step.half().float()) and step.shape == (6, 1)
    assert (codes[2:4] * step[2:4]).abs().max() < 1e-7
    flat = weight.flatten(1)
    error = (codes * step - flat).square().sum(1)
    for clip in (0.4, 0.6, 0.8, 1.0):  # no step of this scale is better by much
        other = flat.abs().amax(1, keepdim=True).clamp(min=1e-9) * clip / top
        rounded = (flat / other).round().clamp(-top, top) * other
        assert (error <= 1.05 * (rounded - flat).square().sum(1) + 1e-12).all()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_weights_that_are_on_a_grid_stay(net, bits):
    once = compress.quantize(net, bits)
    again = compress.quantize(once, bits)
    assert all(torch.equal(a, b) for a, b in zip(weights(once), weights(again), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights(once), weights(net), strict=True))


def test_quantisation_leaves_one_dimension_in_half_precision(net):
    small = compress.quantize(net, 2)
    for old, new in zip(net.parameters(), small.parameters(), strict=True):
        if old.ndim == 1:
            assert torch.equal(new, old.half().float())
    net[-1].bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"bias holds numbers that float16 does not"):
        compress.quantize(net, 2)


def test_straight_through_gradients_are_those_of_lsq():
    """Esser et al. 2020, eqs. 1 to 3, here with a step for each channel."""
    weight = torch.tensor([[0.9, -0.3, 0.1, -2.0], [0.2, 0.5, -0.4, 0.0]], requires_grad=True)
    quantiser = compress.Quantiser(weight, bits=3)  # -3 to 3
    with torch.no_grad():
        torch.testing.assert_close(quantiser.step, 2 * weight.abs().mean(1) / 3**0.5)
        quantiser.step.copy_(torch.tensor([0.25, 0.125]))
    out, given = quantiser(weight), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    expected = torch.tensor([[0.75, -0.25, 0, -0.75], [0.25, 0.375, -0.375, 0]])
    torch.testing.assert_close(out.detach(), expected)
    (out * given).sum().backward()
    inside = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])  # 0.5 / 0.125 is 4: outside
    torch.testing.assert_close(weight.grad, given * inside)
    ratio = weight.detach() / torch.tensor([[0.25], [0.125]])
    slope = torch.where(inside.bool(), ratio.round() - ratio, 3 * ratio.sign())
    expected = (given * slope).sum(1) / (4 * 3) ** 0.5
    torch.testing.assert_close(quantiser.step.grad, expected)


@pytest.mark.parametrize("step", [0.001, -1.0])
def test_a_step_that_falls_to_nothing_is_held_by_the_largest_weight(step):
    weight = torch.tensor([[0.9, -0.2, 0.05, -2.4]], requires_grad=True)
    quantiser = compress.Quantiser(weight, bits=3)
    quantiser.step.data.fill_(step)
    out = quantiser(weight)
    least = (torch.tensor(2.4) / 12).half().float()
    torch.testing.assert_close(out.detach(), least * torch.tensor([[3.0, -1.0, 0.0, -3.0]]))
    out.sum().backward()
    assert quantiser.step.grad.item() == 0


@pytest.mark.parametrize("change", [{}, {"ema": 0.5}, {"swa_epochs": 1}], ids=["", "ema", "swa"])
def test_quantisation_aware_training_ends_with_weights_of_so_many_bits(tiny, net, change):
    recipe = replace(RECIPE, weight_bits=3, **change)
    run = ml.fit(net, tiny, recipe, progress=False)
    for model in (run.model, net):
        assert model.state_dict().keys() == CNN(widths=(6, 8), num_classes=4).state_dict().keys()
        for weight in weights(model):
            codes, step = compress._codes(weight, 3)
            assert torch.equal((codes * step).view_as(weight), weight)
    accuracy = ml.evaluate(run.model, tiny.val).accuracy  # what was validated is what is given
    assert accuracy == run.history[-1]["val_accuracy"]
    small = compress.quantize(compress.fold(run.model), 3)
    again = compress.unpack(compress.pack(small, 3), CNN(widths=(6, 8), num_classes=4))
    assert torch.equal(ml.predict(again, tiny.val), ml.predict(small, tiny.val))


def test_it_beats_rounding_afterwards_at_two_bits(tiny):
    def loss(bits: int) -> float:
        recipe = replace(RECIPE, epochs=6, batch_size=32, weight_bits=bits)
        torch.manual_seed(0)
        model = ml.fit(CNN(widths=(6, 8), num_classes=4), tiny, recipe, progress=False).model
        return ml.evaluate(compress.quantize(compress.fold(model), 2), tiny.val).loss

    with torch.random.fork_rng():
        assert loss(2) < 0.8 * loss(0)


def test_quantisation_aware_training_resumes_bit_for_bit(tiny, net, tmp_path, cut_off):
    recipe, copies = replace(RECIPE, weight_bits=4), [compress.finish(net) for _ in range(3)]
    whole = ml.fit(copies[0], tiny, recipe, progress=False).model
    with cut_off(2):
        ml.fit(copies[1], tiny, recipe, checkpoint=tmp_path / "c", progress=False)
    assert copies[1].state_dict().keys() == net.state_dict().keys()  # usable all the same
    resumed = ml.fit(copies[2], tiny, recipe, checkpoint=tmp_path / "c", progress=False).model
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# --- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", ["cnn-8k", "tinymnistnet-16k", "separable-4k", "dense-8k"])
def test_a_packed_model_is_unpacked_bit_for_bit(name, bits, images):
    small = compress.quantize(compress.fold(lived_in(ml.build(name))), bits)
    content = compress.pack(small, bits)
    assert torch.equal(outputs(compress.unpack(content, ml.build(name)), images),
                       outputs(small, images))  # fmt: skip
    plain = compress.pack(small, bits, entropy=False)
    assert torch.equal(outputs(compress.unpack(plain, small), images), outputs(small, images))
    numbers = sum(len(p) if p.ndim > 1 else p.numel() for p in small.parameters())
    codes = sum(p.numel() for p in small.parameters() if p.ndim > 1)
    assert len(plain) == 13 + 2 * numbers + -(-codes * bits // 8)
    assert len(content) <= len(plain)


@pytest.mark.parametrize("name", ["vit-8k", "capsules-8k", "bottleneck-7k", "convnext-8k"])
def test_other_families_are_packed_too(name, images):
    small = compress.quantize(lived_in(ml.build(name)), 5)
    again = compress.unpack(compress.pack(small, 5), ml.build(name))
    assert torch.equal(outputs(again, images), outputs(small, images))


def test_zeros_cost_little(net):
    some, many = (compress.quantize(compress.finish(compress.prune(ml.build("cnn-8k"), f)), 8)
                  for f in (0.1, 0.9))  # fmt: skip
    assert len(compress.pack(many, 8)) < 0.4 * len(compress.pack(some, 8))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_integers_take_little_more_than_their_entropy(bits):
    small = compress.quantize(compress.fold(ml.trained("cnn-8k")), bits)
    codes = torch.cat([compress._codes(w, bits)[0].flatten() for w in weights(small)])
    share = codes.unique(return_counts=True)[1] / len(codes)
    entropy = -(share * share.log2()).sum().item() * len(codes) / 8  # bytes
    rest = 13 + 2 * sum(len(w) for w in weights(small)) * 2  # head, steps and biases
    assert entropy < len(compress.pack(small, bits)) - rest < 1.04 * entropy


def test_eight_bits_change_few_predictions(mnist):
    model = ml.trained("cnn-8k")
    small = compress.quantize(compress.fold(model), 8)
    few = mnist.val[:1000]
    before, after = (ml.evaluate(m, few).predictions for m in (model, small))
    assert (before != after).sum() <= 2
    assert len(compress.pack(small, 8)) < 4 * count_parameters(model) / 3.8


def test_a_damaged_or_foreign_file_is_refused(net):
    small = compress.quantize(net, 4)
    content = compress.pack(small, 4)
    for place in (3, 4, 5, 9, 13, len(content) // 2, len(content) - 1):
        broken = bytearray(content)
        broken[place] ^= 1
        with pytest.raises(ValueError, match="the packed model is damaged: checksum"):
            compress.unpack(bytes(broken), net)
    with pytest.raises(ValueError, match="damaged"):
        compress.unpack(content[:-1], net)
    for other in (b"", content[:12], b"PK" + content[2:]):
        with pytest.raises(ValueError, match="not a packed model"):
            compress.unpack(other, net)
    newer = bytearray(content)
    newer[2] = 2
    with pytest.raises(ValueError, match="of version 2; this is for version 1"):
        compress.unpack(bytes(newer), net)
    with pytest.raises(ValueError, match="of another architecture"):
        compress.unpack(content, CNN(widths=(6, 9), num_classes=4))
    assert zlib.crc32(content) == zlib.crc32(compress.pack(small, 4))  # the same each time


def test_what_was_not_quantised_is_not_packed(net):
    with pytest.raises(ValueError, match=r"is not of 4 bits: pack\(quantize\(model, 4\), 4\)"):
        compress.pack(net, 4)
    with pytest.raises(ValueError, match="is not of 3 bits"):
        compress.pack(compress.quantize(net, 4), 3)
    for bits in (1, 9):
        for call in (compress.quantize, compress.pack):
            with pytest.raises(ValueError, match=f"bits={bits}: must be in 2..8"):
                call(net, bits)
