"""Dense nets: every input pixel is connected to every unit."""

from collections.abc import Sequence

from torch import nn

from .layers import Layers


class Dense(Layers):
    """Flatten, then [Linear, BatchNorm, ReLU] for each hidden width, then a linear head.

    With three hidden layers this is SimpleDenseNet of the Lightning-Hydra template: widths of 10,
    20, 10 give its 8,470 parameters. For 64, 128, 64 the extended template says 68,048; the layers
    it lists have 67,978. Input [N, C, H, W], output logits [N, num_classes].

    Args:
        hidden: widths of the hidden layers; () is a linear model.
        norm: batch normalisation (Ioffe & Szegedy 2015) after each hidden linear layer.
        dropout: probability, after each activation (Srivastava et al. 2014).
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64, 128, 64),
        *,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        norm: bool = True,
        dropout: float = 0.0,
    ):
        width = in_channels * image_size**2
        layers: list[nn.Module] = [nn.Flatten()]  # [N, C, H, W] -> [N, C*H*W]
        for units in hidden:
            layers.append(nn.Linear(width, units))
            if norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = units
        super().__init__(*layers, nn.Linear(width, num_classes))
