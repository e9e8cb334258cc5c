"""Linear support vector machines, one class against the rest, on rows that come block by block.

The objective of every class c, with y = 1 on its rows and -1 on all others, is that of LIBLINEAR's L2-regularised
L2-loss classifier:

    f(w) = ||w||² / 2 + C sum over rows of max(0, 1 - y w·x)²,        x with a 1 behind it, so that w holds the bias.

It is solved by Newton's method, all classes at once; each step by conjugate gradients, whose products with the Hessian
I + 2 C X_a' X_a (a: the rows with y w·x < 1) need one look at every block. Rows are never together in memory.

Keerthi, DeCoste: A Modified Finite Newton Method for Fast Solution of Large Scale Linear SVMs. JMLR 6, 2005; Lin, Weng,
Keerthi: Trust Region Newton Method for Large-Scale Logistic Regression. JMLR 9, 2008.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from engram.errors import EngramError

Blocks = Callable[[], Iterable[tuple[int, Tensor]]]  # (column of the class, rows [n, d]), the same at every call
Bits = list[np.ndarray]  # for every block which rows are active, eight classes a byte, uint8 [n, ceil(k / 8)]
STEPS, INNER, FORCING, LEAST_STEP = 100, 100, 0.1, 2.0**-20


def squared_hinge(blocks: Blocks, classes: int, *, C: float = 1.0, tol: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Weights [d, k] and biases [k] in float64, for k `classes`.

    Done when the gradient of every class is at most `tol` times what it was at 0. EngramError without any row. Cost:
    O(rows d k) for each product with the Hessian, some ten to a step, and some ten steps; memory: a block, one bit
    for every row and class, and O(d k).
    """
    width = next((rows.shape[1] for _, rows in blocks()), None)
    if width is None:
        raise EngramError("a classifier cannot be fitted on no rows")
    w = torch.zeros(width + 1, classes, dtype=torch.float64)
    value, gradient, active = _evaluated(blocks, w, C)
    first = gradient.norm(dim=0)
    for _ in range(STEPS):
        open_ = gradient.norm(dim=0) > tol * first
        if not bool(open_.any()):
            break
        direction = _newton(blocks, active, -gradient * open_, C)
        w, value, gradient, active = _searched(blocks, w, direction, (value, gradient, active), C)
    return w[:-1], w[-1]


def _evaluated(blocks: Blocks, w: Tensor, C: float) -> tuple[Tensor, Tensor, Bits]:
    """f [k], its gradient [d + 1, k], and which rows are active."""
    value, gradient, active = w.square().sum(0) / 2, w.clone(), []
    for column, rows in blocks():
        x = rows.double()
        short = (1 - _signed(torch.addmm(w[-1], x, w[:-1]), column)).clamp_(min=0)
        active.append(np.packbits((short > 0).numpy(), axis=1))
        value = value + C * short.square().sum(0)
        _add(gradient, x, _signed(short, column), -2 * C)
    return value, gradient, active


def _newton(blocks: Blocks, active: Bits, aim: Tensor, C: float) -> Tensor:
    """Conjugate gradients for H s = aim, a system for each class; those that are done move no more."""
    s, r = torch.zeros_like(aim), aim.clone()
    p, rr = r.clone(), r.square().sum(0)
    enough = (FORCING**2) * rr
    for _ in range(INNER):
        going = rr > enough
        if not bool(going.any()):
            break
        hp = p.clone()
        for (_, rows), bits in zip(blocks(), active, strict=True):
            x, mask = rows.double(), torch.from_numpy(np.unpackbits(bits, axis=1, count=p.shape[1]))
            _add(hp, x, torch.addmm(p[-1], x, p[:-1]).mul_(mask), 2 * C)
        alpha = torch.where(going, rr / (p * hp).sum(0).clamp(min=1e-300), 0.0)
        s, r = s + alpha * p, r - alpha * hp
        new = r.square().sum(0)
        p, rr = torch.where(going, r + new / rr.clamp(min=1e-300) * p, p), torch.where(going, new, rr)
    return s


def _searched(
    blocks: Blocks, w: Tensor, direction: Tensor, here: tuple[Tensor, Tensor, Bits], C: float
) -> tuple[Tensor, Tensor, Tensor, Bits]:
    """The first of 1, 1/2, 1/4 … times the direction that lessens f enough, for each class."""
    value, gradient, _ = here
    slope = (gradient * direction).sum(0)
    step = torch.ones_like(value)
    while True:
        new = w + step * direction
        found = _evaluated(blocks, new, C)
        bad = found[0] > value + 1e-4 * step * slope + 1e-12 * value.abs()
        if not bool(bad.any()) or float(step.min()) < LEAST_STEP:
            return new, *found
        step = torch.where(bad, step / 2, step)


def _add(total: Tensor, x: Tensor, values: Tensor, factor: float) -> None:
    """Add factor times the product of the rows, a 1 behind each, with values [n, k] to a total [d + 1, k]."""
    total[:-1].addmm_(x.T, values, alpha=factor)
    total[-1].add_(values.sum(0), alpha=factor)


def _signed(values: Tensor, column: int) -> Tensor:
    """Values [n, k] times y, for rows of the class in this column."""
    signed = -values
    signed[:, column] = values[:, column]
    return signed
