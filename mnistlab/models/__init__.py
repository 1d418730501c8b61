"""Architectures, one file a family, and their named sizes.

`build("cnn-68k")` makes a preset; `CNN(widths=...)` any other size; `catalogue()` lists them all.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .cnn import CNN, FastCNN, SimpleCNN
from .dense import Dense
from .tiny import BottleneckCNN, SeparableCNN, TinyMNISTNet

__all__ = [
    "CNN",
    "PRESETS",
    "BottleneckCNN",
    "Dense",
    "FastCNN",
    "SeparableCNN",
    "SimpleCNN",
    "TinyMNISTNet",
    "build",
    "catalogue",
    "count_macs",
    "count_parameters",
]

TEMPLATE = "Lightning-Hydra-Template-Extended"
PLAYGROUND = "MNIST Optimization Playground"


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
    "cnn-68k": Preset(CNN, "global average pooling; Lin et al. 2013", {"widths": (32, 48, 56, 56)}),
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
    """Multiply-accumulates for one image [C, H, W], as torchinfo counts them."""
    from torchinfo import summary

    return summary(model, (1, *image_shape), verbose=0, mode="eval", device="cpu").total_mult_adds


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
