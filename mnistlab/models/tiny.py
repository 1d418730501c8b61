"""Small convolutional nets that end in global average pooling: the budgets below 16k."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .cnn import conv_norm_relu
from .layers import ACTIVATIONS, Layers, norm_layer


class TinyMNISTNet(Layers):
    """Six 3x3 convolutions in three pairs, a 1x1 convolution to the classes, the mean of each map.

    TinyMNISTNet of mnist_experiments, whose text gives each layer and its parameters: 15,774
    without batch normalisation and 15,882 with it (the convolutions then need no bias). It does
    not say where dropout acts: here, at the end of each pair. Input [N, C, H, W], output logits
    [N, num_classes].

    Args:
        channels: of the six 3x3 convolutions.
        norm: "batch", "layer", "group" or "none"; between convolution and activation.
        activation: "relu", "silu" or "gelu".
        dropout: probability.

    Raises:
        ValueError: unknown norm or activation, or not six channels.
    """

    def __init__(
        self,
        channels: Sequence[int] = (8, 12, 16, 16, 24, 32),
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        norm: str = "batch",
        activation: str = "relu",
        dropout: float = 0.05,
    ):
        if len(channels) != 6:
            raise ValueError(f"TinyMNISTNet has six 3x3 convolutions, not {len(channels)}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: one of {', '.join(ACTIVATIONS)}")
        layers = []
        for i, (a, b) in enumerate(pairwise((in_channels, *channels))):
            layers += [
                nn.Conv2d(a, b, 3, padding=1, bias=norm == "none"),
                norm_layer(norm, b),
                ACTIVATIONS[activation](),
            ]
            if i in (1, 3):
                layers.append(nn.MaxPool2d(2))  # [N, 12, 14, 14], then [N, 16, 7, 7]
            if i in (1, 3, 5) and dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(
            *(layer for layer in layers if not isinstance(layer, nn.Identity)),
            nn.Conv2d(channels[-1], num_classes, 1),  # [N, num_classes, 7, 7]
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class BottleneckCNN(Layers):
    """Two 3x3 convolutions, a 1x1 bottleneck, one pooling, four 3x3 convolutions, the mean, a head.

    Models 1 to 3 of the MNIST Optimization Playground. Its text gives their parameters (5,904,
    6,056 and 7,602) and a part of their layers; these widths are the ones that fit both exactly:
    (8, 12, 8, 12, 12, 12, 12) without and with batch normalisation, and
    (10, 16, 8, 12, 14, 14, 12) with it. No convolution has a bias. Input [N, C, H, W], output
    logits [N, num_classes].

    Args:
        widths: of the two convolutions, of the bottleneck, and of the four that follow.
        norm: "batch" or "none".
        norm_first: normalise before the activation, not after it (as the third model does).
        dropout: probability, after each 3x3 convolution.

    Raises:
        ValueError: not seven widths.
    """

    def __init__(
        self,
        widths: Sequence[int] = (10, 16, 8, 12, 14, 14, 12),
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        norm: str = "batch",
        norm_first: bool = True,
        dropout: float = 0.0,
    ):
        if len(widths) != 7:
            raise ValueError(f"BottleneckCNN has seven convolutions, not {len(widths)}")
        layers = []
        for i, (a, b) in enumerate(pairwise((in_channels, *widths))):
            kernel = 1 if i == 2 else 3
            layers.append(nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=False))
            after = [norm_layer(norm, b), nn.ReLU()]
            layers += after if norm_first else after[::-1]
            if dropout and kernel == 3:
                layers.append(nn.Dropout(dropout))
            if i == 2:
                layers.append(nn.MaxPool2d(2))  # [N, 8, 14, 14]
        super().__init__(
            *(layer for layer in layers if not isinstance(layer, nn.Identity)),
            nn.AdaptiveAvgPool2d(1),  # [N, widths[-1], 1, 1]
            nn.Conv2d(widths[-1], num_classes, 1, bias=False),
            nn.Flatten(),
        )


class SeparableCNN(Layers):
    """A 3x3 convolution, then depthwise separable ones (Howard et al. 2017), the mean, a head.

    Two systems share it. Model 3a of the MNIST Optimization Playground, 4,560 parameters: widths
    (16, 16, 32, 64), depthwise convolutions normalised too, no bias. And the lightweight CNN of
    under 10k, whose 9,730 parameters are those of 20 base channels, not of the 16 that its text
    names: widths (20, 40, 80, 40), a bias in every convolution, depthwise ones not normalised.
    Input [N, C, H, W], output logits [N, num_classes].

    Args:
        widths: of the first convolution and of each separable one.
        pool_after: indices of the widths whose layers a 2x2 max pooling follows.
        norm_depthwise: normalise and activate between depthwise and pointwise convolution.
        bias: of the convolutions and the head.
        dropout: probability, before the head.
    """

    def __init__(
        self,
        widths: Sequence[int] = (16, 16, 32, 64),
        *,
        pool_after: Sequence[int] = (0, 1),
        in_channels: int = 1,
        num_classes: int = 10,
        norm_depthwise: bool = True,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        layers = []
        for i, (a, b) in enumerate(pairwise((in_channels, *widths))):
            if i > 0:
                layers.append(nn.Conv2d(a, a, 3, padding=1, groups=a, bias=bias))
                layers += [nn.BatchNorm2d(a), nn.ReLU()] if norm_depthwise else []
            kernel = 1 if i > 0 else 3
            layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=bias)]
            layers += [nn.BatchNorm2d(b), nn.ReLU()]
            if i in pool_after:
                layers.append(nn.MaxPool2d(2))
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(1),  # [N, widths[-1], 1, 1]
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1], num_classes, bias=bias),
        )


class SharedCNN(nn.Module):
    """One 3x3 convolution used again and again, as a recurrent net uses its weights over time.

    Depth without parameters (Eigen et al. 2013; Liang & Hu 2015): each use has a batch
    normalisation of its own, 2 * width parameters, and the convolution's 9 * width^2 are counted
    once; 9 * width + width^2 where it is separable. Input [N, C, H, W], output logits
    [N, num_classes].

    Args:
        width: channels of all layers.
        uses: of the shared convolution.
        stem: kernel and stride of the first convolution, which is not shared.
        pool_after: uses that a 2x2 max pooling follows, counted from 0; the stem is -1.
        residual: each use adds to its input instead of replacing it.
        separable: the shared convolution is a depthwise and a 1x1 convolution, nothing between.

    Raises:
        ValueError: a pooling after a use that there is not.
    """

    def __init__(
        self,
        width: int = 8,
        uses: int = 6,
        pool_after: Sequence[int] = (1, 3),
        *,
        stem: tuple[int, int] = (3, 1),
        residual: bool = False,
        separable: bool = False,
        in_channels: int = 1,
        num_classes: int = 10,
    ):
        super().__init__()
        if not set(pool_after) <= set(range(-1, uses)):
            raise ValueError(f"pool_after={tuple(pool_after)}: from -1 to uses - 1 = {uses - 1}")
        self.pool_after, self.residual = tuple(pool_after), residual
        self.stem = conv_norm_relu(in_channels, width, *stem)  # by default [N, width, H, W]
        groups = width if separable else 1
        self.shared = nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=False)
        if separable:
            self.shared = nn.Sequential(self.shared, nn.Conv2d(width, width, 1, bias=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(uses))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.stem(images), -1)
        for use, norm in enumerate(self.norms):
            y = F.relu(norm(self.shared(x)))
            x = self.pool(x + y if self.residual else y, use)
        return self.head(x.mean((2, 3)))

    def pool(self, x: Tensor, use: int) -> Tensor:
        return F.max_pool2d(x, 2) if use in self.pool_after else x
