"""ConvNeXt V2 (Woo et al. 2023): a convolutional net with the habits of a transformer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .layers import Layers, StochasticDepth


class GRN(nn.Module):
    """Global response normalisation: channels compete by their size over the image.

    [N, H, W, C] -> the same (Woo et al. 2023, equations 1 to 3). With gamma and beta at zero, as
    they start, it changes nothing.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        # x.norm and the sum of three maps as in the paper, in less than half of their time.
        size = x.square().sum((1, 2), keepdim=True).add(1e-12).sqrt()  # [N, 1, 1, C]
        share = size / (size.mean(-1, keepdim=True) + 1e-6)
        return torch.addcmul(self.beta, x, 1 + self.gamma * share)


class Block(nn.Module):
    """Depthwise convolution, LayerNorm, a widening MLP with GRN; [N, C, H, W] -> the same.

    Args:
        channels: in and out.
        kernel: of the depthwise convolution.
        grn: False is the block of the first ConvNeXt, without its layer scale.
        drop: probability of stochastic depth.
    """

    def __init__(self, channels: int, kernel: int = 7, grn: bool = True, drop: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.activation = nn.GELU()
        self.grn = GRN(4 * channels) if grn else nn.Identity()
        self.project = nn.Linear(4 * channels, channels)
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)  # [N, H, W, C]: no copy in channels_last
        y = self.grn(self.activation(self.expand(self.norm(y))))
        return x + self.drop(self.project(y).permute(0, 3, 1, 2))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each position: [N, C, H, W] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(Layers):
    """A stem that cuts the image in patches, stages of blocks with a 2x2 stride between them.

    Input [N, C, H, W], output logits [N, num_classes].

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        stem: side of the stem's patches, pixels; default 4 as in the paper, or 2 for images below
            64 pixels, of which more would leave too little.
        kernel, grn: see `Block`.
        drop: stochastic depth of the last block; of the others in proportion to their place.

    Raises:
        ValueError: dims and depths are not of one length.
    """

    def __init__(
        self,
        dims: Sequence[int] = (8, 16, 32, 64),
        depths: Sequence[int] = (1, 1, 2, 1),
        *,
        stem: int | None = None,
        kernel: int = 7,
        grn: bool = True,
        drop: float = 0.0,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        if len(dims) != len(depths):
            raise ValueError(f"{len(dims)} dims and {len(depths)} depths: one each for a stage")
        stem = stem or (2 if image_size < 64 else 4)
        rates = iter(torch.linspace(0, drop, sum(depths)).tolist())
        layers = [
            nn.Conv2d(in_channels, dims[0], stem, stride=stem),  # [N, dims[0], 14, 14]
            ChannelNorm(dims[0], eps=1e-6),
        ]
        for i, (channels, depth) in enumerate(zip(dims, depths, strict=True)):
            if i > 0:
                layers += [
                    ChannelNorm(dims[i - 1], eps=1e-6),
                    nn.Conv2d(dims[i - 1], channels, 2, stride=2),
                ]
            layers += [Block(channels, kernel, grn, next(rates)) for _ in range(depth)]
        layers += [
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(dims[-1], eps=1e-6),
            nn.Linear(dims[-1], num_classes),
        ]
        super().__init__(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
