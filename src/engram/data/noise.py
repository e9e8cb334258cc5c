"""Damage to inputs from an explicit generator: hidden areas, replaced and noisy values. Labels are never read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engram.data.table import Table
from engram.errors import EngramError, unknown

Damage = Callable[[Tensor, float, torch.Generator], Tensor]


def occlude(x: Tensor, share: float, generator: torch.Generator, value: float = 0.0) -> Tensor:
    """Images [B, C, H, W], each with one rectangle of `share` of its area set to `value`, at a random place.

    The rectangle has the image's proportions as nearly as whole pixels allow; its area is right to within half of one
    of its columns. With equal draws a larger share hides a place near the smaller one's. EngramError for
    other shapes, and a share outside 0 to 1.
    """
    _between("share", share)
    if x.ndim != 4:
        raise EngramError(f"areas are hidden in images [B, C, H, W]; these values have the shape {tuple(x.shape)}")
    height, width = x.shape[2:]
    tall = min(height, math.ceil(height * math.sqrt(share)))
    wide = round(share * height * width / tall) if tall else 0
    places = torch.rand(len(x), 2, generator=generator)
    top, left = (places * torch.tensor([height - tall + 1, width - wide + 1])).long().unbind(1)
    inside = _span(top, tall, height)[:, :, None] & _span(left, wide, width)[:, None, :]
    return x.masked_fill(inside[:, None].to(x.device), value)


def corrupt(x: Tensor, kind: str, level: float, generator: torch.Generator) -> Tensor:
    """Values [B, …] in [0, 1], damaged; the same shape and type.

    `kind` and what `level` (0 to 1) means for it: "occlusion": share of the area hidden (`occlude`); "replace": chance
    of each value to become uniform noise; "gaussian": standard deviation of added normal noise, clamped to [0, 1].
    uint8 images are damaged as values in [0, 1] and rounded. Level 0 changes nothing. EngramError for an unknown kind
    and a level outside 0 to 1.
    """
    if kind not in KINDS:
        raise unknown("kind of damage", kind, KINDS)
    _between("level", level)
    if x.dtype != torch.uint8:
        return KINDS[kind](x, level, generator)
    return KINDS[kind](x.float() / 255, level, generator).mul(255).round().to(torch.uint8)


def corrupted(table: Table, kind: str, level: float, generator: torch.Generator) -> Table:
    """The same rows, ids and labels with all inputs damaged by `corrupt`."""
    return replace(table, inputs={name: corrupt(x, kind, level, generator) for name, x in table.inputs.items()})


def _replace(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    hit = torch.rand(x.shape, generator=generator) < level
    return torch.where(hit.to(x.device), torch.rand(x.shape, generator=generator).to(x), x)


def _gaussian(x: Tensor, level: float, generator: torch.Generator) -> Tensor:
    return (x + level * torch.randn(x.shape, generator=generator).to(x)).clamp(0, 1)


def _span(start: Tensor, length: int, size: int) -> Tensor:
    """[B, size]: is this line one of the `length` from `start` [B] on?"""
    lines = torch.arange(size)
    return (lines >= start[:, None]) & (lines < start[:, None] + length)


def _between(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise EngramError(f"{name} of damage lies in 0 to 1, not {value}")


KINDS: dict[str, Damage] = {"occlusion": occlude, "replace": _replace, "gaussian": _gaussian}
