"""Small vision transformers: with a class token (ViT), and with convolutions and sequence pooling (CCT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.encoders import Encoder, image_shape
from engram.models.output import Output


class Attention(nn.Module):
    """Multi-head self-attention with separate query, key and value matrices: [B, T, width] -> the same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise EngramError(f"the width of a transformer is a multiple of its heads; {width} is not of {heads}.")
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._split(part(x)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Attention, then a small MLP, each on normalised tokens and added to what came in."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, inner),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(inner, width),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CompactBlock(Block):
    """As the compact transformers were published: the second sum starts from the normalised tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.attention(self.norm1(x)))
        return x + self.mlp(x)


class ImageTransformer(Encoder):
    """What both have in common: square images of one size, and the arguments that follow from them."""

    image_size: int

    @classmethod
    def fitting(cls, inputs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        channels, height, width = image_shape(cls, inputs)
        if height != width:
            raise EngramError(f"{cls.__name__} reads square images; these are {height}×{width}.")
        return {"channels": channels, "image_size": height}

    def _checked(self, pixel_values: Tensor) -> Tensor:
        size, (height, width) = self.image_size, pixel_values.shape[-2:]
        if (height, width) != (size, size):
            raise EngramError(f"the model was built for images of {size}×{size}; got {height}×{width}.")
        return pixel_values


class ViT(ImageTransformer):
    """Dosovitskiy et al. (2020), arXiv:2010.11929: linear patches, a class token, learnt positions; the
    features are the normalised class token. Reads `pixel_values` [B, channels, image_size, image_size].
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        channels: int = 3,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise EngramError(f"patch_size divides image_size; {patch_size} does not divide {image_size}.")
        self.image_size, self.width = image_size, width
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch_size) ** 2 + 1, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, mlp_ratio, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.patches(self._checked(pixel_values)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.blocks(self.dropout(tokens + self.positions))
        return Output(pooler_output=self.norm(tokens[:, 0]))


class CCT(ImageTransformer):
    """Hassani et al. (2021), arXiv:2104.05704: tokens from `convolutions` layers of 3×3 convolution, ReLU and
    halving; the features are a learnt, softmax-weighted mean of the tokens. Reads `pixel_values` as ViT does.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        dropout: float = 0.0,
        convolutions: int = 1,
    ) -> None:
        super().__init__()
        self.image_size, self.width = image_size, width
        layers = [_tokenizer(channels if at == 0 else width, width) for at in range(convolutions)]
        self.tokenizer = nn.Sequential(*layers)
        side = image_size
        for _ in range(convolutions):
            side = (side + 1) // 2
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(CompactBlock(width, heads, mlp_ratio, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, 1)

    def forward(self, pixel_values: Tensor) -> Output:
        tokens = self.tokenizer(self._checked(pixel_values)).flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(self.dropout(tokens + self.positions)))
        weights = self.pool(tokens).softmax(dim=1)
        return Output(pooler_output=(weights * tokens).sum(dim=1))


def _tokenizer(into: int, out: int) -> nn.Sequential:
    convolution = nn.Conv2d(into, out, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))
