"""A head of coding vectors: a class is a place among the features, and the nearest place wins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from engram.models.head import Head


class CodingHead(Head):
    """s_c = -||f/||f|| - v_c/||v_c|| || / temperature: the distance of unit vectors, computed in float64.

    `views`: how many coding vectors a class has, `weight` [born, views, d]; the first alone predicts, the others are
    those of changed views of a row (rotations). They start standard normal. Source: NAPA-VQ, arXiv 2308.09297.
    """

    rows: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        width: int,
        classes: Iterable[int] | Tensor = (),
        views: int = 1,
        temperature: float = 0.1,
        classes_total: int = 0,
    ) -> None:
        super().__init__(width, classes_total)
        self.views, self.temperature = views, temperature
        self.weight = torch.nn.Parameter(torch.empty(0, views, width))
        self.grow(classes, None)

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        device = generator.device if generator is not None else "cpu"
        return torch.randn(count, self.views, self.width, generator=generator, device=device)

    def scores(self, features: Tensor) -> Tensor:
        cosines = F.normalize(features.double(), dim=-1) @ F.normalize(self.weight[:, 0].double(), dim=-1).T
        apart = (2 - 2 * cosines).clamp(min=1e-12).sqrt()
        return (-apart / self.temperature).to(features.dtype)
