"""Capsules: groups of units whose length says "present", and whose direction says "how"."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layers


class Capsules(NamedTuple):
    """What a capsule net gives while training, for `margin_loss`: its poses [N, K, D], the images
    that it was fed, and its decoder ([N, K*D] -> images), or None."""

    poses: Tensor
    images: Tensor
    decoder: Callable[[Tensor], Tensor] | None


def length(vectors: Tensor) -> Tensor:
    """[..., D] -> [...], with a gradient at zero too."""
    return vectors.square().sum(-1).add(1e-9).sqrt()


def squash(s: Tensor) -> Tensor:
    """Keep the direction of each vector [..., D], bring its length to n²/(1 + n²), below 1 (Sabour
    et al. 2017, equation 1)."""
    n = length(s)[..., None]
    return s * n / (1 + n**2)


def soft_squash(s: Tensor) -> Tensor:
    """The same with the length 1 - exp(-n), steeper near zero (Mazzia et al. 2021, equation 3)."""
    n = length(s)[..., None]
    return s * (1 - torch.exp(-n)) / n


def route(votes: Tensor, iterations: int = 3) -> tuple[Tensor, Tensor]:
    """Routing by agreement (Sabour et al. 2017, procedure 1).

    Args:
        votes: of each of I parts for the pose of each of K wholes, [N, K, I, D].
        iterations: rounds; the first one shares each part out evenly.

    Returns:
        Poses [N, K, D]; the shares that gave them, [N, K, I]: those of a part add up to 1.
    """
    settled = votes.detach()  # agreement steers, but gradients flow through the last round alone
    logits = votes.new_zeros(votes.shape[:3])
    for _ in range(iterations - 1):
        poses = squash(torch.einsum("nki,nkid->nkd", logits.softmax(1), settled))
        logits = logits + torch.einsum("nkid,nkd->nki", settled, poses)
    shares = logits.softmax(1)
    return squash(torch.einsum("nki,nkid->nkd", shares, votes)), shares


def attend(votes: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Self-attention routing, in one pass (Mazzia et al. 2021, equations 5 to 7).

    Args:
        votes: [N, K, I, D].
        prior: [K, I], learned, added to the shares.

    Returns:
        As `route`; shares here are shares plus prior.
    """
    # The row sums of votes @ votes^T, without its I x I products.
    agreement = torch.einsum("nkid,nkd->nki", votes, votes.sum(2)) / votes.shape[-1] ** 0.5
    shares = agreement.softmax(1) + prior
    return soft_squash(torch.einsum("nki,nkid->nkd", shares, votes)), shares


def margin_loss(output: Capsules, labels: Tensor, reconstruction: float = 5e-5) -> Tensor:
    """Sabour et al. 2017, equation 4, plus a small share of the error of the reconstruction.

    A present class should have a length above 0.9, an absent one below 0.1. The decoder sees the
    pose of the true class alone.

    Args:
        reconstruction: weight of the squared error, summed over pixels. The paper has 5e-4 for
            pixels in 0..1; ours are divided by MNIST's standard deviation of 0.31.
    """
    poses, images, decoder = output
    lengths = length(poses)  # [N, K]
    present = F.one_hot(labels, poses.shape[1]).to(poses.dtype)
    miss = present * (0.9 - lengths).relu().square()
    alarm = 0.5 * (1 - present) * (lengths - 0.1).relu().square()
    loss = (miss + alarm).sum(1).mean()
    if decoder is None:
        return loss
    rebuilt = decoder((poses * present[..., None]).flatten(1))
    return loss + reconstruction * (rebuilt - images.flatten(1)).square().sum(1).mean()


class Votes(nn.Module):
    """Each of I parts [N, I, d] predicts the pose of each of K wholes: [N, K, I, D].

    It starts small, as Sabour et al. do: where poses are long, squash leaves no gradient.
    """

    def __init__(self, wholes: int, parts: int, part_dim: int, pose_dim: int):
        super().__init__()
        weight = torch.empty(wholes, parts, pose_dim, part_dim)
        self.weight = nn.Parameter(nn.init.normal_(weight, std=0.1))

    def forward(self, parts: Tensor) -> Tensor:
        return torch.einsum("nid,kiod->nkio", parts, self.weight)


