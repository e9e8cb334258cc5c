"""Small encoders: images, tables or stored features in, features out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from engram.errors import EngramError, unknown
from engram.models.config import Configured
from engram.models.output import Output

Maker = Callable[..., nn.Module]

ACTIVATIONS: dict[str | None, Maker] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus, "leaky_relu": nn.LeakyReLU,
}  # fmt: skip


class Encoder(Configured, nn.Module):
    """Base: keyword tensors in, `Output(pooler_output=[B, width])` out."""

    width: int

    @classmethod
    def fitting(cls, inputs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The arguments that the data determine. `inputs`: the shape of one row, by keyword."""
        return {"channels": image_shape(cls, inputs)[0]}


class MLP(Encoder):
    """Fully connected layers; reads `values` [B, d] or `pixel_values` [B, c, h, w] as [B, inputs]."""

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int] = (128, 128),
        activation: str = "relu",
        dropout: float = 0.0,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        norms: dict[str | None, Maker] = {None: nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        normed, active = _chosen("norm", norm, norms), _chosen("activation", activation, ACTIVATIONS)
        layers = [
            nn.Sequential(nn.Linear(into, out), normed(out), active(), nn.Dropout(dropout))
            for into, out in zip((inputs, *hidden), hidden, strict=False)
        ]
        self.inputs = inputs
        self.width = (inputs, *hidden)[-1]
        self.layers = nn.Sequential(*layers)

    @classmethod
    def fitting(cls, inputs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        return {"inputs": flat_size(cls, inputs)}

    def forward(self, values: Tensor | None = None, pixel_values: Tensor | None = None) -> Output:
        return Output(pooler_output=self.layers(flat(self, self.inputs, values, pixel_values)))


class ConvNet(Encoder):
    """One 3×3 convolution a stage, each followed by a halving of the image, then the mean over the places.

    Reads `pixel_values` [B, channels, h, w] of any size. With norm="batch" a row's features depend on its
    batch in training mode; with "group" never.
    """

    def __init__(self, channels: int = 1, widths: Sequence[int] = (32, 64, 128), norm: str | None = "batch") -> None:
        super().__init__()
        norms: dict[str | None, Maker] = {None: nn.Identity, "batch": nn.BatchNorm2d, "group": _groups}
        normed = _chosen("norm", norm, norms)
        stages = [
            nn.Sequential(
                nn.Conv2d(into, out, 3, padding=1, bias=norm is None), normed(out), nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            )
            for into, out in zip((channels, *widths), widths, strict=False)
        ]  # fmt: skip
        self.width = (channels, *widths)[-1]
        self.stages = nn.Sequential(*stages)

    def forward(self, pixel_values: Tensor) -> Output:
        return Output(pooler_output=self.stages(pixel_values).mean(dim=(-2, -1)))


class Identity(Encoder):
    """Stored features as they are: `values` [B, width] pass through. No parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    @classmethod
    def fitting(cls, inputs: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        return {"width": flat_size(cls, inputs)}

    def forward(self, values: Tensor | None = None, pixel_values: Tensor | None = None) -> Output:
        return Output(pooler_output=flat(self, self.width, values, pixel_values))


def image_shape(cls: type, inputs: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """(channels, height, width) of `pixel_values`. Raises EngramError when there are no images."""
    if "pixel_values" not in inputs:
        raise EngramError(f"{cls.__name__} reads pixel_values; there is {_listed(inputs)}.")
    return inputs["pixel_values"]


def flat_size(cls: type, inputs: Mapping[str, Sequence[int]]) -> int:
    """The numbers in one row of `values`, else of `pixel_values`."""
    shape = inputs.get("values", inputs.get("pixel_values"))
    if shape is None:
        raise EngramError(f"{cls.__name__} reads values or pixel_values; there is {_listed(inputs)}.")
    return math.prod(shape)


def flat(model: nn.Module, size: int, values: Tensor | None, pixel_values: Tensor | None) -> Tensor:
    """The one tensor that was given, as [B, size]."""
    given = values if values is not None else pixel_values
    if given is None:
        raise EngramError(f"{type(model).__name__} needs values [B, d] or pixel_values [B, c, h, w].")
    rows = given.flatten(1)
    if rows.shape[1] != size:
        raise EngramError(f"{type(model).__name__} reads {size} numbers a row; got {rows.shape[1]}.")
    return rows


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "no number and no image in these rows"


def _groups(width: int) -> nn.Module:
    """At most 8 groups of at least 4 channels: a group of one channel would wipe out a 1×1 image."""
    return nn.GroupNorm(1 if width % 4 else math.gcd(8, width // 4), width)


def _chosen(kind: str, name: str | None, choices: Mapping[str | None, Maker]) -> Maker:
    if name not in choices:
        raise unknown(kind, name, choices)
    return choices[name]
