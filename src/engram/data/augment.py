"""Augmentation: random changes of whole batches that leave a row's label as it is, from an explicit generator.

All draws of a call come from the `draws` that are handed over, in the order of the rows: a generator named after
(seed, epoch), as `run.generator("views", epoch)` gives it, yields the same bits after a resume. Stored rows are never
changed, and nothing here reads labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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


Steps = tuple[tuple[str, float], ...]  # operations by name, in order, with their strengths


def steps_of_policy(draws: torch.Generator) -> Steps:
    """One sub-policy of AutoAugment's policy for CIFAR-10, drawn: the operations that happen, with signed strengths.

    Cubuk, Zoph, Mane, Vasudevan, Le: AutoAugment. CVPR 2019, arXiv 1805.09501, appendix: 25 pairs of (operation,
    chance, level 0 to 9), the levels spread evenly over an operation's range. Each call makes five draws, whatever
    happens.
    """
    pair = POLICY[int(torch.randint(len(POLICY), (), generator=draws, device=draws.device))]
    chances, signs = _uniform(2, draws).tolist(), _uniform(2, draws).tolist()
    drawn = zip(pair, chances, signs, strict=True)
    return tuple((name, _strength(name, level, sign < 0.5)) for (name, p, level), chance, sign in drawn if chance < p)


def apply_steps(x: Tensor, steps: Steps) -> Tensor:
    """Images [B, C, H, W] with values in 0 to 1 after these operations, the same for all; still in 0 to 1.

    Strengths: shears and shifts as a share of the side, rotations in degrees, thresholds as a value, bits, factors less
    1 for the rest; operations without one ignore it. What moves in from outside is mid-grey. Moves interpolate
    linearly; an image's result depends on no other. Cost: a few passes over the pixels for each step.
    """
    for name, strength in steps:
        x = _OPERATIONS[name](x, strength)
    return x


# the published sub-policies: (operation, chance, level)
POLICY: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("invert", 0.1, 7), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("shift x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear y", 0.5, 8), ("shift y", 0.7, 9)),
    (("autocontrast", 0.5, 8), ("equalize", 0.9, 2)),
    (("shear y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 5), ("equalize", 0.5, 1)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("shift x", 0.5, 8)),
    (("equalize", 0.3, 7), ("autocontrast", 0.4, 8)),
    (("shift y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 3)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 8), ("equalize", 0.6, 4)),
    (("color", 0.9, 9), ("equalize", 0.6, 6)),
    (("autocontrast", 0.8, 4), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 3)),
    (("shift y", 0.9, 9), ("shift y", 0.7, 9)),
    (("autocontrast", 0.9, 2), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 8), ("invert", 0.1, 3)),
    (("shift y", 0.7, 9), ("autocontrast", 0.9, 1)),
)
# strength at level 0 and level 9, and whether its sign is drawn
RANGES: dict[str, tuple[float, float, bool]] = {
    "shear x": (0.0, 0.3, True),
    "shear y": (0.0, 0.3, True),
    "shift x": (0.0, 150 / 331, True),
    "shift y": (0.0, 150 / 331, True),
    "rotate": (0.0, 30.0, True),
    "color": (0.0, 0.9, True),
    "contrast": (0.0, 0.9, True),
    "sharpness": (0.0, 0.9, True),
    "brightness": (0.0, 0.9, True),
    "solarize": (1.0, 0.0, False),
    "posterize": (8.0, 4.0, False),
    "autocontrast": (0.0, 0.0, False),
    "equalize": (0.0, 0.0, False),
    "invert": (0.0, 0.0, False),
}


def _strength(name: str, level: int, turned: bool) -> float:
    low, high, signed = RANGES[name]
    value = low + (high - low) * level / 9
    return -value if signed and turned else value


def _warp(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """Images moved: a place p of the result, in -1 to 1, shows what was at `matrix` [2, 3] times (p, 1)."""
    grid = F.affine_grid(x.new_tensor(matrix).expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5


def _rotate(x: Tensor, degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    tall = x.shape[2] / x.shape[3]
    return _warp(x, [[c, -s * tall, 0.0], [s / tall, c, 0.0]])


def _blend(x: Tensor, other: Tensor, strength: float) -> Tensor:
    """1 + strength times the way from another image to this one."""
    return (other + (1 + strength) * (x - other)).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    """Luminance [B, 1, H, W]; of other than three channels their mean."""
    weights = x.new_tensor((0.299, 0.587, 0.114) if x.shape[1] == 3 else (1 / x.shape[1],) * x.shape[1])
    return (x * weights[:, None, None]).sum(1, keepdim=True)


def _smooth(x: Tensor) -> Tensor:
    """Each pixel five times and its eight neighbours once, over 13; the border stays."""
    if min(x.shape[2:]) < 3:
        return x
    kernel = x.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    inner = F.conv2d(x, kernel.expand(x.shape[1], 1, 3, 3), groups=x.shape[1])
    border = torch.ones_like(x, dtype=torch.bool)
    border[:, :, 1:-1, 1:-1] = False
    return torch.where(border, x, F.pad(inner, (1, 1, 1, 1)))


def _posterize(x: Tensor, bits: float) -> Tensor:
    step = 2.0 ** (8 - int(bits))
    return torch.floor((x * 255).round() / step) * step / 255


def _autocontrast(x: Tensor) -> Tensor:
    """Each channel of an image stretched to 0 to 1; a channel of one value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-12), x)


def _equalize(x: Tensor) -> Tensor:
    """Each channel's 256 levels replaced by the share of its pixels above the darkest level that are as dark or darker;
    a channel of one level stays."""
    levels = (x * 255).round().clamp(0, 255).long().flatten(2)
    counts = torch.zeros(*levels.shape[:2], 256, device=x.device).scatter_add_(2, levels, torch.ones_like(levels) * 1.0)
    below = counts.cumsum(2)
    darkest = counts.gather(2, levels.amin(2, keepdim=True))
    rest = levels.shape[2] - darkest
    spread = ((below.gather(2, levels) - darkest) / rest.clamp(min=1)).to(x)
    return torch.where(rest > 0, spread, x.flatten(2)).view_as(x)


_OPERATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "shear x": lambda x, s: _warp(x, [[1.0, s, 0.0], [0.0, 1.0, 0.0]]),
    "shear y": lambda x, s: _warp(x, [[1.0, 0.0, 0.0], [s, 1.0, 0.0]]),
    "shift x": lambda x, s: _warp(x, [[1.0, 0.0, 2 * s], [0.0, 1.0, 0.0]]),
    "shift y": lambda x, s: _warp(x, [[1.0, 0.0, 0.0], [0.0, 1.0, 2 * s]]),
    "rotate": _rotate,
    "color": lambda x, s: _blend(x, _grey(x), s),
    "contrast": lambda x, s: _blend(x, _grey(x).mean((2, 3), keepdim=True), s),
    "sharpness": lambda x, s: _blend(x, _smooth(x), s),
    "brightness": lambda x, s: _blend(x, torch.zeros_like(x), s),
    "solarize": lambda x, threshold: torch.where(x < threshold, x, 1 - x),
    "posterize": _posterize,
    "autocontrast": lambda x, _: _autocontrast(x),
    "equalize": lambda x, _: _equalize(x),
    "invert": lambda x, _: 1 - x,
}


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
