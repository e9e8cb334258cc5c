"""How alike two representations of the same rows are, and whether one has collapsed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isnan
from typing import Any

import torch
from torch import Tensor

from engram.errors import EngramError

BLOCK = 256  # rows that are taken at once


def cka(x: Tensor, y: Tensor, *, unbiased: bool = True) -> float:
    """Linear centred kernel alignment of x [n, dx] and y [n, dy], the same rows (Kornblith et al. 2019).

    1 for representations equal up to rotation, scale and shift. `unbiased` uses HSIC1 (n >= 4, Song et al.
    2012) and may be slightly negative; the biased form drifts to 1 as n falls below d. NaN when one side is
    constant. Raises EngramError when n is too small or differs. O(n d²), or O(n² d) when that is less;
    float64. Memory beside the rows: their copies up to 256 rows, else d² and 256 of them.
    """
    _check_rows(x, y, 4 if unbiased else 2)
    if len(x) > BLOCK:
        xs, ys = _Centred(x), _Centred(y)
        return _ratio(*(_hsic_of_blocks(*pair, unbiased) for pair in ((xs, ys), (xs, xs), (ys, ys))))
    x, y = _centred(x), _centred(y)
    return _ratio(_hsic(x, y, unbiased), _hsic(x, x, unbiased), _hsic(y, y, unbiased))


class StreamingCKA:
    """CKA over batches: means of the three unbiased HSIC terms, one ratio at the end (Nguyen et al. 2021).

    Both sides of a batch must hold the same rows; batches of fewer than 4 rows have no HSIC1 and are passed
    over.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in one batch, x [n, dx] and y [n, dy]."""
        if len(x) == len(y) < 4:
            return
        _check_rows(x, y, 4)
        x, y = _centred(x), _centred(y)
        self._sums += torch.tensor([_hsic(x, y, True), _hsic(x, x, True), _hsic(y, y, True)])

    def compute(self) -> float:
        """The CKA of all batches so far (NaN before the first, or if one side was constant)."""
        return _ratio(*self._sums.tolist())


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues, x [n, d]: from 1 to d.

    0 for constant rows. (Roy & Vetterli 2007.) O(n d²), float64.
    """
    share = torch.linalg.svdvals(_centred(x)).square()
    if share.sum() == 0:
        return 0.0
    return torch.special.entr(share / share.sum()).sum().exp().item()


def alignment(z: Tensor, z2: Tensor) -> float:
    """Mean squared distance of positive pairs, z and z2 [n, d] on the unit sphere: from 0 (best) to 4."""
    return (z.double() - z2.double()).square().sum(1).mean().item()


def uniformity(z: Tensor) -> float:
    """log of the mean of exp(-2·squared distance) over all pairs of z [n, d] on the unit sphere.

    Lower is better; 0 for collapsed rows (Wang & Isola 2020). O(n² d), n²/2 doubles.
    """
    pairs = torch.pdist(z.double()).square().mul(-2)
    return (pairs.logsumexp(0) - pairs.new_tensor(len(pairs)).log()).item()


def representation_agreement(similarities: Sequence[float], gaps: Sequence[float]) -> float:
    """The mean over sets of rows of CKA · (1 - |gap|), in [0, 1]; a gap is a difference of k-NN accuracies.

    A CKA that is negative (the unbiased form may be) or undefined counts 0. CKAs of .9 and .5 with gaps of .1 and -.2
    give .605. EngramError for no sets, and for unequal numbers of figures.
    """
    if not similarities or len(similarities) != len(gaps):
        raise EngramError(f"an agreement wants one CKA and one gap a set; got {len(similarities)} and {len(gaps)}")
    shares = [0.0 if isnan(value) else min(max(value, 0.0), 1.0) for value in similarities]
    return sum(share * (1 - abs(gap)) for share, gap in zip(shares, gaps, strict=True)) / len(shares)


def harmonic_mean(one: float, other: float) -> float:
    """2ab / (a + b) of a, b >= 0: between them, and 0 where either is 0. Of .9 and .6: .72."""
    return 2 * one * other / (one + other) if one > 0 and other > 0 else 0.0


def _centred(x: Tensor) -> Tensor:
    """Rows [n, d] in float64 less their mean; exactly zero where only rounding is left."""
    x = x.detach().flatten(1).double()
    rest = x - x.mean(0)
    return torch.zeros_like(rest) if rest.norm() <= 1e-13 * x.norm() else rest


class _Centred:
    """The same for many rows, `BLOCK` at a time."""

    def __init__(self, x: Tensor) -> None:
        self.rows = x.detach().flatten(1)
        self.mean = torch.stack([part.double().sum(0) for part in self.rows.split(BLOCK)]).sum(0) / len(x)
        size, rest = (sum(float(part.square().sum()) for part in parts) for parts in (self._plain(), self._less()))
        self.constant = rest <= 1e-26 * size

    def __iter__(self) -> Iterator[Tensor]:
        return (part * 0 for part in self._plain()) if self.constant else self._less()

    def __len__(self) -> int:
        return len(self.rows)

    def _plain(self) -> Iterator[Tensor]:
        return (part.double() for part in self.rows.split(BLOCK))

    def _less(self) -> Iterator[Tensor]:
        return (part - self.mean for part in self._plain())


def _check_rows(x: Tensor, y: Tensor, least: int) -> None:
    if len(x) != len(y) or len(x) < least:
        raise EngramError(f"CKA got {len(x)} and {len(y)} rows; it wants the same rows twice, at least {least}")


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """Sum over all pairs of rows of (x_i·x_j)(y_i·y_j), by the cheaper of two equal forms."""
    if len(x) * (x.shape[1] + y.shape[1]) < x.shape[1] * y.shape[1]:
        return ((x @ x.T) * (y @ y.T)).sum()
    return (x.T @ y).square().sum()


def _hsic(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """HSIC of centred rows; a shift of all rows leaves HSIC1 as it is, so centring only saves digits."""
    n, inner = len(x), _inner(x, y)
    if not unbiased:
        return inner.item() / (n - 1) ** 2
    kx, ky = x.square().sum(1), y.square().sum(1)  # the diagonals, which HSIC1 leaves out
    rx, ry = x @ x.sum(0) - kx, y @ y.sum(0) - ky  # row sums without the diagonals
    total = inner - kx @ ky + rx.sum() * ry.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rx @ ry)
    return total.item() / (n * (n - 3))


def _hsic_of_blocks(xs: _Centred, ys: _Centred, unbiased: bool) -> float:
    """The same from sums over blocks: with k the squared norms and s the sum of the rows, the row sums without the
    diagonals are x·s - k."""
    product: Any = 0.0
    sums: list[Any] = [0.0] * 7
    for x, y in zip(xs, ys, strict=True):
        kx, ky = x.square().sum(1), y.square().sum(1)
        product = product + x.T @ y
        found = kx @ ky, kx.sum(), ky.sum(), x.sum(0), y.sum(0), ky @ x, kx @ y
        sums = [total + value for total, value in zip(sums, found, strict=True)]
    n, inner = len(xs), product.square().sum()
    if not unbiased:
        return inner.item() / (n - 1) ** 2
    both, kx, ky, sx, sy, kyx, kxy = sums
    rows = sx @ product @ sy - sx @ kyx - sy @ kxy + both
    total = inner - both + (sx @ sx - kx) * (sy @ sy - ky) / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows
    return total.item() / (n * (n - 3))


def _ratio(xy: float, xx: float, yy: float) -> float:
    return xy / (xx * yy) ** 0.5 if xx > 0 and yy > 0 else float("nan")
