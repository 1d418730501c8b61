"""The modern blocks against implementations that others trust: copied weights, float64, outputs
and every gradient."""

import math
from functools import partial

import mnistlab as ml  # before torchvision
import pytest
import torch
from mnistlab import recipes
from mnistlab.models import (
    PRESETS,
    EfficientNet,
    capsules,
    convnext,
    count_parameters,
    efficientnet,
    layers,
    vit,
)
from torch import Tensor, nn
from torchvision.models import efficientnet as tv_efficientnet
from torchvision.models.vision_transformer import EncoderBlock
from torchvision.ops import SqueezeExcitation

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def copied(ours: nn.Module, theirs: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Both in float64 and eval mode, with the same random weights and statistics."""
    for value in theirs.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5).mul_(torch.randn_like(value).sign() if value.ndim > 1 else 1)
    names, values = ours.state_dict(), theirs.state_dict().values()
    pairs = zip(names.items(), values, strict=True)
    ours.load_state_dict({name: value.view(own.shape) for (name, own), value in pairs})
    return ours.double().eval(), theirs.double().eval()


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Same output, and same gradients of the input and of every parameter."""
    outputs, gradients = [], []
    for model in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        wanted = [leaf, *model.parameters()]
        outputs.append(out)
        gradients.append(torch.autograd.grad((out * weights).sum(), wanted))
    close(*outputs)
    for own, other in zip(*gradients, strict=True):
        # Sums of many terms may cancel: what is near zero is held to the size of the rest.
        close(own.flatten(), other.flatten(), atol=1e-12 * other.abs().max().clamp(min=1).item())


# --- EfficientNet -------------------------------------------------------------------------------


def test_squeeze_and_excitation_is_torchvisions():
    theirs = SqueezeExcitation(12, 3, activation=nn.SiLU)
    ours = efficientnet.SqueezeExcitation(12, 3)
    assert_same(*copied(ours, theirs), torch.randn(4, 12, 7, 7).double())


@pytest.mark.parametrize(
    ("a", "b", "kernel", "stride", "expand"),
    [(8, 8, 3, 1, 6), (8, 12, 5, 2, 4), (8, 8, 3, 1, 1), (16, 24, 3, 2, 1), (3, 3, 5, 1, 2)],
)
def test_mbconv_is_torchvisions(a, b, kernel, stride, expand):
    config = tv_efficientnet.MBConvConfig(expand, kernel, stride, a, b, 1)
    config.input_channels, config.out_channels = a, b  # it rounds them to eights
    config.adjust_channels = lambda channels, width_mult, min_value=None: int(channels * width_mult)
    theirs = tv_efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)
    ours = efficientnet.mbconv(a, b, kernel, stride, expand)
    assert_same(*copied(ours, theirs), torch.randn(3, a, 9, 9).double())


