"""Convolutional nets: one with a wide linear layer at its end, one with global average pooling."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .layers import Layers


def conv_norm_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1):
    """Convolution that keeps the size (before stride), batch normalisation, ReLU.

    The convolution has no bias: the normalisation that follows would subtract it again.
    """
    conv = nn.Conv2d(
        in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class SimpleCNN(Layers):
    """Two convolutions, then most of the parameters in one linear layer.

    SimpleCNN of the Lightning-Hydra-Template-Extended, layer by layer. Channels and hidden units
    of (3, 6), 24 give 7,546 parameters and (10, 20), 64 give 65,414, as its notes say. For
    (32, 64), 128 they say 421,482; the layers they list, with biases as in the two smaller nets,
    have 421,834. Input [N, C, H, W], output logits [N, num_classes].

    Args:
        channels: of the two 3x3 convolutions.
        hidden: units of the linear layer between the features and the head.
        dropout: probability, before the head.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (32, 64),
        hidden: int = 128,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
        dropout: float = 0.25,
    ):
        a, b = channels
        super().__init__(
            nn.Conv2d(in_channels, a, 3, padding=1),  # [N, a, 28, 28]
            nn.BatchNorm2d(a),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, a, 14, 14]
            nn.Conv2d(a, b, 3, padding=1),  # [N, b, 14, 14]
            nn.BatchNorm2d(b),
            nn.ReLU(),
            nn.MaxPool2d(2),  # [N, b, 7, 7]
            nn.AdaptiveAvgPool2d(7),  # does nothing at 28x28; other sizes end at 7x7 too
            nn.Flatten(),  # [N, b*49]
            nn.Linear(b * 49, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )


class CNN(Layers):
    """A stem, 3x3 convolutions, global average pooling (Lin et al. 2013), a linear head.

    Input [N, C, H, W], output logits [N, num_classes]. The stem's stride of 2 leaves a quarter of
    the positions to compute; the max pooling after the second layer leaves a quarter of those.

    Args:
        widths: channels of the stem and of each 3x3 convolution after it, two or more.
        stem: kernel and stride of the stem.
        pool_after: indices of the widths whose layer a 2x2 max pooling follows.
        dropout: probability, before the head.

    Raises:
        ValueError: fewer than two widths.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 48, 56, 56),
        *,
        stem: tuple[int, int] = (5, 2),
        pool_after: Sequence[int] = (1,),
        in_channels: int = 1,
        num_classes: int = 10,
        dropout: float = 0.0,
    ):
        if len(widths) < 2:
            raise ValueError(f"CNN needs two widths or more, not {list(widths)}")
        layers = []
        for i, (a, b) in enumerate(pairwise((in_channels, *widths))):
            kernel, stride = stem if i == 0 else (3, 1)
            layers.append(conv_norm_relu(a, b, kernel, stride))  # by default [N, b, 14, 14]
            if i in pool_after:
                layers.append(nn.MaxPool2d(2))  # then [N, b, 7, 7]
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(1),  # the mean of each feature map: [N, widths[-1], 1, 1]
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(widths[-1], num_classes),
        )


class FastCNN(Layers):
    """Few operations for its accuracy: the stem's stride and a pooling leave 7x7 positions at once.

    Input [N, C, H, W], output logits [N, num_classes].

    Args:
        channels: of the 5x5 stem and of the 3x3 convolution.
        hidden: units of the linear layer between the features and the head.
    """

    def __init__(
        self,
        channels: tuple[int, int] = (16, 32),
        hidden: int = 64,
        *,
        in_channels: int = 1,
        num_classes: int = 10,
    ):
        a, b = channels
        super().__init__(
            conv_norm_relu(in_channels, a, 5, stride=2),  # [N, a, 14, 14]
            nn.MaxPool2d(2),  # [N, a, 7, 7]
            conv_norm_relu(a, b, 3),  # [N, b, 7, 7]
            nn.AdaptiveAvgPool2d(7),  # does nothing at 28x28; other sizes end at 7x7 too
            nn.Flatten(),  # [N, b*49]
            nn.Linear(b * 49, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
