"""Augmentation: random changes of whole batches that leave a row's label as it is, from an explicit generator.

All draws of a call come from the `draws` that are handed over, in the order of the rows: a generator named after
(seed, epoch), as `run.generator("views", epoch)` gives it, yields the same bits after a resume. Stored rows are never
changed, and nothing here reads labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.data.table import Batch
from engram.errors import EngramError


def crop(x: Tensor, padding: tuple[int, int], draws: torch.Generator) -> Tensor:
    """A window of the old size at a random place of each image [B, C, H, W] that was padded with zeros.

    `padding`: (rows above and below, columns left and right) in pixels; an image moves by up to so many, each
    distance equally likely.
    """
    count, _, height, width = x.shape
    down, right = (_whole(count, 2 * most + 1, draws).to(x.device) for most in padding)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    lines = (down[:, None] + torch.arange(height, device=x.device))[:, :, None]
    columns = (right[:, None] + torch.arange(width, device=x.device))[:, None, :]
    images = torch.arange(count, device=x.device)[:, None, None]
    return padded.movedim(1, -1)[images, lines, columns].movedim(-1, 1).contiguous()


def flip(x: Tensor, chance: float, draws: torch.Generator) -> Tensor:
    """Images [B, C, H, W], each mirrored left to right with this chance."""
    return torch.where(_per_image(_uniform(len(x), draws) < chance, x), x.flip(3), x)


def brighten(x: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Images [B, C, H, W], each times a factor uniform in [1 - strength, 1 + strength]. Values are not clamped."""
    return x * _factors(x, strength, draws)


def contrast(x: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    """Images [B, C, H, W], the distances of each from its own mean times a factor uniform in [1 - strength,
    1 + strength]. Values are not clamped."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * _factors(x, strength, draws)


def noise(x: Tensor, deviation: float, draws: torch.Generator) -> Tensor:
    """Vectors [B, d] with normal noise added, of this standard deviation in the units of the values."""
    drawn = torch.randn(x.shape, generator=draws, device=draws.device, dtype=torch.float32)
    return x + deviation * drawn.to(x)


@dataclass(frozen=True)
class Augment:
    """What is done to a row, as plain data; 0 leaves a step out.

    Images, float [B, C, H, W]: `shift`, the largest movement as a share of each side, by zero padding and a random
    crop (1/8 of 32 pixels are the usual 4); `flip`, the chance of a mirrored image: 0.5 suits photographs, not digits
    or letters; `brightness` and `contrast`, the largest change of a factor around 1. Vectors, float [B, d]: `noise`,
    its standard deviation. Other inputs stay as they are. EngramError for a value outside its range.
    """

    shift: float = 0.125
    flip: float = 0.0
    brightness: float = 0.4
    contrast: float = 0.4
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("shift", "flip", "brightness", "contrast"):
            if not 0 <= getattr(self, name) <= 1:
                raise EngramError(f"{name} of an augmentation lies in 0 to 1, not {getattr(self, name)}")
        if not self.noise >= 0:
            raise EngramError(f"noise of an augmentation is a standard deviation, 0 or more, not {self.noise}")

    def __call__(self, inputs: Mapping[str, Tensor], draws: torch.Generator) -> dict[str, Tensor]:
        """The inputs of a batch, by name, changed anew for every row. EngramError if there is nothing to change:
        neither images nor vectors."""
        if not any(map(_changeable, inputs.values())):
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            raise EngramError(f"views are made of images [B, C, H, W] or vectors [B, d] of floats; there is {shapes}")
        return {name: self._changed(value, draws) if _changeable(value) else value for name, value in inputs.items()}

    def _changed(self, x: Tensor, draws: torch.Generator) -> Tensor:
        if x.ndim == 2:
            return noise(x, self.noise, draws) if self.noise else x
        height, width = (round(self.shift * side) for side in x.shape[2:])
        x = crop(x, (height, width), draws) if height or width else x
        x = flip(x, self.flip, draws) if self.flip else x
        x = brighten(x, self.brightness, draws) if self.brightness else x
        return contrast(x, self.contrast, draws) if self.contrast else x


def two_views(batch: Batch, augment: Augment, draws: torch.Generator) -> Batch:
    """The rows of a batch twice, changed independently: B first views, then the B second ones in the same order."""
    views = [augment(batch.inputs, draws) for _ in range(2)]
    inputs = {name: torch.cat([view[name] for view in views]) for name in batch.inputs}
    labels = None if batch.labels is None else torch.cat([batch.labels] * 2)
    extra = {name: torch.cat([value] * 2) for name, value in batch.extra.items()}
    return Batch(inputs, labels, torch.cat([batch.rows] * 2), extra)


def _changeable(x: Tensor) -> bool:
    return x.is_floating_point() and x.ndim in (2, 4)


def _uniform(count: int, draws: torch.Generator) -> Tensor:
    return torch.rand(count, generator=draws, device=draws.device)


def _whole(count: int, below: int, draws: torch.Generator) -> Tensor:
    return torch.randint(below, (count,), generator=draws, device=draws.device)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """Values [B] on the device of images, so that they can be combined with [B, C, H, W]."""
    return values.to(x.device)[:, None, None, None]


def _factors(x: Tensor, strength: float, draws: torch.Generator) -> Tensor:
    return _per_image(1 + strength * (2 * _uniform(len(x), draws) - 1), x).to(x.dtype)
