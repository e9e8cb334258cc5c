"""The compact convolutional transformer with fixed positions, stochastic depth and sequence pooling.

Hassani, Walton, Shah, Abuduweili, Li, Shi: Escaping the Big Data Paradigm with Compact Transformers. arXiv 2104.05704,
in the form that `keep.ConTraCon` builds on (Roy et al., ICCV 2023, arXiv 2308.11357).

1. Tokens: layers of k x k convolution without bias, ReLU and halving by a 3 x 3 maximum; sines and cosines of the place
   are added.
2. A block: x = x + drop(attention(norm1(x))); x = norm2(x); x = x + drop(mlp(x)). The second sum starts from the
   *normalised* tokens, and nothing in the attention has a bias. drop: stochastic depth, its chance rising from 0 in
   the first block to `drop_path` in the last.
3. The features are the mean of the tokens, weighted by the softmax of one learnt linear score.

`models.vit.CCT` differs: learnt positions, biases, a norm before pooling, no stochastic depth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engram.errors import EngramError
from engram.models.output import Output
from engram.models.vit import Attention, CompactBlock, ImageTransformer


class CompactTransformer(ImageTransformer):
    """Features of square images: `pixel_values` [B, channels, image_size, image_size] -> [B, width].

    `convolutions`, `kernel`: layers of the tokenizer, and their size (odd). The defaults are CCT-6/3x1.
    `attention_dropout` and `drop_path` draw from torch's global generator in training mode, as dropout does:
    `engine.fit` puts one of the training's own in its place, on the CPU; on a GPU the dropout of attention follows the
    device's own. EngramError for images that are not square, an even kernel, or an odd width.
    """

    def __init__(
        self,
        image_size: int = 32,
        channels: int = 3,
        width: int = 256,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        convolutions: int = 1,
        kernel: int = 3,
        attention_dropout: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0 or width % 2:
            raise EngramError(f"kernels are odd and widths even; got a kernel of {kernel} and a width of {width}.")
        self.image_size, self.width, self.heads = image_size, width, heads
        into = [channels, *[width] * (convolutions - 1)]
        self.tokenizer = nn.Sequential(*(_tokenizer(c, width, kernel) for c in into))
        side = image_size
        for _ in range(convolutions):
            side = (side + 1) // 2
        self.register_buffer("positions", sinusoids(side * side, width), persistent=False)
        rates = torch.linspace(0, drop_path, depth).tolist()
        self.blocks = nn.Sequential(*(StochasticBlock(width, heads, mlp_ratio, attention_dropout, p) for p in rates))
        self.pool = nn.Linear(width, 1)
        self.apply(_initialise)

    def tokens(self, pixel_values: Tensor) -> Tensor:
        """What the first block is given: [B, N, width]."""
        return self.tokenizer(self._checked(pixel_values)).flatten(2).transpose(1, 2) + self.positions

    def forward(self, pixel_values: Tensor | None = None, tokens: Tensor | None = None) -> Output:
        """`tokens`: those of the images, where they are at hand already."""
        if tokens is None:
            if pixel_values is None:
                raise EngramError("CompactTransformer needs pixel_values [B, channels, h, w].")
            tokens = self.tokens(pixel_values)
        tokens = self.blocks(tokens)
        return Output(pooler_output=pooled(tokens, self.pool(tokens)))

    @property
    def attention_weights(self) -> list[str]:
        """The names of the query, key and value matrices, layer by layer; each is [width, width], out x in."""
        parts = ("query", "key", "value")
        return [f"blocks.{k}.attention.{part}.weight" for k in range(len(self.blocks)) for part in parts]

    @property
    def tuned(self) -> list[str]:
        """The names of the parameters of norms and pooling: few, and what a further task may have of its own."""
        return [name for name, _ in self.named_parameters() if ".norm" in name or name.startswith("pool.")]


class BareAttention(Attention):
    """Self-attention without any bias; `dropout` is that of its weights."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads, dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))


class StochasticBlock(CompactBlock):
    """The block with both sums left out at random, in training."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, attention_dropout: float, drop_path: float) -> None:
        super().__init__(width, heads, mlp_ratio, 0.0)
        self.attention = BareAttention(width, heads, attention_dropout)
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(x + self.drop(self.attention(self.norm1(x))))
        return x + self.drop(self.mlp(x))


class DropPath(nn.Module):
    """Stochastic depth: in training, a row's whole branch [B, ...] is 0 with chance p, else divided by 1 - p.

    Huang et al.: Deep Networks with Stochastic Depth. ECCV 2016, arXiv 1603.09382. EngramError for p outside [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise EngramError(f"the chance of stochastic depth lies in [0, 1); got {p}.")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        stays = torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.p
        return x * stays.to(x) / (1 - self.p)


def pooled(tokens: Tensor, scores: Tensor) -> Tensor:
    """The mean of tokens [B, N, d] with weights softmax(scores [B, N, 1]) over N: [B, d]."""
    return (scores.softmax(1) * tokens).sum(1)


def sinusoids(places: int, width: int) -> Tensor:
    """Codes of places 0, 1, ... [places, width]: columns 2i and 2i + 1 are sine and cosine of place / 10000^(2i/width).

    Vaswani et al., arXiv 1706.03762, section 3.5.
    """
    rates = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(places, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1).float()


def _tokenizer(into: int, out: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))


def _initialise(part: nn.Module) -> None:
    """Linear layers start normal with deviation 0.02, convolutions as He et al. (2015) have it for ReLU."""
    if isinstance(part, nn.Linear):
        nn.init.trunc_normal_(part.weight, std=0.02)
        if part.bias is not None:
            nn.init.zeros_(part.bias)
    if isinstance(part, nn.Conv2d):
        nn.init.kaiming_normal_(part.weight)
