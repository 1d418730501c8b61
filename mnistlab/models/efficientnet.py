"""EfficientNet (Tan & Le 2019), and the cousins of its block, each a drop-in for it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Layers, StochasticDepth

Size = int | tuple[int, int]  # of a kernel or a stride: both axes, or (vertical, horizontal)
Stage = tuple[int, int, int, Size, Size]  # expansion, channels, repeats, stride, kernel

# Tan & Le 2019, table 1. The stride is that of a stage's first block.
B0: tuple[Stage, ...] = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def conv_norm(
    a: int, b: int, kernel: Size = 1, stride: Size = 1, groups: int = 1, activation=nn.SiLU
) -> nn.Sequential:
    """Convolution from a to b channels, batch normalisation, activation (None: without)."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple(k // 2 for k in size)
    conv = nn.Conv2d(a, b, size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), *([activation()] if activation else []))


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate in 0..1, worked out from the means of all (Hu et al. 2017)."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.SiLU()
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def gates(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, 1, 1]"""
        means = x.mean((2, 3), keepdim=True)
        return torch.sigmoid(self.excite(self.activation(self.squeeze(means))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x)


class Residual(nn.Module):
    """x + branch(x), or branch(x) alone where it changes the shape."""

    def __init__(self, branch: nn.Sequential, same: bool, drop: float = 0.0):
        super().__init__()
        self.branch, self.same = branch, same
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x)) if self.same else self.branch(x)


def mbconv(
    a: int,
    b: int,
    kernel: Size = 3,
    stride: Size = 1,
    expand: int = 6,
    *,
    squeeze: str = "input",
    drop: float = 0.0,
    activation=nn.SiLU,
) -> Residual:
    """The inverted bottleneck: widen by 1x1, filter each channel alone, gate, narrow by 1x1.

    [N, a, H, W] -> [N, b, H/stride, W/stride]. Sandler et al. 2018, with squeeze and excitation.

    Args:
        squeeze: width of the gate's hidden layer: a quarter of the "input" channels (the paper's
            code), of the "expanded" ones, or "none" for no gate.
        drop: probability of stochastic depth.

    Raises:
        ValueError: unknown squeeze.
    """
    if squeeze not in ("input", "expanded", "none"):
        raise ValueError(f"squeeze={squeeze!r}: one of input, expanded, none")
    wide = a * expand
    layers = [conv_norm(a, wide, activation=activation)] if expand != 1 else []
    layers.append(conv_norm(wide, wide, kernel, stride, wide, activation))  # depthwise
    if squeeze != "none":
        squeezed = max(1, (a if squeeze == "input" else wide) // 4)
        layers.append(SqueezeExcitation(wide, squeezed))
    layers.append(conv_norm(wide, b, activation=None))
    return Residual(nn.Sequential(*layers), _same(a, b, stride), drop)


def inverted_residual(
    a: int, b: int, kernel: Size = 3, stride: Size = 1, expand: int = 6, *, drop: float = 0.0
) -> Residual:
    """MobileNetV2's block (Sandler et al. 2018): MBConv with ReLU6 and without the gate."""
    return mbconv(a, b, kernel, stride, expand, squeeze="none", drop=drop, activation=nn.ReLU6)


