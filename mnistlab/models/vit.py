"""Vision transformer (Dosovitskiy et al. 2020): an image as a sequence of patches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHOICES = {"positions": ("learned", "sinusoidal", "none"), "pool": ("class", "mean")}


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), [N, T, D] -> [N, T, D]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        """Queries, keys and values of each head: [3, N, heads, T, D/heads]"""
        n, t, d = x.shape
        return self.qkv(x).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)

    def weights(self, x: Tensor) -> Tensor:
        """What each token (row) takes from each other: [N, heads, T, T], rows add up to 1."""
        q, k, _ = self.split(x)
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, D/heads]
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Tokens exchange, then each is transformed alone; both on a residual stream, normalised
    before (Xiong et al. 2020). [N, T, D] -> [N, T, D]"""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


def sinusoids(tokens: int, width: int) -> Tensor:
    """Sine and cosine of each position at `width` / 2 frequencies: [tokens, width] (Vaswani et al.
    2017, section 3.5)."""
    rates = 10_000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(tokens)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)[:, :width]


class ViT(nn.Module):
    """Patches become tokens, tokens pass through blocks, one vector is read out.

    Input [N, C, image_size, image_size], output logits [N, num_classes].

    Args:
        patch: side of a patch, pixels; divides `image_size`.
        width: of a token; a multiple of `heads`.
        depth: number of blocks.
        mlp: hidden units of a block's MLP, in widths.
        positions: "learned", "sinusoidal" (no parameters) or "none".
        pool: what is read out: an extra "class" token, or the "mean" of all tokens.
        pre_logits: a linear layer and tanh before the head, as the paper has in pre-training.
        dropout: probability, on what each half of a block adds, and on the embedded patches.

    Raises:
        ValueError: sizes that do not divide, or an unknown choice.
    """

    def __init__(
        self,
        patch: int = 4,
        width: int = 64,
        depth: int = 6,
        heads: int = 4,
        mlp: float = 2,
        *,
        positions: str = "learned",
        pool: str = "class",
        pre_logits: bool = False,
        dropout: float = 0.0,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
    ):
        super().__init__()
        for name, value in (("positions", positions), ("pool", pool)):
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r}: one of {', '.join(CHOICES[name])}")
        if image_size % patch or width % heads:
            raise ValueError(
                f"patch={patch} must divide image_size={image_size}, and heads={heads} "
                f"must divide width={width}"
            )
        tokens = (image_size // patch) ** 2 + (pool == "class")
        self.pool = pool
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if pool == "class" else None
        place = torch.zeros(1, tokens, width)
        if positions == "learned":
            self.positions = nn.Parameter(nn.init.normal_(place, std=0.02))
        else:
            place = sinusoids(tokens, width)[None] if positions == "sinusoidal" else place
            self.register_buffer("positions", place, persistent=False)
        self.drop = nn.Dropout(dropout)
        hidden = int(width * mlp)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        before = [nn.Linear(width, width), nn.Tanh()] if pre_logits else []
        self.head = nn.Sequential(*before, nn.Linear(width, num_classes))

    def tokens(self, images: Tensor) -> Tensor:
        """What enters the first block: [N, C, H, W] -> [N, T, D]"""
        x = self.embed(images).flatten(2).transpose(1, 2)
        if self.token is not None:
            token = self.token.expand(x.shape[0], -1, -1)  # torch.export would freeze len(x)
            x = torch.cat((token, x), 1)
        return self.drop(x + self.positions)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(images)))
        return self.head(x[:, 0] if self.pool == "class" else x.mean(1))


@torch.no_grad()
def attention_maps(model: ViT, images: Tensor) -> Tensor:
    """The attention weights of every block: [N, C, H, W] -> [N, depth, heads, T, T]. Rows ask, and
    add up to 1."""
    x, found = model.tokens(images), []
    for block in model.blocks:
        found.append(block.attention.weights(block.norm1(x)))
        x = block(x)
    return torch.stack(found, 1)


def rollout(maps: Tensor) -> Tensor:
    """Of which input tokens each output token is made, [N, depth, heads, T, T] -> [N, T, T]:
    attention rollout (Abnar and Zuidema 2020). Rows add up to 1."""
    one = torch.eye(maps.shape[-1], device=maps.device)
    product = one
    for a in maps.mean(2).unbind(1):  # [N, T, T], from the first block
        product = (a + one) / 2 @ product  # the residual path carries as much as attention
    return product
