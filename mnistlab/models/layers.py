"""What the families share."""

from torch import Tensor, nn


class Layers(nn.Sequential):
    """nn.Sequential whose slices are plain nn.Sequential, so that `model[:3]` works.

    nn.Sequential would call the subclass's own constructor, which takes widths, not layers.
    """

    def __getitem__(self, index):
        """One layer, or a slice of them (the same modules, not copies)."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)


ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}


def norm_layer(kind: str, channels: int) -> nn.Module:
    """A normalisation of feature maps, [N, channels, H, W] to the same.

    Args:
        kind: "batch" (Ioffe & Szegedy 2015); "layer" (Ba et al. 2016: of all channels and
            positions of an image); "group" (Wu & He 2018: of a quarter of the channels); "none".

    Raises:
        ValueError: unknown kind.
    """
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels)
        case "layer":
            return nn.GroupNorm(1, channels)
        case "group":
            return nn.GroupNorm(4, channels)
        case "none":
            return nn.Identity()
    raise ValueError(f"norm={kind!r}: one of batch, layer, group, none")


class StochasticDepth(nn.Module):
    """Drop a residual branch, [N, ...], for a random part of the images (Huang et al. 2016).

    While training, each image loses its branch with this probability, and the others' grow by
    1 / (1 - probability), so that the mean stays. In eval mode nothing happens.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        keep = 1 - self.probability
        shape = (len(branch),) + (1,) * (branch.ndim - 1)
        return branch * branch.new_empty(shape).bernoulli_(keep) / keep