def se_conv(
    a: int, b: int, kernel: Size = 3, stride: Size = 1, expand: int = 1, *, drop: float = 0.0
) -> Residual:
    """A plain convolution with a gate (Hu et al. 2017). It mixes all channels as it is, so it does
    not widen them: `expand` is left aside."""
    branch = nn.Sequential(
        conv_norm(a, b, kernel, stride, activation=nn.ReLU), SqueezeExcitation(b, max(1, b // 4))
    )
    return Residual(branch, _same(a, b, stride), drop)


def shuffle_unit(
    a: int,
    b: int,
    kernel: Size = 3,
    stride: Size = 1,
    expand: int = 1,
    *,
    groups: int = 2,
    drop: float = 0.0,
) -> Residual:
    """ShuffleNet's unit (Zhang et al. 2017): its 1x1 convolutions work in groups, and a shuffle
    carries information between them. Where it changes the shape it has no shortcut, as MBConv."""
    wide = a * expand
    branch = nn.Sequential(
        conv_norm(a, wide, groups=groups, activation=nn.ReLU),
        nn.ChannelShuffle(groups),
        conv_norm(wide, wide, kernel, stride, wide, activation=None),
        conv_norm(wide, b, groups=groups, activation=None),
    )
    return Residual(branch, _same(a, b, stride), drop)


class Ghost(nn.Module):
    """b features, half of them cheap: each made from one of the others by a depthwise 3x3
    convolution (Han et al. 2019). [N, a, H, W] -> [N, b, H, W]"""

    def __init__(self, a: int, b: int, activation=nn.ReLU):
        super().__init__()
        half = b - b // 2
        self.primary = conv_norm(a, half, activation=activation)
        self.cheap = conv_norm(half, half, 3, groups=half, activation=activation)
        self.channels = b

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat((primary, self.cheap(primary)), 1)[:, : self.channels]


def ghost_block(
    a: int, b: int, kernel: Size = 3, stride: Size = 1, expand: int = 6, *, drop: float = 0.0
) -> Residual:
    """GhostNet's bottleneck (Han et al. 2019): MBConv whose 1x1 convolutions are ghosts."""
    wide = a * expand
    branch = nn.Sequential(
        Ghost(a, wide),
        conv_norm(wide, wide, kernel, stride, wide, activation=None),
        Ghost(wide, b, activation=None),
    )
    return Residual(branch, _same(a, b, stride), drop)


BLOCKS = {
    "mbconv": mbconv,
    "inverted": inverted_residual,
    "shuffle": shuffle_unit,
    "ghost": ghost_block,
    "se": se_conv,
}


def _same(a: int, b: int, stride: Size) -> bool:
    return a == b and stride in (1, (1, 1))


def round_channels(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` next to `channels`, at least one, and at least 90% of them."""
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near if near >= 0.9 * channels else near + divisor


class EfficientNet(Layers):
    """A strided 3x3 stem, stages of MBConv, a 1x1 convolution, global average pooling, a head.

    Input [N, C, H, W], output logits [N, num_classes]. The defaults are EfficientNet-B0.

    Args:
        stages: of (expansion, channels, repeats, stride, kernel); B0 has seven.
        stem: channels of the stem.
        head: channels of the 1x1 convolution at the end.
        width: all channels are multiplied by this, and rounded to a multiple of `divisor`.
        depth: all repeats are multiplied by this, and rounded up. Compound scaling (Tan & Le 2019,
            equation 3) raises width, depth and the size of the image together.
        divisor: 8 in the paper. It is why a narrow net stays large: no layer has fewer channels.
        block: "mbconv", "inverted", "shuffle", "ghost" or "se".
        squeeze: of "mbconv", see there.
        drop: stochastic depth of the last block; of the others in proportion to their place.
        dropout: probability, before the linear head.

    Raises:
        ValueError: unknown block or squeeze.
    """

    def __init__(
        self,
        stages: Sequence[Stage] = B0,
        *,
        stem: int = 32,
        head: int = 1280,
        width: float = 1.0,
        depth: float = 1.0,
        divisor: int = 8,
        block: str = "mbconv",
        squeeze: str = "input",
        drop: float = 0.0,
        dropout: float = 0.0,
        in_channels: int = 1,
        num_classes: int = 10,
    ):
        if block not in BLOCKS:
            raise ValueError(f"block={block!r}: one of {', '.join(BLOCKS)}")
        a = round_channels(stem * width, divisor)
        layers = [conv_norm(in_channels, a, 3, 2)]  # [N, stem, 14, 14]
        gate = {"squeeze": squeeze} if block == "mbconv" else {}
        repeats = [math.ceil(repeat * depth) for _, _, repeat, _, _ in stages]
        for (expand, channels, _, stride, kernel), repeat in zip(stages, repeats, strict=True):
            b = round_channels(channels * width, divisor)
            for i in range(repeat):
                layers.append(
                    BLOCKS[block](
                        a,
                        b,
                        kernel,
                        stride if i == 0 else 1,
                        expand,
                        **gate,
                        drop=drop * (len(layers) - 1) / sum(repeats),
                    )
                )
                a = b
        last = round_channels(head * width, divisor)
        super().__init__(
            *layers,
            conv_norm(a, last),
            nn.AdaptiveAvgPool2d(1),  # [N, head, 1, 1]
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(last, num_classes),
        )
