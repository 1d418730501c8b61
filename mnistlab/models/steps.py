"""From the CNN of chapter 3 to ConvNeXt V2, a habit at a time (after Liu et al. 2022, figure 2)."""

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from .convnext import GRN, ChannelNorm
from .layers import Layers

# In the order of the steps, each of which keeps those before it.
HABITS = (
    *("patches", "residual", "depthwise", "kernel"),
    *("inverted", "few", "layernorm", "grn"),
)


class MapGRN(GRN):
    """GRN of feature maps, [N, C, H, W] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm(channels: int, habits: Collection[str]) -> nn.Module:
    """The normalisation of feature maps that goes with the habits."""
    return ChannelNorm(channels, eps=1e-6) if "layernorm" in habits else nn.BatchNorm2d(channels)


class StepBlock(nn.Module):
    """A 3x3 convolution, norm, ReLU, and what the habits make of it; see `StepCNN`.

    [N, in_channels, H, W] -> [N, channels, H, W].
    """

    def __init__(self, in_channels: int, channels: int, habits: Collection[str] = ()):
        super().__init__()
        kernel = 7 if "kernel" in habits else 3
        groups = channels if "depthwise" in habits else 1
        convs = [nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, groups=groups)]
        if "inverted" in habits:
            convs += [nn.Conv2d(channels, 4 * channels, 1), nn.Conv2d(4 * channels, channels, 1)]
        elif "depthwise" in habits:
            convs += [nn.Conv2d(channels, channels, 1)]
        few, layers = "few" in habits and len(convs) > 1, []
        for i, conv in enumerate(convs, start=1):
            layers += [conv]
            if i == 1 or not few:
                layers += [norm(conv.out_channels, habits)]
            if isinstance(layers[-1], nn.BatchNorm2d):
                conv.register_parameter("bias", None)  # it would be subtracted again
            if i == len(convs) - 1 or (i < len(convs) and not few):
                layers += [nn.GELU() if few else nn.ReLU()]
            if i == len(convs) - 1 and "grn" in habits:
                layers += [MapGRN(conv.out_channels)]
        self.body = nn.Sequential(*layers)
        self.skip = "residual" in habits and in_channels == channels
        self.activation = nn.Identity() if few else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.activation(x + y if self.skip else y)


class StepCNN(Layers):
    """Two stages of blocks, which are those of `CNN` without habits and of `ConvNeXt` with all.

    Input [N, C, H, W], output logits [N, num_classes]. The first weights are torch's own, where
    `ConvNeXt` draws smaller ones.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        habits: any of
            "patches": a stem of 2x2 patches for the 5x5 one, a 2x2 convolution for the pooling;
            "residual": the input of a block is added to its output;
            "depthwise": a kernel a channel, then a 1x1 convolution;
            "kernel": 7x7;
            "inverted": two 1x1 convolutions, through four times as many channels;
            "few": one norm and one activation, GELU, a block; norms before a stage and the head;
            "layernorm": of the channels at each position, instead of batch normalisation;
            "grn": after the activation (Woo et al. 2023).
        stem: channels of the stem, if not those of the first stage.

    Raises:
        ValueError: an unknown habit.
    """

    def __init__(
        self,
        dims: Sequence[int] = (20, 16),
        depths: Sequence[int] = (1, 2),
        habits: Collection[str] = (),
        *,
        stem: int | None = None,
        in_channels: int = 1,
        num_classes: int = 10,
    ):
        if unknown := set(habits) - set(HABITS):
            raise ValueError(f"habits {sorted(unknown)}: known are {', '.join(HABITS)}")
        patches, few, bias = ("patches" in habits), ("few" in habits), ("layernorm" in habits)
        first = stem or dims[0]
        size = {"kernel_size": 2} if patches else {"kernel_size": 5, "padding": 2}
        layers = [nn.Conv2d(in_channels, first, stride=2, bias=bias, **size), norm(first, habits)]
        layers += [] if few else [nn.ReLU()]  # [N, first, 14, 14]
        for i, (channels, depth) in enumerate(zip(dims, depths, strict=True)):
            if i > 0 and not patches:
                layers += [nn.MaxPool2d(2)]
            elif i > 0:
                conv = nn.Conv2d(first, channels, 2, stride=2, bias=few)
                between = norm(first if few else channels, habits)
                layers += [between, conv] if few else [conv, between, nn.ReLU()]
                first = channels
            for _ in range(depth):
                layers += [StepBlock(first, channels, habits)]
                first = channels
        layers += [nn.AdaptiveAvgPool2d(1), *([norm(first, habits)] if few else []), nn.Flatten()]
        super().__init__(*layers, nn.Linear(first, num_classes))


# Name: arguments. Each has 7,400 to 7,999 parameters, so each habit pays for itself in width.
_SIZES = {
    "cnn": {"dims": (20, 16), "depths": (1, 2), "stem": 12},
    "patches": {"dims": (14, 16), "depths": (1, 2)},
    "residual": {"dims": (14, 16), "depths": (1, 2)},
    "depthwise": {"dims": (18, 36), "depths": (2, 2)},
    "kernel": {"dims": (14, 26), "depths": (2, 2)},
    "inverted": {"dims": (9, 14), "depths": (2, 2)},
    "few": {"dims": (9, 14), "depths": (2, 2)},
    "layernorm": {"dims": (9, 14), "depths": (2, 2)},
    "grn": {"dims": (8, 14), "depths": (2, 2)},
}
STEPS = {name: {**size, "habits": HABITS[:i]} for i, (name, size) in enumerate(_SIZES.items())}