@pytest.mark.parametrize(
    ("width", "depth", "name"), [(1.0, 1.0, "b0"), (1.1, 1.2, "b2"), (1.4, 1.8, "b4")]
)
def test_compound_scaling_gives_the_papers_family(width, depth, name):
    ours = EfficientNet(width=width, depth=depth, in_channels=3, num_classes=1000)
    theirs = getattr(tv_efficientnet, f"efficientnet_{name}")()
    assert count_parameters(ours) == count_parameters(theirs)
    shapes = [[list(p.shape) for p in model.parameters()] for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_the_whole_b0_is_torchvisions():
    ours, theirs = (
        EfficientNet(in_channels=3, num_classes=7),
        tv_efficientnet.efficientnet_b0(num_classes=7),
    )
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.randn(2, 3, 64, 64).double()
    with torch.no_grad():
        close(ours.double().eval()(x), theirs.double().eval()(x))


def test_stochastic_depth_drops_an_images_branch_or_scales_it_up():
    drop = layers.StochasticDepth(0.25)
    x = torch.randn(4000, 3, 2, 2)
    out = drop(x)
    kept = out.flatten(1).abs().sum(1) > 0
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert torch.equal(drop.eval()(x), x)


def test_a_ghosts_cheap_half_is_made_from_its_other_half():
    ghost = efficientnet.Ghost(6, 9).eval()
    out = ghost(torch.randn(2, 6, 8, 8))
    assert out.shape == (2, 9, 8, 8)
    close(ghost.cheap(out[:, :5])[:, :4], out[:, 5:])


@pytest.mark.parametrize("block", efficientnet.BLOCKS)
def test_kernels_and_strides_may_differ_by_axis(block):
    stages = ((2, 8, 2, (1, 2), (1, 7)),)
    net = EfficientNet(stages, stem=8, head=16, block=block)
    assert net[1](torch.zeros(1, 8, 14, 14)).shape == (1, 8, 14, 7)
    kernels = {m.kernel_size for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert (1, 7) in kernels and (7, 7) not in kernels


def test_what_an_efficientnet_does_not_know_is_refused():
    with pytest.raises(ValueError, match="block='mbconf': one of mbconv, inverted"):
        ml.build("efficientnet-8k", block="mbconf")
    with pytest.raises(ValueError, match="squeeze='all': one of input, expanded, none"):
        ml.build("efficientnet-8k", squeeze="all")


# --- ViT ----------------------------------------------------------------------------------------


def test_encoder_block_is_torchvisions():
    theirs = EncoderBlock(4, 24, 40, 0.0, 0.0, norm_layer=partial(nn.LayerNorm, eps=1e-6))
    assert_same(*copied(vit.Block(24, 4, 40), theirs), torch.randn(3, 10, 24).double())


def test_attention_is_softmax_written_out():
    layer = vit.Attention(12, 3).double()
    x = torch.randn(2, 5, 12).double()
    q, k, v = layer.qkv(x).chunk(3, -1)
    out, weights = [], []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        scores = torch.einsum("ntd,nsd->nts", q[..., part], k[..., part]) / math.sqrt(4)
        share = scores.exp() / scores.exp().sum(-1, keepdim=True)
        weights.append(share)
        out.append(torch.einsum("nts,nsd->ntd", share, v[..., part]))
    close(layer(x), layer.out(torch.cat(out, -1)))
    close(layer.weights(x), torch.stack(weights, 1))


def test_sinusoids_are_those_of_the_paper():
    table = vit.sinusoids(7, 6)
    for position in range(7):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert abs(table[position, 2 * i].item() - math.sin(angle)) < 1e-6
            assert abs(table[position, 2 * i + 1].item() - math.cos(angle)) < 1e-6


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "none"])
@pytest.mark.parametrize("pool", ["class", "mean"])
def test_only_positions_tell_a_vit_the_order_of_its_patches(positions, pool):
    net = ml.build("vit-8k", positions=positions, pool=pool).eval()
    if positions == "learned":
        nn.init.normal_(net.positions)
    image = torch.randn(1, 1, 28, 28)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 1, 49, 4, 4)
    dealt = patches[:, :, torch.randperm(49)].view(1, 1, 7, 7, 4, 4)
    shuffled = dealt.permute(0, 1, 2, 4, 3, 5).reshape(1, 1, 28, 28)
    same = torch.allclose(net(image), net(shuffled), atol=1e-5)
    assert same == (positions == "none")


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="patch=5 must divide image_size=28"):
        ml.build("vit-8k", patch=5)
    with pytest.raises(ValueError, match="heads=3 must divide width=16"):
        ml.build("vit-8k", heads=3)
    with pytest.raises(ValueError, match="pool='max': one of class, mean"):
        ml.build("vit-8k", pool="max")


# --- ConvNeXt V2 --------------------------------------------------------------------------------


def test_convnext_block_is_timms():
    from timm.models.convnext import ConvNeXtBlock

    theirs = ConvNeXtBlock(12, use_grn=True, ls_init_value=None)
    assert_same(*copied(convnext.Block(12), theirs), torch.randn(2, 12, 9, 9).double())


def test_grn_is_timms():
    from timm.layers.grn import GlobalResponseNorm

    ours, theirs = copied(convnext.GRN(10), GlobalResponseNorm(10))
    assert_same(ours, theirs, torch.randn(3, 6, 6, 10).double())


def test_grn_starts_as_the_identity_and_has_a_gradient_for_an_empty_map():
    x = torch.randn(2, 4, 4, 6)
    assert torch.equal(convnext.GRN(6)(x), x)
    empty = torch.zeros(1, 4, 4, 6, requires_grad=True)
    convnext.GRN(6)(empty).sum().backward()
    assert empty.grad.isfinite().all()


