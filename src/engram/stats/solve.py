"""Linear systems whose matrix is known by its products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cg(
    apply: Callable[[Tensor], Tensor], b: Tensor, x0: Tensor | None = None, *, tol: float = 1e-6, iters: int = 100
) -> Tensor:
    """Conjugate gradients: x [B, n] with A x = b for each row b [B, n], A symmetric positive definite.

    `apply` takes [B, n] to [B, n], each row by its own A. A row stands still once its residual is at most `tol` times
    the length of b, and also when a direction d with dᵀA d <= 0 comes up: A is not positive definite then, and x is
    that of the iterations before (x0, or 0, if it is the first). In exact arithmetic n iterations suffice; all sums are
    in the type of b. Cost: one product an iteration, and one for x0. (Hestenes, Stiefel 1952.)
    """
    x = torch.zeros_like(b) if x0 is None else x0.clone()
    residual = b.clone() if x0 is None else b - apply(x)
    direction, size = residual.clone(), _dot(residual, residual)
    goal = tol**2 * _dot(b, b)
    going = size > goal
    for _ in range(iters):
        if not bool(going.any()):
            break
        image = apply(direction)
        bend = _dot(direction, image)
        going = going & (bend > 0)
        step = torch.where(going, size / torch.where(going, bend, 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * image
        before, size = size, torch.where(going, _dot(residual, residual), size)
        direction = residual + torch.where(going, size / torch.where(going, before, 1.0), 0.0) * direction
        going = going & (size > goal)
    return x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [B, 1]."""
    return (a * b).sum(-1, keepdim=True)
