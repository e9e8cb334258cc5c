"""The heads: linear, cosine, nearest mean, solved in closed form; and one for numbers instead of classes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.config import Configured
from engram.models.head import Head, class_ids, predict_classes

__all__ = [
    "CosineHead", "Head", "LinearHead", "MatrixHead", "NearestMeanHead", "ValueHead",
    "predict_classes",
]  # fmt: skip


class LinearHead(Head):
    """s = W f + b, one row a class; rows start as those of torch's Linear, uniform in ±1/sqrt(d)."""

    rows: ClassVar[tuple[str, ...]] = ("weight", "bias")
    bias: Tensor | None

    def __init__(
        self, width: int, classes: Iterable[int] | Tensor = (), bias: bool = True, classes_total: int = 0
    ) -> None:
        super().__init__(width, classes_total)
        self.weight = nn.Parameter(torch.empty(0, width))
        self.register_parameter("bias", nn.Parameter(torch.empty(0)) if bias else None)
        self.grow(classes, None)

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        return _uniform((count, *getattr(self, name).shape[1:]), self.width, generator)

    def scores(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def set(self, classes: Iterable[int] | Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Rows from outside: weight [k, d], bias [k]; the rows of other classes keep their bits."""
        self._put(classes, weight=weight, **_optional(self, bias))


class CosineHead(Head):
    """s = scale * cos(f, w_c): lengths of features and rows do not matter. `frozen`: no gradient for rows."""

    rows: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(
        self,
        width: int,
        classes: Iterable[int] | Tensor = (),
        scale: float = 16.0,
        frozen: bool = False,
        classes_total: int = 0,
    ) -> None:
        super().__init__(width, classes_total)
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(0, width), requires_grad=not frozen)
        self.grow(classes, None)

    def fresh(self, name: str, count: int, generator: torch.Generator | None) -> Tensor:
        return _uniform((count, self.width), self.width, generator)

    def scores(self, features: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(self.weight, dim=-1))

    def set(self, classes: Iterable[int] | Tensor, weight: Tensor) -> None:
        """Rows from outside, e.g. embeddings of the class names: weight [k, d]."""
        self._put(classes, weight=weight)


class SolvedHead(Head):
    """A head that is computed, not trained: a class has no column before its row was set."""

    def grow(self, classes: Iterable[int] | Tensor, generator: torch.Generator | None) -> None:
        """Only makes room among the dense columns; the classes stay at -inf until `set` knows their rows."""
        self._lengthen("live", max([len(self.live), *(label + 1 for label in class_ids(classes))]))


class NearestMeanHead(SolvedHead):
    """s_c = m_c . u - ||m_c||^2 / 2, of which the argmax is the class of the nearest mean; all in float64.

    `normalise`: u = f / max(||f||, 1e-12), else u = f. The means are taken as given and not normalised again
    (Janson et al. 2022, arXiv:2210.04428).
    """

    rows: ClassVar[tuple[str, ...]] = ("means",)
    means: Tensor

    def __init__(self, width: int, normalise: bool = True, classes_total: int = 0) -> None:
        super().__init__(width, classes_total)
        self.normalise = normalise
        self.register_buffer("means", torch.empty(0, width, dtype=torch.float64))

    def scores(self, features: Tensor) -> Tensor:
        u = _unit(features, self.normalise).to(self.means)
        return u @ self.means.T - 0.5 * self.means.square().sum(1)

    def set(self, classes: Iterable[int] | Tensor, means: Tensor) -> None:
        """Means of classes, [k, d]; the means of other classes keep their bits."""
        self._put(classes, means=means)


class MatrixHead(SolvedHead):
    """s = u W + b with W from a closed-form solution, in float64; `normalise` as for the nearest mean."""

    rows: ClassVar[tuple[str, ...]] = ("weight", "bias")
    bias: Tensor | None

    def __init__(self, width: int, normalise: bool = False, bias: bool = False, classes_total: int = 0) -> None:
        super().__init__(width, classes_total)
        self.normalise = normalise
        self.weight = nn.Parameter(torch.empty(0, width, dtype=torch.float64))
        self.register_parameter("bias", nn.Parameter(torch.empty(0, dtype=torch.float64)) if bias else None)

    def scores(self, features: Tensor) -> Tensor:
        return F.linear(_unit(features, self.normalise).to(self.weight), self.weight, self.bias)

    def set(self, classes: Iterable[int] | Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """Columns of the solution for these classes: weight [d, k], bias [k]; others keep their bits."""
        self._put(classes, weight=weight.T, **_optional(self, bias))


class ValueHead(Configured, nn.Linear):
    """Numbers instead of classes: [B, d] -> [B, outputs], an ordinary linear layer."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        self.width = width


def _optional(head: LinearHead | MatrixHead, bias: Tensor | None) -> dict[str, Tensor]:
    if (bias is None) != (head.bias is None):
        raise EngramError("give a bias exactly when the head was made with bias=True.")
    return {} if bias is None else {"bias": bias}


def _unit(features: Tensor, normalise: bool) -> Tensor:
    features = features.double()
    return F.normalize(features, dim=-1, eps=1e-12) if normalise else features


def _uniform(shape: tuple[int, ...], width: int, generator: torch.Generator | None) -> Tensor:
    bound = 1 / math.sqrt(width)
    device = generator.device if generator is not None else "cpu"
    return torch.empty(shape, device=device).uniform_(-bound, bound, generator=generator)