class CapsuleNet(nn.Module):
    """What capsule nets share: parts, votes, routing, and a decoder that draws from the poses.

    Input [N, C, image_size, image_size]. While training, the output is `Capsules`, for the
    recipe's loss "capsules". In eval mode it is logits [N, num_classes]: the log-odds of the
    length of each pose, which is read as the probability that its class is there.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        pose_dim: int,
        decoder: Sequence[int],
    ):
        super().__init__()
        layers, width = [], num_classes * pose_dim
        for hidden in decoder:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        pixels = in_channels * image_size**2
        self.decoder = nn.Sequential(*layers, nn.Linear(width, pixels)) if layers else None

    def parts(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, I, d]"""
        raise NotImplementedError

    def route(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        """Votes [N, K, I, D] -> poses [N, K, D], shares [N, K, I]"""
        raise NotImplementedError

    def poses(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, K, D]"""
        return self.route(self.votes(self.parts(images)))[0]

    def forward(self, images: Tensor) -> Capsules | Tensor:
        poses = self.poses(images)
        if self.training:
            return Capsules(poses, images, self.decoder)
        return torch.logit(length(poses), eps=1e-6)


@torch.no_grad()
def tweak(
    model: CapsuleNet, image: Tensor, dimension: int, offsets: Tensor, label: int | None = None
) -> Tensor:
    """What the decoder draws when one number of a pose is moved (Sabour et al. 2017, figure 4).

    Args:
        image: as the model is fed it, [1, C, H, W].
        dimension: of the pose, 0 to D-1.
        offsets: added to that number, [M].
        label: whose pose; None takes the longest one.

    Returns:
        [M, C, H, W], as the model is fed images.

    Raises:
        ValueError: the model has no decoder.
    """
    if getattr(model, "decoder", None) is None:
        raise ValueError("this model has no decoder to draw with: build it with decoder=(256,)")
    poses = model.poses(image)  # [1, K, D]
    label = int(length(poses)[0].argmax()) if label is None else label
    moved = torch.zeros_like(poses).repeat(len(offsets), 1, 1)  # the decoder sees one class alone
    moved[:, label] = poses[0, label]
    moved[:, label, dimension] += offsets
    return model.decoder(moved.flatten(1)).view(len(offsets), *image.shape[1:])


class CapsNet(CapsuleNet):
    """Dynamic routing between capsules (Sabour et al. 2017), 8.2 million parameters by default.

    Args:
        channels: of both 9x9 convolutions; the second has stride 2.
        part_dim, pose_dim: dimensions of a part and of a class's pose.
        iterations: rounds of routing.
        decoder: hidden units of the decoder; () is none.
    """

    def __init__(
        self,
        channels: int = 256,
        part_dim: int = 8,
        pose_dim: int = 16,
        iterations: int = 3,
        *,
        decoder: Sequence[int] = (512, 1024),
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        super().__init__(in_channels, image_size, num_classes, pose_dim, decoder)
        self.part_dim, self.iterations = part_dim, iterations
        self.conv = nn.Conv2d(in_channels, channels, 9)  # [N, 256, 20, 20]
        self.primary = nn.Conv2d(channels, channels, 9, stride=2)  # [N, 32 * 8, 6, 6]
        size = (image_size - 8 - 9) // 2 + 1
        self.votes = Votes(num_classes, channels // part_dim * size**2, part_dim, pose_dim)

    def parts(self, images: Tensor) -> Tensor:
        maps = self.primary(self.conv(images).relu())
        maps = maps.unflatten(1, (-1, self.part_dim)).flatten(3)  # [N, 32, 8, 36]
        return squash(maps.transpose(2, 3).flatten(1, 2))

    def route(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        return route(votes, self.iterations)


# Channels, kernel and stride of each convolution.
Trunk = Sequence[tuple[int, int, int]]
EFFICIENT: Trunk = ((32, 5, 1), (64, 3, 1), (64, 3, 1), (128, 3, 2))


def trunk(
    layers: Trunk, padded: bool, in_channels: int, image_size: int
) -> tuple[nn.Sequential, int]:
    """Convolutions, each with ReLU and batch normalisation, and the side of the maps that leave."""
    built, size = [], image_size
    for channels, kernel, stride in layers:
        padding = kernel // 2 if padded else 0
        built += [
            nn.Conv2d(in_channels, channels, kernel, stride, padding),
            nn.ReLU(),
            nn.BatchNorm2d(channels),
        ]
        in_channels, size = channels, (size + 2 * padding - kernel) // stride + 1
    return nn.Sequential(*built), size


class EfficientCapsNet(CapsuleNet):
    """Efficient-CapsNet (Mazzia et al. 2021): few parts, and self-attention instead of rounds.

    A depthwise convolution as large as the maps makes one number of each channel; these are cut
    into parts. With the defaults, the paper's 161,824 parameters.

    Args:
        layers: (channels, kernel, stride) of each convolution of the trunk.
        padded: keep the size of the maps, before stride.
        part_dim, pose_dim: dimensions of a part and of a class's pose.
        decoder: hidden units of the decoder; () is none.
    """

    def __init__(
        self,
        layers: Trunk = EFFICIENT,
        part_dim: int = 8,
        pose_dim: int = 16,
        *,
        padded: bool = False,
        decoder: Sequence[int] = (),
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        super().__init__(in_channels, image_size, num_classes, pose_dim, decoder)
        self.part_dim = part_dim
        self.trunk, size = trunk(layers, padded, in_channels, image_size)
        channels = layers[-1][0]
        self.primary = nn.Conv2d(channels, channels, size, groups=channels)  # [N, 128, 1, 1]
        self.votes = Votes(num_classes, channels // part_dim, part_dim, pose_dim)
        self.prior = nn.Parameter(torch.zeros(num_classes, channels // part_dim))

    def parts(self, images: Tensor) -> Tensor:
        maps = self.primary(self.trunk(images)).flatten(1)
        return soft_squash(maps.unflatten(1, (-1, self.part_dim)))

    def route(self, votes: Tensor) -> tuple[Tensor, Tensor]:
        return attend(votes, self.prior)


class CapsControl(Layers):
    """EfficientCapsNet without capsules: the same trunk, then two linear layers.

    Input [N, C, image_size, image_size], output logits [N, num_classes].

    Args:
        layers, padded: as there.
        hidden: units between the trunk's numbers, one a channel, and the head.
    """

    def __init__(
        self,
        layers: Trunk = EFFICIENT,
        hidden: int = 230,
        *,
        padded: bool = False,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        maps, size = trunk(layers, padded, in_channels, image_size)
        channels = layers[-1][0]
        super().__init__(
            maps,
            nn.Conv2d(channels, channels, size, groups=channels),
            nn.Flatten(),
            nn.Linear(channels, hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )


class HVCNet(nn.Module):
    """Homogeneous vector capsules (Byerly et al. 2020): no matrices and no routing.

    The channels at each position are one part. It is multiplied with a learned vector for each
    class, element by element; the sum over positions, normalised, is the pose, and the sum of the
    pose's elements is the logit. Input [N, C, image_size, image_size], output logits
    [N, num_classes].

    Args:
        layers, padded: as in `EfficientCapsNet`.
    """

    def __init__(
        self,
        layers: Trunk = EFFICIENT,
        *,
        padded: bool = True,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        super().__init__()
        self.trunk, size = trunk(layers, padded, in_channels, image_size)
        weight = torch.empty(num_classes, layers[-1][0], size**2)
        self.weight = nn.Parameter(nn.init.normal_(weight, std=size**-1))
        self.norm = nn.BatchNorm2d(num_classes * layers[-1][0])

    def forward(self, images: Tensor) -> Tensor:
        parts = self.trunk(images).flatten(2)  # [N, D, I]
        poses = torch.einsum("ndi,kdi->nkd", parts, self.weight)
        poses = self.norm(poses.flatten(1)[..., None, None]).relu()
        return poses.flatten(1).unflatten(1, (len(self.weight), -1)).sum(2)
