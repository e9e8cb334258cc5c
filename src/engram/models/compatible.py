"""Encoders whose vectors are stored and searched: one of unit length, and one that holds an older space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engram.errors import EngramError
from engram.models.encoders import Encoder
from engram.models.output import Output


class Embedding(Encoder):
    """An encoder, a linear layer to `width` numbers, and unit length: [B, width]."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.width = inner, width
        self.layer = nn.Linear(_width(inner), width)

    def forward(self, **inputs: Any) -> Output:
        return Output(pooler_output=F.normalize(self.layer(_features(self.inner, inputs)), dim=1))


class BasisTransform(Encoder):
    """An embedding of a new space and an older one: the vector [v, scale · u], turned by an orthogonal basis.

    Zhou et al. (2023), arXiv:2211.03989. h = a linear layer on the inner features, [B, own + old];
    u = the first `own` entries of h at unit length; v = `extra` entries of A relu(h), at unit length.
    The first `old` entries of the result are compared with vectors of the older space.

    basis  [extra + own] squared, orthogonal, a buffer: whatever it is, inner products are v·v' + scale² u·u'

    EngramError if the result is too narrow for the older space, or `extra` wider than it.
    """

    basis: Tensor

    def __init__(self, inner: nn.Module, own: int, old: int, extra: int = 32, scale: float = 2.0) -> None:
        super().__init__()
        check_widths(own, old, extra)
        self.inner, self.own, self.old, self.extra, self.scale = inner, own, old, extra, scale
        self.width = extra + own
        self.layer = nn.Linear(_width(inner), own + old)
        self.bridge = nn.Linear(own + old, old)
        self.register_buffer("basis", torch.eye(self.width))

    def parts(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        """v [B, extra] and u [B, own], rows of length 1."""
        h = self.layer(_features(self.inner, inputs))
        between = F.normalize(self.bridge(torch.relu(h)), dim=1)
        return F.normalize(between[:, : self.extra], dim=1), F.normalize(h[:, : self.own], dim=1)

    def turned(self, v: Tensor, u: Tensor, basis: Tensor) -> Tensor:
        """The embedding [B, width] of parts under a basis [width, width]."""
        return torch.cat([v, self.scale * u], dim=1) @ basis.T

    def forward(self, **inputs: Any) -> Output:
        return Output(pooler_output=self.turned(*self.parts(**inputs), self.basis))

    def recovered(self, basis: Tensor) -> Tensor:
        """The linear map R [width, own] with u = embedding @ R."""
        return basis[:, self.extra :] / self.scale


class Rotation(nn.Module):
    """An orthogonal matrix that is trained: (I + S/2) (I - S/2)⁻¹ · base, S = T - Tᵀ skew-symmetric, 0 at the start.

    Cayley's form, which reaches every rotation of the base that turns no direction round by 180°. The base is drawn
    from torch's global generator, uniform among orthogonal matrices; use it under `seeded`. Computed in float64. Cost:
    one linear system, O(d³).
    """

    base: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
        self.register_buffer("base", q * r.diagonal().sign())
        self.lower = nn.Parameter(torch.zeros(size, size))

    def forward(self) -> Tensor:
        """[d, d], float64."""
        lower = self.lower.double().tril(-1)
        half, one = (lower - lower.T) / 2, torch.eye(len(lower)).to(self.base)
        return torch.linalg.solve(one - half, (one + half) @ self.base)


def check_widths(own: int, old: int, extra: int) -> None:
    """EngramError unless `extra` + `own` numbers have room for `old` ones, and `extra` ones come from those."""
    if own + extra < old:
        raise EngramError(
            f"{own} numbers and {extra} extra ones have no room for an older space of {old}: make extra {old - own} "
            "or more, or the new embedding wider"
        )
    if not 0 <= extra <= old:
        raise EngramError(f"the extra numbers are taken from the older space: extra is 0 to {old}, not {extra}")


def _features(inner: nn.Module, inputs: dict[str, Any]) -> Tensor:
    features: Tensor = inner(**inputs).pooler_output
    return features.flatten(1)


def _width(inner: nn.Module) -> int:
    return int(inner.width)  # type: ignore[arg-type]