def test_without_grn_a_convnext_block_has_fewer_parameters():
    assert (
        count_parameters(convnext.Block(8)) - count_parameters(convnext.Block(8, grn=False)) == 64
    )


def test_the_stem_fits_the_size_of_the_image():
    assert ml.build("convnext-18k")[0].stride == (2, 2)
    assert ml.build("convnext-18k", image_size=224)[0].stride == (4, 4)
    with pytest.raises(ValueError, match="4 dims and 2 depths"):
        ml.build("convnext-18k", depths=(1, 1))


# --- capsules -----------------------------------------------------------------------------------


def lengths(v: Tensor) -> Tensor:
    return v.norm(dim=-1)


def test_squash_keeps_direction_and_bounds_length():
    s = torch.randn(50, 6).double() * 3
    n = lengths(s)[:, None]
    close(capsules.squash(s), s / n * n**2 / (1 + n**2), rtol=1e-7)
    close(capsules.soft_squash(s), s / n * (1 - (-n).exp()), rtol=1e-7)
    zero = torch.zeros(2, 6, requires_grad=True)
    (capsules.squash(zero) + capsules.soft_squash(zero)).sum().backward()
    assert zero.grad.isfinite().all()


def routed_by_loops(votes: Tensor, iterations: int) -> Tensor:
    """Procedure 1 of Sabour et al. 2017, part by part and whole by whole."""
    images, wholes, parts, dims = votes.shape
    poses = []
    for n in range(images):
        b = [[torch.zeros(()).double() for _ in range(wholes)] for _ in range(parts)]
        for iteration in range(iterations):
            last = iteration == iterations - 1
            u = votes[n] if last else votes[n].detach()
            v = []
            for k in range(wholes):
                s = torch.zeros(dims).double()
                for i in range(parts):
                    s = s + torch.stack(b[i]).softmax(0)[k] * u[k, i]
                v.append(s * (s.square().sum() + 1e-9).sqrt() / (1 + s.square().sum() + 1e-9))
            if not last:
                b = [[b[i][k] + u[k, i] @ v[k] for k in range(wholes)] for i in range(parts)]
        poses.append(torch.stack(v))
    return torch.stack(poses)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_routing_is_the_procedure_in_loops(iterations):
    results = []
    for f in (lambda u: capsules.route(u, iterations)[0], lambda u: routed_by_loops(u, iterations)):
        votes = torch.linspace(-2, 2, 2 * 3 * 4 * 5).sin().view(2, 3, 4, 5).double()
        votes = votes.mul(3).requires_grad_()
        poses = f(votes)
        results.append((poses, *torch.autograd.grad(poses.sin().sum(), votes)))
    for own, other in zip(*results, strict=True):
        close(own, other)


def test_routing_shares_each_part_out():
    _, shares = capsules.route(torch.randn(2, 3, 7, 4) * 5)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 7))


def test_attention_routing_is_written_out():
    votes, prior = torch.randn(2, 3, 5, 4).double(), torch.randn(3, 5).double()
    poses, shares = capsules.attend(votes, prior)
    for n in range(2):
        products = torch.stack([votes[n, k] @ votes[n, k].T / math.sqrt(4) for k in range(3)])
        expected = products.sum(1).softmax(0) + prior  # [K, I]: over the wholes
        close(shares[n], expected)
        close(poses[n], capsules.soft_squash((expected[..., None] * votes[n]).sum(1)))


def test_margin_loss_is_written_out():
    poses = (torch.randn(4, 3, 5) * 0.4).double()
    labels = torch.tensor([0, 2, 1, 1])
    images = torch.randn(4, 1, 2, 2).double()
    decoder = nn.Linear(15, 4).double()
    expected = 0.0
    for n, label in enumerate(labels):
        masked = torch.zeros(15).double()
        masked[5 * label : 5 * label + 5] = poses[n, label]
        expected += 0.01 * (decoder(masked) - images[n].flatten()).square().sum()
        for k, size in enumerate(lengths(poses[n])):
            expected += max(0, 0.9 - size) ** 2 if k == label else 0.5 * max(0, size - 0.1) ** 2
    found = capsules.margin_loss(capsules.Capsules(poses, images, decoder), labels, 0.01)
    close(found, expected / 4, rtol=1e-6)
    bare = capsules.margin_loss(capsules.Capsules(poses, images, None), labels)
    assert 0 < bare < found


