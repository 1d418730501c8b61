"""Architectures, one file a family, and their named sizes.

`build("cnn-68k")` makes a preset; `CNN(widths=...)` any other size; `catalogue()` lists them all.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .capsules import CapsControl, CapsNet, EfficientCapsNet, HVCNet
from .cnn import CNN, FastCNN, SimpleCNN
from .convnext import ConvNeXt
from .dense import Dense
from .efficientnet import EfficientNet
from .steps import STEPS, StepCNN
from .tiny import BottleneckCNN, SeparableCNN, SharedCNN, TinyMNISTNet
from .vit import ViT

__all__ = [
    "CNN",
    "PRESETS",
    "BottleneckCNN",
    "CapsControl",
    "CapsNet",
    "ConvNeXt",
    "Dense",
    "EfficientCapsNet",
    "EfficientNet",
    "FastCNN",
    "HVCNet",
    "SeparableCNN",
    "SharedCNN",
    "SimpleCNN",
    "StepCNN",
    "TinyMNISTNet",
    "ViT",
    "build",
    "catalogue",
    "count_macs",
    "count_parameters",
]

TEMPLATE = "Lightning-Hydra-Template-Extended"
PLAYGROUND = "MNIST Optimization Playground"

# (expansion, channels, repeats, stride, kernel) of each stage. Behind the strided stem a map has
# 14x14 positions, and 7x7 from the second stage on: less is left of a digit only by pooling.
STAGES_8K = ((1, 8, 1, 1, 3), (3, 12, 1, 2, 5), (3, 16, 2, 1, 5))
STAGES_68K = ((1, 16, 1, 1, 3), (4, 32, 2, 2, 5), (4, 40, 2, 1, 5))
# (channels, kernel, stride) of each convolution below the capsules.
TRUNK_8K = ((8, 5, 2), (12, 3, 1), (16, 3, 2), (16, 3, 1))
TRUNK_68K = ((16, 5, 2), (32, 3, 1), (56, 3, 2), (64, 3, 1))


@dataclass(frozen=True)
class Preset:
    """A named size of a family: the constructor, its arguments, and where they come from."""

    family: Callable[..., nn.Module]
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "linear-8k": Preset(Dense, "softmax regression; LeCun et al. 1998", {"hidden": ()}),
    "dense-8k": Preset(Dense, f"SimpleDenseNet, {TEMPLATE}", {"hidden": (10, 20, 10)}),
    "dense-68k": Preset(Dense, f"SimpleDenseNet, {TEMPLATE}", {"hidden": (64, 128, 64)}),
    "simplecnn-8k": Preset(SimpleCNN, f"SimpleCNN, {TEMPLATE}", {"channels": (3, 6), "hidden": 24}),
    "simplecnn-65k": Preset(
        SimpleCNN, f"SimpleCNN, {TEMPLATE}", {"channels": (10, 20), "hidden": 64}
    ),
    "simplecnn-421k": Preset(
        SimpleCNN, f"SimpleCNN, {TEMPLATE}", {"channels": (32, 64), "hidden": 128}
    ),
    "cnn-8k": Preset(CNN, "global average pooling; Lin et al. 2013", {"widths": (12, 20, 16, 16)}),
    **{  # the widths of cnn-8k, narrower, for students; wider, for weights of few bits
        f"cnn-{size}": Preset(CNN, "global average pooling; Lin et al. 2013", {"widths": widths})
        for size, widths in (
            ("1k", (4, 7, 5, 5)),
            ("4k", (8, 14, 11, 11)),
            ("10k", (14, 22, 19, 19)),
            ("16k", (18, 28, 24, 24)),
        )
    },
    "cnn-68k": Preset(CNN, "global average pooling; Lin et al. 2013", {"widths": (32, 48, 56, 56)}),
    **{  # no stride in the stem: as many positions as pixels
        f"fullcnn-{size}": Preset(
            CNN,
            "global average pooling; Lin et al. 2013",
            {"widths": widths, "stem": (3, 1), "pool_after": pool_after},
        )
        for size, widths, pool_after in (
            ("4k", (6, 8, 8, 10, 10, 10), (1, 3)),
            ("99k", (24, 40, 56, 64, 64), (0, 2)),
        )
    },
    "fastcnn-106k": Preset(FastCNN, "ours, for speed", {"channels": (16, 32), "hidden": 64}),
    "tinymnistnet-15k": Preset(
        TinyMNISTNet, "TinyMNISTNet, mnist_experiments", {"norm": "none", "dropout": 0.0}
    ),
    "tinymnistnet-16k": Preset(TinyMNISTNet, "TinyMNISTNet, mnist_experiments"),
    "bottleneck-5k": Preset(
        BottleneckCNN,
        f"model 1, {PLAYGROUND}",
        {"widths": (8, 12, 8, 12, 12, 12, 12), "norm": "none"},
    ),
    "bottleneck-6k": Preset(
        BottleneckCNN,
        f"model 2, {PLAYGROUND}",
        {"widths": (8, 12, 8, 12, 12, 12, 12), "dropout": 0.1},
    ),
    "bottleneck-7k": Preset(BottleneckCNN, f"model 3, {PLAYGROUND}", {"norm_first": False}),
    "separable-4k": Preset(SeparableCNN, f"model 3a, {PLAYGROUND}"),
    "separable-9k": Preset(
        SeparableCNN,
        "lightweight CNN, MNIST with under 10k parameters",
        {"widths": (20, 40, 80, 40), "norm_depthwise": False, "bias": True, "dropout": 0.2},
    ),
    "shared-1k": Preset(
        SharedCNN,
        "weights shared over depth; Eigen et al. 2013",
        {"width": 16, "uses": 5, "pool_after": (-1, 2), "separable": True},
    ),
    "shared-2k": Preset(
        SharedCNN,
        "weights shared over depth; Eigen et al. 2013",
        {"width": 24, "uses": 10, "pool_after": (-1, 2), "separable": True},
    ),
    "shared-8k": Preset(
        SharedCNN,
        "weights shared over depth; Eigen et al. 2013",
        {"width": 66, "uses": 12, "pool_after": (-1, 2), "separable": True},
    ),
    "efficientnet-8k": Preset(
        EfficientNet,
        "ours: no rounding of channels to eights",
        {"stages": STAGES_8K, "stem": 8, "head": 20, "divisor": 1},
    ),
    **{  # its cousins, in as many blocks, with channels that spend the same budget
        f"{name}-8k": Preset(
            EfficientNet,
            source,
            {
                "stages": ((1, 8, 1, 1, 3), (3, a, 1, 2, kernel), (3, b, 2, 1, kernel)),
                "stem": 8,
                "head": 24,
                "divisor": 1,
                "block": block,
            },
        )
        for name, block, a, b, kernel, source in (
            ("mobilenet", "inverted", 12, 18, 5, "MobileNetV2; Sandler et al. 2018"),
            ("shufflenet", "shuffle", 16, 22, 5, "ShuffleNet; Zhang et al. 2017"),
            ("ghostnet", "ghost", 14, 20, 5, "GhostNet; Han et al. 2019"),
            ("senet", "se", 11, 19, 3, "a CNN with gates; Hu et al. 2017"),
        )
    },
    "efficientnet-22k": Preset(
        EfficientNet,
        f"{TEMPLATE}: 21,880 parameters",
        {"squeeze": "expanded", "width": 0.002, "depth": 0.3},
    ),
    # Its text says width 0.043, whose 8.3 channels in the sixth stage its own rounding makes 16.
    "efficientnet-66k": Preset(
        EfficientNet,
        f"{TEMPLATE}: 66,016 parameters",
        {"squeeze": "expanded", "width": 0.0465, "depth": 0.7},
    ),
    "efficientnet-68k": Preset(
        EfficientNet,
        "ours: two strides instead of five",
        {"stages": STAGES_68K, "stem": 16, "head": 192},
    ),
    "efficientnet-210k": Preset(
        EfficientNet,
        f"{TEMPLATE}: 210K parameters; width and depth are ours",
        {"width": 0.266, "depth": 0.4},
    ),
    "efficientnet-4m": Preset(EfficientNet, "EfficientNet-B0; Tan & Le 2019"),
    "efficientnet-7m": Preset(
        EfficientNet, f"{TEMPLATE}: B0 with wide gates", {"squeeze": "expanded"}
    ),
    "vit-8k": Preset(ViT, "ours", {"width": 16, "depth": 3, "heads": 2, "pool": "mean"}),
    "vit-38k": Preset(
        ViT, f"{TEMPLATE}: 38K parameters", {"width": 32, "depth": 4, "pre_logits": True}
    ),
    "vit-68k": Preset(ViT, "ours", {"width": 40, "depth": 5, "heads": 2, "pool": "mean"}),
    "vit-210k": Preset(
        ViT,
        "PyTorch-Scratch-Vision-Transformer-ViT: 210k parameters",
        {"width": 64, "depth": 6, "pre_logits": True},
    ),
    "vit-821k": Preset(
        ViT, f"{TEMPLATE}: 821K parameters", {"width": 128, "depth": 6, "pre_logits": True}
    ),
    "convnext-8k": Preset(ConvNeXt, "ours: two stages", {"dims": (8, 14), "depths": (2, 2)}),
    "convnext-18k": Preset(
        ConvNeXt, f"{TEMPLATE}: 18K parameters", {"dims": (4, 8, 16, 32), "depths": (1, 1, 1, 1)}
    ),
    "convnext-68k": Preset(ConvNeXt, "ours: two stages", {"dims": (16, 40), "depths": (1, 4)}),
    "convnext-73k": Preset(
        ConvNeXt, f"{TEMPLATE}: 73K parameters", {"dims": (8, 16, 32, 64), "depths": (1, 1, 2, 1)}
    ),
    "convnext-288k": Preset(
        ConvNeXt,
        f"{TEMPLATE}: 288K parameters",
        {"dims": (12, 24, 48, 96), "depths": (2, 2, 4, 2)},
    ),
    "convnext-725k": Preset(
        ConvNeXt,
        f"{TEMPLATE}: 725K parameters",
        {"dims": (16, 32, 64, 128), "depths": (3, 3, 6, 3)},
    ),
    **{
        f"step-{name}-8k": Preset(StepCNN, "from cnn-8k to convnext-8k; Liu et al. 2022", arguments)
        for name, arguments in STEPS.items()
    },
    "capsules-8k": Preset(
        EfficientCapsNet,
        "Mazzia et al. 2021, with a strided trunk",
        {"layers": TRUNK_8K, "part_dim": 4, "pose_dim": 8, "padded": True},
    ),
    "capsules-68k": Preset(
        EfficientCapsNet,
        "Mazzia et al. 2021, with a strided trunk",
        {"layers": TRUNK_68K, "padded": True},
    ),
    "capsules-162k": Preset(EfficientCapsNet, "Mazzia et al. 2021: 161,824 parameters"),
    "capsules-8m": Preset(CapsNet, "Sabour et al. 2017: 8.2 million parameters"),
    "capscontrol-173k": Preset(CapsControl, "the trunk of capsules-162k without capsules"),
    "hvc-68k": Preset(
        HVCNet,
        "Byerly et al. 2020, its head alone",
        {"layers": ((16, 5, 2), (32, 3, 1), (48, 3, 2), (52, 3, 1))},
    ),
}


def build(name: str, **arguments: Any) -> nn.Module:
    """Make a preset with fresh weights, drawn from torch's global random state.

    Args:
        name: a key of `PRESETS`.
        arguments: override the preset's, such as `in_channels=3, num_classes=100`.

    Raises:
        ValueError: unknown name or argument; the message lists the near ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4) or PRESETS
        raise ValueError(f"unknown model {name!r}; near it: {', '.join(near)}")
    preset = PRESETS[name]
    known = inspect.signature(preset.family).parameters
    for argument in arguments.keys() - known.keys():
        near = difflib.get_close_matches(argument, known, n=3, cutoff=0.4) or known
        raise ValueError(f"{name} takes no {argument!r}; near it: {', '.join(near)}")
    return preset.family(**(preset.arguments | arguments))


def count_parameters(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_macs(model: nn.Module, image_shape: tuple[int, int, int] = (1, 28, 28)) -> int:
    """Multiply-accumulates for one image [C, H, W]: those of all convolutions and matrix products,
    of attention and routing too. Biases, norms and activations are not counted.

    They are counted as the model runs. A count by layers, as torchinfo's, takes a linear layer for
    one product per weight wherever it is, and leaves out products that are no layer.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel  # slow to load
    from torch.utils.flop_counter import FlopCounterMode

    was_training = model.training
    counter = FlopCounterMode(display=False)
    # The fused attention of the CPU is not counted, its parts are.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.eval()(torch.zeros(1, *image_shape))
    model.train(was_training)
    return counter.get_total_flops() // 2  # a multiplication and an addition each


def catalogue() -> list[dict[str, Any]]:
    """Every preset as a dict: name, family, params, macs (one 28x28 image), source."""
    rows = []
    for name, preset in PRESETS.items():
        model = build(name)
        rows.append(
            {
                "name": name,
                "family": preset.family.__name__,
                "params": count_parameters(model),
                "macs": count_macs(model),
                "source": preset.source,
            }
        )
    return rows