@pytest.mark.parametrize("name", ["capsules-8k", "capsules-8m"])
def test_a_capsule_net_gives_poses_to_the_loss_and_log_odds_to_the_reader(name):
    net = ml.build(name, **({"channels": 16} if name == "capsules-8m" else {}))
    images = torch.randn(3, 1, 28, 28)
    assert isinstance(net(images), capsules.Capsules)
    with torch.no_grad():
        logits, poses = net.eval()(images), net.poses(images)
    torch.testing.assert_close(logits.sigmoid(), lengths(poses), atol=1e-4, rtol=1e-3)
    assert torch.equal(logits.argmax(1), lengths(poses).argmax(1))


def test_a_capsule_net_is_refused_another_loss_before_it_trains(mnist):
    few = ml.Dataset("few", mnist.train[:64], mnist.val[:64], test=None)
    with pytest.raises(ValueError, match="a capsule net trains with loss='capsules'"):
        ml.fit("capsules-8k", few, ml.Recipe(epochs=1), progress=False)
    ml.fit("capsules-8k", few, ml.Recipe(epochs=1, loss=capsules.margin_loss), progress=False)


def test_every_capsule_preset_has_a_recipe_with_its_loss():
    for name, preset in PRESETS.items():
        if issubclass(preset.family, capsules.CapsuleNet):
            assert recipes.find(name).loss == "capsules"


def test_the_decoder_draws_images_of_the_size_it_was_built_for():
    net = ml.build("capsules-8k", decoder=(20,), in_channels=3, image_size=32)
    poses, images, decoder = net(torch.randn(2, 3, 32, 32))
    assert decoder(poses.flatten(1)).shape == images.flatten(1).shape == (2, 3072)


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["efficientnet-8k", "senet-8k", "capsules-8k", "hvc-68k"])
def test_one_step_moves_batch_statistics_a_tenth_of_the_way(name):
    net = ml.build(name)
    norm = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    seen = []
    norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(torch.randn(8, 1, 28, 28))
    x = seen[0]
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


def test_attention_maps_are_those_that_the_blocks_use(mnist):
    model = ml.build("vit-38k").eval()
    images = mnist.val[:2].inputs()
    maps = vit.attention_maps(model, images)
    assert maps.shape == (2, 4, 4, 50, 50)
    block, x = model.blocks[1], model.blocks[0](model.tokens(images))
    _, _, values = block.attention.split(block.norm1(x))
    mixed = (maps[:, 1] @ values).transpose(1, 2).flatten(2)
    close(block.attention.out(mixed), block.attention(block.norm1(x)), rtol=1e-4, atol=1e-5)


def test_rollout_follows_attention_and_the_residual_path_through_the_blocks():
    maps = torch.rand(2, 3, 4, 5, 5).softmax(-1)
    one, found = torch.eye(5), vit.rollout(maps)
    first, second, third = (0.5 * (maps[1, b].mean(0) + one) for b in range(3))
    close(found[1], third @ second @ first, rtol=1e-5, atol=1e-6)
    close(found.sum(-1), torch.ones(2, 5), rtol=1e-5, atol=1e-6)


def test_a_tweaked_pose_is_drawn_from_one_class_with_one_number_moved(mnist):
    torch.manual_seed(0)
    arguments = PRESETS["capsules-8k"].arguments | {"decoder": (16,)}
    model = ml.models.EfficientCapsNet(**arguments).eval()
    image = mnist.val[:1].inputs()
    for label in (None, 4):
        with torch.no_grad():
            poses = model.poses(image)
            k = poses[0].norm(dim=1).argmax().item() if label is None else label
            only = torch.zeros_like(poses)
            only[0, k] = poses[0, k]
            only[0, k, 5] += 0.3
            expected = model.decoder(only.flatten(1)).view(1, 1, 28, 28)
        found = capsules.tweak(model, image, 5, torch.tensor([0.0, 0.3]), label)
        close(found[1:], expected, rtol=1e-5, atol=1e-6)
